"""Sweeps: rows are the same in this process, in others, and on Ray."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
from pathlib import Path

import pytest

from kvist.errors import InvalidInput, KvistError
from kvist.sim import sweep
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.report import Sla
from kvist.sim.sweep import Setup, grid, local, on_ray, to_csv
from kvist.sim.trace import Trace, read_trace
from kvist.tiers.config import TierConfig, TiersConfig

from .making import trace_lines

SETUPS = [
    Setup(engine=EngineConfig(num_blocks=blocks), cluster=ClusterConfig(workers=workers))
    for workers in (1, 2)
    for blocks in (64, 16384)
]
SLA = Sla(ttft_ms=100)


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    path = tmp_path / "small.jsonl"
    path.write_text(trace_lines())
    return read_trace(path)


def test_rows_come_in_order_with_their_figures(trace: Trace) -> None:
    told: list[tuple[int, int]] = []
    with local(trace, sla=SLA, progress=lambda *done: told.append(done)) as replay_all:
        rows = replay_all(SETUPS)
    assert [row.setup for row in rows] == SETUPS
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(row.figures["num_requests"] == 40 for row in rows)
    assert rows[0].figures["p95_ttft_ms"] > rows[3].figures["p95_ttft_ms"]
    assert "goodput_completed_requests" in rows[0].figures
    assert not any("wall" in name for name in rows[0].figures)


def test_processes_give_the_same_rows(trace: Trace) -> None:
    with local(trace, sla=SLA) as here, local(trace, sla=SLA, jobs=2) as there:
        assert there(SETUPS) == here(SETUPS)


def test_ray_gives_the_same_rows(trace: Trace) -> None:
    pytest.importorskip("ray")
    with local(trace, sla=SLA) as here, on_ray(trace, "local", sla=SLA) as there:
        assert there(SETUPS) == here(SETUPS)
        with pytest.raises(InvalidInput, match="chunked_prefill"):
            there([Setup(engine=EngineConfig(chunked_prefill=False, max_num_batched_tokens=256))])


def test_without_ray_the_error_says_what_to_install(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InvalidInput, match="ray") as caught, on_ray(trace, "local"):
        pass
    assert caught.value.hint == "pip install 'kvist[ray]'"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_setup_that_can_not_serve_the_trace_is_refused(trace: Trace, jobs: int) -> None:
    impossible = Setup(engine=EngineConfig(chunked_prefill=False, max_num_batched_tokens=256))
    with local(trace, jobs=jobs) as replay_all, pytest.raises(InvalidInput, match="max_num_batched_tokens"):
        replay_all([SETUPS[0], impossible])


def test_a_process_that_ends_by_itself_is_told_of(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_simulate_kept", _end)
    with local(trace, jobs=2) as replay_all, pytest.raises(KvistError, match="ended by itself"):
        replay_all(SETUPS[:1])


def _end(setup: Setup) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_less_than_one_process_is_refused(trace: Trace) -> None:
    with pytest.raises(InvalidInput, match="jobs"), local(trace, jobs=0):
        pass


def test_the_grid_has_every_combination_once() -> None:
    assert grid({"a": (1, 2), "b": "xy"}) == [{"a": a, "b": b} for a in (1, 2) for b in "xy"]
    for axes in ({"a": ()}, {"a": (1, 1)}):
        with pytest.raises(InvalidInput, match="a must be"):
            grid(axes)


def test_csv_has_axes_and_figures(trace: Trace) -> None:
    with local(trace) as replay_all:
        rows = replay_all(SETUPS[:2])
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [line["num_blocks"] for line in read] == ["64", "16384"]
    assert [float(line["p99_ttft_ms"]) for line in read] == [row.figures["p99_ttft_ms"] for row in rows]


def test_settings_are_json_and_tell_everything() -> None:
    host = TierConfig(capacity=10, up_gb_per_s=math.inf)
    tiers = TiersConfig(block_bytes=64, host=host, disk=TierConfig(capacity=20))
    setup = Setup(engine=EngineConfig(policy="lru", kv_bytes_per_token=1, tiers=tiers))
    assert (setup.axes["host_blocks"], setup.axes["disk_blocks"]) == (10, 20)
    settings = json.loads(json.dumps(setup.settings, allow_nan=False))
    assert settings["engine"]["tiers"]["host"]["up_gb_per_s"] == "inf"
    assert settings["engine"]["tiers"]["disk"]["capacity"] == 20
    assert settings["engine"]["timing"]["kind"] == "polynomial"
    assert settings["cluster"]["seed"] == 0
