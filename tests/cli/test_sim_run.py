"""`kvist sim run`: its table, its files, and what it refuses before it runs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kvist.cli.output import Output
from sim.making import trace_lines

from .conftest import Ran, run


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "small.jsonl"
    path.write_text(trace_lines())
    return str(path)


def simulated(*words: str) -> Ran:
    return run(["sim", "run", *words], {"KVIST_STORE": None})


def test_people_get_a_table(trace: str) -> None:
    ran = simulated(trace, "--workers", "2", "--sla-ttft-ms", "100")
    assert ran.code == 0, ran.err
    assert ran.lines[0] == "small: 40 requests on 2 workers, round_robin"
    for expected in ("prompt tokens from cache", "within the SLA", "first token", "p99"):
        assert expected in ran.out
    assert ran.err == ""


def test_json_has_settings_and_summary(trace: str) -> None:
    ran = simulated(
        trace, "--num-blocks", "512", "--no-prefix-caching", "--timing", "fixed:20,5", "--seed", "7", "--json"
    )
    assert ran.code == 0, ran.err
    engine, cluster, summary = ran.json["settings"]["engine"], ran.json["settings"]["cluster"], ran.json["summary"]
    assert (engine["num_blocks"], engine["prefix_caching"], cluster["seed"]) == (512, False, 7)
    assert engine["timing"] == {"kind": "fixed", "prefill_each_ms": 20.0, "decode_each_ms": 5.0}
    assert (summary["completed_requests"], summary["prefix_cache_reused_ratio"]) == (40, 0.0)
    assert summary["min_ttft_ms"] >= 20.0


def test_a_fitted_model_is_read_from_its_file(trace: str, tmp_path: Path) -> None:
    fitted = {"format": "kvist-timing-v1", "prefill": [5, 0.01, 0], "decode": [4, 0.1, 0.0001], "mixed_ms": 0}
    file = tmp_path / "model.json"
    file.write_text(json.dumps(fitted))
    ran = simulated(trace, "--timing", str(file), "--json")
    assert ran.json["settings"]["engine"]["timing"]["decode"] == [4.0, 0.1, 0.0001]
    file.write_text(json.dumps(fitted | {"decode": [4]}))
    ran = simulated(trace, "--timing", str(file), "--json")
    assert ran.code == 2
    assert "decode" in ran.error["message"]


def test_progress_counts_requests(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []
    monkeypatch.setattr(Output, "progress", lambda self, what: nullcontext(lambda *done: drawn.append(done)))
    assert simulated(trace).code == 0
    assert drawn == sorted(drawn)
    assert drawn[-1] == (40, 40)


def test_equal_words_give_equal_results(trace: str) -> None:
    def figures() -> dict[str, Any]:
        summary = simulated(trace, "--workers", "3", "--json").json["summary"]
        return {name: value for name, value in summary.items() if "wall" not in name and "processed" not in name}

    assert figures() == figures()


def test_files_are_written(trace: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("per-request", "chrome-trace", "html")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    ran = simulated(trace, "--limit", "10", *words, "--quiet")
    assert ran.code == 0, ran.err
    assert ran.lines == [str(path) for path in files.values()]
    assert len(files["per-request"].read_text().splitlines()) == 10
    phases = {event["ph"] for event in json.loads(files["chrome-trace"].read_text())["traceEvents"]}
    assert {"X", "C", "M", "b", "e"} <= phases
    assert files["html"].read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--workers", "0"], "workers"),
        (["--num-blocks", "-1"], "num_blocks"),
        (["--num-blocks", "many"], "--num-blocks"),
        (["--num-blocks", "10"], "num_blocks"),
        (["--max-num-batched-tokens", "8"], "max_num_batched_tokens"),
        (["--no-chunked-prefill", "--max-num-batched-tokens", "1024"], "max_num_batched_tokens"),
        (["--policy", "magic"], "--policy"),
        (["--timing", "fixed:1"], "--timing"),
        (["--timing", "none.npz"], "--timing"),
        (["--host-blocks", "10"], "kv_bytes_per_token"),
        (["--disk-blocks", "10", "--kv-bytes-per-token", "1"], "host_blocks"),
        (["--sla-ttft-ms", "0"], "ttft_ms"),
        (["--concurrency", "0"], "concurrency"),
        (["--arrival-speedup", "nan"], "arrival_speedup"),
        (["--trace-block-size", "0"], "block_size"),
        (["--limit", "0"], "--limit"),
        (["--html", "/nowhere/at/all.html"], "--html"),
    ],
)
def test_what_can_not_be_is_refused_by_name(trace: str, tmp_path: Path, words: list[str], named: str) -> None:
    out = tmp_path / "out.jsonl"
    ran = simulated(trace, *words, "--per-request", str(out), "--json")
    assert (ran.code, ran.out, out.exists()) == (2, "", False)
    assert named in ran.error["message"]


def test_what_never_fits_is_rejected_where_that_is_asked_for(trace: str) -> None:
    ran = simulated(trace, "--num-blocks", "10", "--reject-oversized", "--json")
    assert (ran.code, ran.json["summary"]["rejected_requests"]) == (0, 40)


def test_a_trace_that_is_not_there_or_wrong(trace: str, tmp_path: Path) -> None:
    assert simulated(str(tmp_path / "none.jsonl"), "--json").error["kind"] == "not_found"
    with Path(trace).open("a") as file:
        file.write('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1], "what": 2}\n')
    ran = simulated(trace, "--json")
    assert ran.code == 2
    assert "line 41" in ran.error["message"]
    assert "what" in ran.error["message"]
