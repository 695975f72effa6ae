"""The report: Dynamo's figures from Dynamo's rows, and what is written of each request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput, StoreError
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.replay import replay
from kvist.sim.report import PERCENTILES, Report, Sla, nearest_rank, percentiles, spread
from kvist.sim.trace import read_trace

from .golden import TRACES, engine_of, golden_cases, needs_golden
from .making import NAN, records

DYNAMO = Path(__file__).parents[1] / "data" / "dynamo"
SMALL: dict[str, Any] = json.loads((DYNAMO / "summaries.json").read_text())
NOT_OURS = {"power_w", "power_coverage", "prefill_gpus_per_worker", "decode_gpus_per_worker", "kv_eviction_policy"}


def report(sla: Sla | None = None, **columns: Any) -> Report:
    return Report("by hand", EngineConfig(), ClusterConfig(), records(**columns), 0.5, sla)


def test_the_figures_of_three_requests() -> None:
    summary = report().summary()
    assert (summary["num_requests"], summary["completed_requests"], summary["rejected_requests"]) == (3, 2, 1)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (300, 4)
    assert summary["prefix_cache_reused_ratio"] == 64 / 300
    assert (summary["mean_ttft_ms"], summary["max_ttft_ms"]) == (15.0, 20.0)
    assert (summary["mean_tpot_ms"], summary["num_tpot_samples"]) == (10.0, 1)
    assert (summary["mean_ttst_ms"], summary["std_ttst_ms"]) == (8.0, 0.0)
    assert (summary["mean_itl_ms"], summary["std_itl_ms"], summary["p99_itl_ms"]) == (10.0, 2.0, 12.0)
    assert summary["max_output_token_throughput_per_user"] == 125.0
    assert (summary["preemptions"], summary["gpu_hours"]) == (1, pytest.approx(0.03 / 3600))
    assert summary["processed_tokens_per_s"] == 608.0
    assert not any(name.startswith("goodput") for name in summary)


def test_ranks_and_prefill_workers_have_names() -> None:
    def names(**fields: int) -> list[str]:
        return Report("by hand", EngineConfig(), ClusterConfig(**fields), records(), 0.5).worker_names

    assert names(workers=2) == ["worker 0", "worker 1"]
    assert names(workers=2, dp_size=2)[2:] == ["worker 1, rank 0", "worker 1, rank 1"]
    assert names(workers=1, prefill_workers=1) == ["worker 0", "prefill worker 0"]


def test_figures_without_samples_are_0() -> None:
    empty = report(status=[1, 1, 1], token_gaps_ms=[], token_gap_counts=[], duration_ms=0.0).summary()
    assert {value for name, value in empty.items() if name.startswith(("mean_", "p99_"))} == {0.0}
    assert empty["request_throughput_rps"] == 0.0


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft_ms": 10.0}, 1),
        ({"ttft_ms": 20.0}, 2),
        ({"itl_ms": 9.9}, 1),  # the one with a single token has no time between tokens
        ({"e2e_ms": 20.0}, 1),
        ({"ttft_ms": 10.0, "itl_ms": 9.9}, 0),
    ],
)
def test_goodput_counts_requests_that_keep_to_the_sla(limits: dict[str, float], good: int) -> None:
    summary = report(Sla(**limits)).summary()
    assert summary["goodput_completed_requests"] == good
    assert summary["goodput_request_throughput_rps"] == pytest.approx(good / 0.03)


def test_a_request_without_tokens_keeps_to_no_sla_of_tokens() -> None:
    without = {"first_token_ms": [NAN] * 3, "second_token_ms": [NAN] * 3, "last_token_ms": [NAN] * 3}
    summary = report(Sla(ttft_ms=1e9), output_length=[0, 0, 0], **without).summary()
    assert (summary["completed_requests"], summary["num_ttft_samples"]) == (2, 0)
    assert summary["goodput_completed_requests"] == 0


@pytest.mark.parametrize("limit", [0, -1.0, NAN, float("inf")])
def test_a_limit_that_is_none_is_refused_by_name(limit: float) -> None:
    with pytest.raises(InvalidInput, match="itl_ms"):
        Sla(itl_ms=limit)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), min_size=1))
def test_weighted_percentiles_are_those_of_all_samples(pairs: list[tuple[int, int]]) -> None:
    pairs = sorted(dict(pairs).items())
    values, counts = np.array([one for one, _ in pairs], float), np.array([count for _, count in pairs])
    everything = np.repeat(values, counts)
    expected = [everything[nearest_rank(part, len(everything))] for part in PERCENTILES.values()]
    assert percentiles(values, counts) == expected
    figures = spread("x", values, counts)
    assert figures["mean_x"] == pytest.approx(everything.mean())
    assert figures["std_x"] == pytest.approx(everything.std(), abs=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.integers(1, 7))
def test_figures_do_not_depend_on_where_arrays_lie(values: list[float], shift: int) -> None:
    counts = np.arange(1, len(values) + 1)
    moved = np.concatenate((np.zeros(shift), np.sort(values)))[shift:]
    assert spread("x", np.sort(values), counts) == spread("x", moved, counts)


def test_requests_are_written_with_the_fields_of_dynamo(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    report().write_requests(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {
        "arrival_time_ms": 0.0,
        "input_length": 100,
        "requested_output_length": 3,
        "output_length": 3,
        "first_admit_ms": 0.0,
        "first_token_ms": 10.0,
        "last_token_ms": 30.0,
        "reused_input_tokens": 0,
        "admission_count": 2,
        "readmission_count": 1,
        "terminal_status": "completed",
    }
    assert (rows[2]["first_token_ms"], rows[2]["terminal_status"]) == (None, "rejected")
    assert [one.name for one in tmp_path.iterdir()] == ["out.jsonl"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        report().write_requests(tmp_path / "nowhere" / "out.jsonl")
    broken = report(admission_count=[1])  # a row short
    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(ValueError, match="shorter"):
        broken.write_requests(tmp_path / "out.jsonl")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["before"]


@needs_golden
@pytest.mark.parametrize("name", golden_cases())
def test_the_summary_is_that_of_dynamo(name: str) -> None:
    case = golden_cases()[name]
    rows = [dict(zip(case["fields"], row, strict=True)) for row in case["per_request"]]

    def column(field: str) -> list[Any]:
        return [NAN if row[field] is None else row[field] for row in rows]

    ours = report(
        arrival_ms=column("arrival_time_ms"),
        input_length=column("input_length"),
        requested_output_length=column("requested_output_length"),
        output_length=column("output_length"),
        first_admit_ms=column("first_admit_ms"),
        first_token_ms=column("first_token_ms"),
        second_token_ms=[NAN] * len(rows),  # the golden rows do not tell
        last_token_ms=column("last_token_ms"),
        reused_input_tokens=column("reused_input_tokens"),
        first_reused_input_tokens=column("reused_input_tokens"),
        admission_count=column("admission_count"),
        status=[int(row["terminal_status"] != "completed") for row in rows],
        worker=column("decode_worker_idx"),
        prefill_worker=[-1] * len(rows),
        duration_ms=case["summary"]["duration_ms"],
        prefill_tokens=case["summary"]["committed_prefill_tokens"],
    ).summary()
    theirs = case["summary"]
    assert theirs.keys() - NOT_OURS <= ours.keys()
    for field, expected in theirs.items():
        unknown = ("ttst", "itl", "per_user", "first_admission")
        if (
            field in NOT_OURS
            or any(part in field for part in unknown)
            or "worker_seconds" in field
            or field == "gpu_hours"
        ):
            continue
        assert ours[field] == pytest.approx(expected, rel=1e-12), field


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for field in theirs.keys() - NOT_OURS:
        if field == "committed_prefill_tokens" and ours["preemptions"]:
            # what comes back from a preemption with all its prompt in the cache computes no prompt, as Dynamo counts
            assert ours[field] >= theirs[field]
            continue
        # Dynamo has these from a sketch, which is as good as that
        is_sketched = field.endswith(("_itl_ms", "_per_user")) and field.startswith(tuple(PERCENTILES))
        assert ours[field] == pytest.approx(theirs[field], rel=1.1e-3 if is_sketched else 1e-9), field


@pytest.mark.parametrize("name", SMALL)
def test_a_small_replay_has_the_summary_of_dynamo(name: str) -> None:
    case = SMALL[name]
    engine, cluster = engine_of(case), ClusterConfig(workers=case["workers"])
    records = replay(read_trace(DYNAMO / "trace.jsonl", block_size=128), engine, cluster)
    agree(
        Report(name, engine, cluster, records, 1.0, Sla(**case["sla"]) if case["sla"] else None).summary(),
        case["summary"],
    )


@needs_golden
@pytest.mark.parametrize("name", golden_cases())
def test_a_replay_has_the_summary_of_dynamo(name: str) -> None:
    case = golden_cases()[name]
    engine, cluster = engine_of(case), ClusterConfig(workers=case["workers"])
    records = replay(read_trace(TRACES / f"{case['trace']}.jsonl"), engine, cluster)
    agree(Report(name, engine, cluster, records, 1.0).summary(), case["summary"])
