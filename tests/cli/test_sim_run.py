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
    fitted = {"format": "kvist-timing-v1", "prefill": [0, 0.01, 5], "decode": [4, 0.1, 0.0001], "mixed_ms": 0}
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
        (["--trace-block-size", "0"], "--trace-block-size"),
        (["--limit", "0"], "--limit"),
        (["--html", "/nowhere/at/all.html"], "--html"),
        (["--timing", "fixed:-50,1"], "prefill_each_ms"),
        (["--timing", "fixed:1,nan"], "decode_each_ms"),
        (["--timing", "fixed:1e308,1"], "prefill_each_ms"),
        (["--speedup", "1e-308"], "speedup"),
        (["--speedup", "1e-6", "--timing", "fixed:1e4,1"], "timing: a pass must take at most"),
        (["--arrival-speedup", "1e-308"], "arrival_speedup"),
        (["--startup-ms", "1e308"], "startup_ms"),
        (["--event-lag-ms", "1e308", "--router", "kv"], "event_lag_ms"),
        (["--num-blocks", "99999999999999999999"], "num_blocks"),
        (["--block-size", "99999999999999999999"], "block_size"),
        (["--workers", "99999999999"], "workers"),
        (["--dp-size", "99999999"], "dp_size"),
        (["--workers", "4096", "--dp-size", "4096"], "workers"),
        (["--kv-bytes-per-token", "9" * 26], "kv_bytes_per_token"),
        (["--host-blocks", "9", "--host-gbps", "1e-300", "--kv-bytes-per-token", "10"], "host_gbps"),
        (["--host-blocks", "9", "--host-gbps", "nan", "--kv-bytes-per-token", "10"], "host_gbps"),
        (["--prefill-workers", "2", "--transfer-gbps", "1e-300", "--kv-bytes-per-token", "10"], "transfer_gbps"),
        (["--trace-block-size", "9" * 23], "--trace-block-size"),
        (["--seed", "-1"], "seed"),
        (["--scheduling", "sglang", "--policy", "lfu"], "policy is not simulated"),
        (["--scheduling", "sglang", "--preemption", "fifo"], "preemption is not simulated"),
        (["--scheduling", "sglang", "--host-blocks", "9", "--kv-bytes-per-token", "10"], "tiers is not simulated"),
        (["--sla-ttft-ms", "nan"], "ttft_ms"),
    ],
)
def test_what_can_not_be_is_refused_by_name(trace: str, tmp_path: Path, words: list[str], named: str) -> None:
    out = tmp_path / "out.jsonl"
    ran = simulated(trace, *words, "--per-request", str(out), "--json")
    assert (ran.code, ran.out, out.exists()) == (2, "", False)
    assert named in ran.error["message"]


def test_a_file_is_not_written_over_the_trace_or_another(trace: str, tmp_path: Path) -> None:
    before, link, page = Path(trace).read_bytes(), tmp_path / "link.jsonl", str(tmp_path / "page")
    link.symlink_to(trace)
    for words in (["--per-request", trace], ["--html", str(link)], ["--html", page, "--chrome-trace", page]):
        ran = simulated(trace, *words, "--json")
        assert (ran.code, ran.out, Path(page).exists()) == (2, "", False)
        assert f"{words[-2][2:].replace('-', '_')} must be a file of its own" in ran.error["message"] or page in words
        assert Path(trace).read_bytes() == before
    assert simulated(trace, "--per-request", "/dev/null", "--chrome-trace", "/dev/null").code == 0


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
