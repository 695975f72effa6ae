"""`kvist plan`: an answer that names its replays, or the closest and a code of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.making import trace_lines

from .conftest import Ran, run

BUSY = ("--arrival-speedup", "4", "--router", "round_robin,kv")
LLAMA = ("--layers", "32", "--kv-heads", "8", "--head-size", "128")


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "small.jsonl"
    path.write_text(trace_lines(120))
    return str(path)


def planned(*words: str) -> Ran:
    return run(["plan", *words], {"KVIST_STORE": None})


def test_the_answer_names_its_replays(trace: str) -> None:
    limits = ("--sla-ttft-ms", "80", "--sla-itl-ms", "30", "--percentile", "p90")
    words = (*LLAMA, "--kv-gb", "40", "--gpu-price", "2", *limits, *BUSY)
    ran = planned(trace, *words, "--json")
    assert ran.code == 0, ran.err
    answer, runs = ran.json["answer"], ran.json["runs"]
    assert ran.json["met"]
    assert (answer["gpus"], answer["cost_per_hour"]) == (answer["workers"], 2.0 * answer["workers"])
    assert answer["workers"] > 1
    chosen, confirmed, below = (runs[answer[name]] for name in ("run", "confirmed_by", "below_misses"))
    assert chosen == confirmed
    assert (chosen["meets"], below["meets"], below["workers"]) == (True, False, answer["workers"] - 1)
    assert chosen["figures"]["p90_ttft_ms"] == chosen["against_sla"]["ttft_ms"] <= 80
    assert chosen["settings"]["engine"]["num_blocks"] == int(40e9) // (131072 * 64)
    assert chosen["settings"]["cluster"]["seed"] == 0


def test_people_read_it(trace: str) -> None:
    ran = planned(trace, "--sla-ttft-ms", "80", *BUSY)
    assert ran.code == 0, ran.err
    assert ran.lines[0] == "plan for small:"
    assert "GPUs" in ran.lines[1]
    assert "p95 ttft" in ran.lines[2]
    assert any("misses 80.0" in line for line in ran.lines)
    assert planned(trace, "--sla-ttft-ms", "80", *BUSY, "--quiet").out.strip().isdigit()


def test_where_nothing_meets_the_sla_the_closest_is_told(trace: str) -> None:
    words = (trace, "--sla-ttft-ms", "1", "--max-workers", "3", "--router", "round_robin")
    ran = planned(*words, "--json")
    assert (ran.code, ran.json["met"], ran.json["answer"]) == (3, False, None)
    assert not ran.json["runs"][ran.json["closest"]]["meets"]
    ran = planned(*words)
    assert ran.code == 3
    assert ran.lines[0].startswith("no plan")
    assert "misses 1.0" in ran.out


def test_a_part_of_the_requests_may_be_rejected(trace: str) -> None:
    words = (trace, "--num-blocks", "25", "--sla-ttft-ms", "1e9", "--router", "round_robin", "--json")
    assert "num_blocks" in planned(*words).error["message"]
    ran = planned(*words, "--max-rejected", "0.99")
    assert (ran.code, ran.json["met"], ran.json["max_rejected"]) == (0, True, 0.99)


def test_a_plan_serves_somebody(trace: str) -> None:
    words = (trace, "--max-model-len", "1", "--sla-ttft-ms", "1e9", "--router", "round_robin", "--max-workers", "1")
    assert "rejected" in planned(*words, "--max-rejected", "1", "--json").error["message"]
    ran = planned(*words, "--max-rejected", "0.9", "--json")
    assert (ran.code, ran.json["runs"][0]["against_sla"]) == (3, {"ttft_ms": None})
    assert "p95 ttft: no request has one" in planned(*words, "--max-rejected", "0.9").out


def test_every_rank_is_told_and_paid_for(trace: str) -> None:
    words = (trace, *LLAMA, "--kv-gb", "40", "--host-gb", "10", "--dp-size", "2", "--router", "round_robin")
    limits = ("--policy", "lru", "--sla-ttft-ms", "1e9", "--gpu-price", "2", "--host-price", "0.1")
    answer = planned(*words, *limits, "--json").json["answer"]
    assert (answer["workers"], answer["gpus"], round(answer["host_gb"], 1)) == (1, 2, 20.0)
    assert answer["cost_per_hour"] == pytest.approx(2 * 2 + 20 * 0.1, rel=1e-3)
    assert "2 GPUs (1 worker of 2 ranks, each of" in planned(*words, *limits).out


def test_no_price_is_a_price(trace: str) -> None:
    ran = planned(trace, "--gpu-price", "0", "--sla-ttft-ms", "80", *BUSY, "--max-workers", "8", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["answer"]["below_misses"] is not None


def test_the_document_names_what_was_replayed(trace: str, tmp_path: Path) -> None:
    profile = tmp_path / "profile.npz"
    axes = {"prefill_isl": [1.0, 2.0], "decode_active_kv_tokens": [1.0, 2.0], "decode_context_length": [1.0, 2.0]}
    times = {"prefill_ttft_ms": [1.0, 2.0], "decode_itl": [[3.0, 4.0], [5.0, 6.0]]}
    arrays: dict[str, Any] = {name: np.array(values) for name, values in (axes | times).items()}
    np.savez(profile, **arrays)
    words = (trace, "--limit", "40", "--trace-block-size", "512", "--timing", str(profile), "--router", "kv")
    told = planned(*words, "--sla-ttft-ms", "1e9", "--json").json
    assert told["trace_file"] == {"path": trace, "block_size": 512, "limit": 40, "requests": 40}
    assert told["timing"] == {"kind": "table"} | axes | times


def test_a_model_tells_what_a_token_takes(trace: str, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = planned(trace, "--model", str(tmp_path), "--sla-ttft-ms", "500", "--router", "round_robin", "--json")
    assert ran.json["runs"][0]["settings"]["engine"]["kv_bytes_per_token"] == 512


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "sla"),
        (["--sla-ttft-ms", "-1"], "ttft_ms"),
        (["--sla-ttft-ms", "1", "--kv-gb", "1"], "kv_gb"),
        (["--sla-ttft-ms", "1", "--host-gb", "0,1"], "host_gb"),
        (["--sla-ttft-ms", "1", "--host-gb", "-1", *LLAMA], "host_gb"),
        (["--sla-ttft-ms", "1", "--host-gb", "0,nan", *LLAMA], "host_gb"),
        (["--sla-ttft-ms", "1", "--host-gb", "0.00000001", *LLAMA], "host_gb"),
        (["--sla-ttft-ms", "1", "--disk-gb", "inf", *LLAMA], "disk_gb"),
        (["--sla-ttft-ms", "1", "--kv-gb", "0"], "kv_gb"),
        (["--sla-ttft-ms", "1", "--kv-gb", "0", *LLAMA], "kv_gb"),
        (["--sla-ttft-ms", "1", "--kv-gb", "nan", *LLAMA], "kv_gb"),
        (["--sla-ttft-ms", "1", "--kv-gb", "inf", *LLAMA], "kv_gb"),
        (["--sla-ttft-ms", "1", "--max-rejected", "nan"], "rejected"),
        (["--sla-ttft-ms", "1", "--layers", "2"], "head_size, kv_heads"),
        (["--sla-ttft-ms", "1", "--layers", "2", "--model", "x"], "model"),
        (["--sla-ttft-ms", "1", "--kv-gb", "0.001", *LLAMA], "num_blocks"),
        (["--sla-ttft-ms", "1", "--gpus-per-worker", "0"], "gpus"),
        (["--sla-ttft-ms", "1", "--max-workers", "0"], "max_workers"),
        (["--sla-ttft-ms", "1", "--max-workers", "999999999"], "max_workers"),
        (["--sla-ttft-ms", "1", "--gpu-price", "-1"], "gpu_hour"),
        (["--sla-ttft-ms", "1", "--percentile", "p42"], "--percentile"),
    ],
)
def test_what_can_not_be_is_refused_by_name(trace: str, words: list[str], named: str) -> None:
    ran = planned(trace, *words, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert named in ran.error["message"]
