"""Makes ``trace.jsonl`` and ``replays.json``: a small trace, and what NVIDIA Dynamo 1.6.1's replay makes of it.

Run it with an interpreter that has ai-dynamo 1.6.1. No request's prompt is as long as another's: so they are known.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

os.environ["DYN_LOG"] = "error"

from dynamo._core import _normalize_mocker_config, run_mocker_trace_replay

HERE = Path(__file__).parent
TRACE_BLOCK = 128
POOL = {"num_blocks": 96, "block_size": 64, "max_num_batched_tokens": 2048}
SMALL = POOL | {"num_blocks": 30}
SENT = POOL | {"kv_bytes_per_token": 100_000}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ample": ({"num_blocks": 4096, "block_size": 64}, {}),
    "small pool, lifo": (SMALL, {}),
    "two seats, fifo": (SMALL | {"num_blocks": 100, "block_size": 16, "preemption": "fifo", "max_num_seqs": 2}, {}),
    "blocks of 16": (SMALL | {"num_blocks": 120, "block_size": 16}, {}),
    "no cache": (SMALL | {"prefix_caching": False}, {}),
    "whole prompts": (POOL | {"chunked_prefill": False, "max_num_batched_tokens": 8192}, {}),
    "small budget": (POOL | {"max_num_batched_tokens": 256, "max_num_seqs": 7}, {}),
    "shortest model": (POOL | {"max_model_len": 1100}, {}),
    "trtllm": (POOL | {"scheduling": "trtllm"}, {}),
    "trtllm, small": (SMALL | {"scheduling": "trtllm", "max_model_len": 1500}, {}),
    "closed loop": (POOL, {"concurrency": 8}),
    "3 workers": (SMALL, {"workers": 3}),
    "faster arrivals": (POOL, {"arrival_speedup": 2.5, "workers": 2}),
    "kv": (POOL, {"workers": 3, "router": "kv"}),
    "kv, 2 ranks": (POOL, {"workers": 2, "dp_size": 2, "router": "kv"}),
    "2 ranks": (SMALL, {"dp_size": 2}),
    "2 workers of 2 ranks": (SMALL | {"scheduling": "trtllm"}, {"workers": 2, "dp_size": 2}),
    "disaggregated": (SENT, {"prefill_workers": 1, "workers": 2, "transfer_gbps": 10.0}),
    "disaggregated, small": (SENT | {"num_blocks": 48}, {"prefill_workers": 2, "workers": 2, "transfer_gbps": 2.0}),
    "disaggregated, missing": (SENT, {"prefill_workers": 2, "transfer_gbps": 2.0, "transfer_only_missing": True}),
    "disaggregated, trtllm": (SENT | {"scheduling": "trtllm"}, {"prefill_workers": 1, "transfer_gbps": 50.0}),
    "disaggregated, no bytes": (POOL | {"prefix_caching": False}, {"prefill_workers": 1, "concurrency": 6}),
    "faster engine": (POOL | {"speedup": 3.0, "decode_speedup": 1.5}, {}),
}
NAMES = {
    "num_blocks": "num_gpu_blocks",
    "prefix_caching": "enable_prefix_caching",
    "chunked_prefill": "enable_chunked_prefill",
    "speedup": "speedup_ratio",
    "decode_speedup": "decode_speedup_ratio",
    "scheduling": "backend",
    "preemption": "preemption_mode",
    "kv_bytes_per_token": "kv_transfer_bytes_per_token",
}


def trace() -> list[dict[str, Any]]:
    """Bursts of requests over shared prefixes, a few of them in sessions."""
    draw = random.Random(5)
    rows: list[dict[str, Any]] = []
    time = 0
    lengths = draw.sample(range(90, 1400), 60)
    for number, length in enumerate(lengths):
        time += draw.choice((0, 3, 20, 20, 150))
        if number in (17, 40):
            length = 5000 + number
        blocks = -(-length // TRACE_BLOCK)
        family, shared = draw.randrange(4), draw.randrange(blocks + 1)
        ids = [1000 * family + i if i < shared else 10000 * (number + 1) + i for i in range(blocks)]
        output = {5: 0, 6: 1, 30: 1, 31: 2, 44: 0}.get(number, draw.choice((1, 7, 30, 64, 90, 200)))
        row: dict[str, Any] = {"timestamp": time, "input_length": length, "output_length": output, "hash_ids": ids}
        if number % 7 in (1, 3) and number > 12:
            row["session_id"] = f"s{number // 14}"
            if number % 7 == 3 or number % 14 > 6:
                del row["timestamp"]
                row["delay"] = draw.choice((0, 12, 333))
        rows.append(row)
    return rows


def replay(engine: dict[str, Any], cluster: dict[str, Any]) -> list[list[int | None]]:
    """The figures of each request: prompt tokens; arrival, admission, first and last token in ns; tokens that it got,
    reused tokens, admissions, whether it was completed, and the workers."""
    options: dict[str, Any] = {"arrival_speedup_ratio": cluster.get("arrival_speedup", 1.0)}
    if "concurrency" in cluster:
        options["replay_concurrency"] = cluster["concurrency"]
    fields = {NAMES.get(name, name): value for name, value in engine.items()}
    if "prefill_workers" in cluster:
        if engine.get("kv_bytes_per_token"):
            fields["kv_transfer_bandwidth"] = cluster["transfer_gbps"]
        if cluster.get("transfer_only_missing"):
            fields["kv_transfer_timing_mode"] = "destination_missing"
        for kind in ("prefill", "decode"):
            options[f"{kind}_engine_args"] = _normalize_mocker_config({"engine": fields | {"worker_type": kind}})
        options |= {"num_prefill_workers": cluster["prefill_workers"], "num_decode_workers": cluster.get("workers", 1)}
    else:
        config = {"engine": fields, "dp_size": cluster.get("dp_size", 1)}
        options |= {"extra_engine_args": _normalize_mocker_config(config), "num_workers": cluster.get("workers", 1)}
    report = run_mocker_trace_replay(
        [str(HERE / "trace.jsonl")],
        router_mode="kv_router" if cluster.get("router") == "kv" else "round_robin",
        replay_mode="offline",
        trace_format="mooncake",
        trace_block_size=TRACE_BLOCK,
        capture_per_request=True,
        **options,
    )
    return sorted(map(figures, report.per_request))


def figures(request: dict[str, Any]) -> list[int | None]:
    times = [request[f"{name}_ms"] for name in ("arrival_time", "first_admit", "first_token", "last_token")]
    return [
        request["input_length"],
        *(None if time is None else round(time * 1e6) for time in times),
        request["output_length"],
        request["reused_input_tokens"],
        request["admission_count"],
        int(request["terminal_status"] == "completed"),
        *(
            -1 if request[f"{kind}_worker_idx"] is None else request[f"{kind}_worker_idx"]
            for kind in ("decode", "prefill")
        ),
    ]


if __name__ == "__main__":
    (HERE / "trace.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in trace()))
    made = {name: {"engine": e, "cluster": c, "requests": replay(e, c)} for name, (e, c) in CASES.items()}
    lines = (f"{json.dumps(name)}:{json.dumps(case, separators=(',', ':'))}" for name, case in made.items())
    (HERE / "replays.json").write_text("{" + ",\n".join(lines) + "}\n")
