"""Makes ``summaries.json``: the summaries of NVIDIA Dynamo 1.6.1's replay of ``trace.jsonl``, some with an SLA.

Run it with an interpreter that has ai-dynamo 1.6.1.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["DYN_LOG"] = "error"

from dynamo._core import _normalize_mocker_config, run_mocker_trace_replay

HERE = Path(__file__).parent
SMALL = {"num_gpu_blocks": 30, "block_size": 64, "max_num_batched_tokens": 2048}
CASES: dict[str, dict[str, Any]] = {
    "ample": {"engine": {"num_gpu_blocks": 4096, "block_size": 64}, "workers": 1, "sla": {}},
    "preempting": {"engine": SMALL, "workers": 1, "sla": {"e2e_ms": 5000.0}},
    "3 workers": {"engine": SMALL, "workers": 3, "sla": {"ttft_ms": 2000.0, "itl_ms": 25.0}},
    "single tokens": {"engine": SMALL, "workers": 3, "sla": {"itl_ms": 8.0}},
}


def summary(case: dict[str, Any]) -> dict[str, Any]:
    """All figures but those of the machine that it ran on."""
    report = run_mocker_trace_replay(
        [str(HERE / "trace.jsonl")],
        extra_engine_args=_normalize_mocker_config({"engine": case["engine"]}),
        num_workers=case["workers"],
        router_mode="round_robin",
        replay_mode="offline",
        trace_format="mooncake",
        trace_block_size=128,
        **{f"sla_{name}": limit for name, limit in case["sla"].items()},
    )
    timed = ("wall_time_ms", "processed_tokens_per_s", "processed_output_tokens_per_s")
    return {name: value for name, value in report.summary.items() if name not in timed}


if __name__ == "__main__":
    made = {name: case | {"summary": summary(case)} for name, case in CASES.items()}
    (HERE / "summaries.json").write_text(json.dumps(made, indent=1) + "\n")
