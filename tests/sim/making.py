"""Records made by hand, for what only reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvist.sim.records import Records, Segment

NAN = float("nan")


def records(**columns: Any) -> Records:
    """Two requests of 100 and 200 prompt tokens on one worker, and one that was rejected; columns may be replaced."""
    values: dict[str, Any] = {
        "arrival_ms": [0.0, 10.0, 20.0],
        "input_length": [100, 200, 9999],
        "requested_output_length": [3, 1, 5],
        "output_length": [3, 1, 0],
        "first_admit_ms": [0.0, 12.0, NAN],
        "first_token_ms": [10.0, 30.0, NAN],
        "second_token_ms": [18.0, NAN, NAN],
        "last_token_ms": [30.0, 30.0, NAN],
        "reused_input_tokens": [0, 64, 0],
        "first_reused_input_tokens": [0, 64, 0],
        "admission_count": [2, 1, 0],
        "status": [0, 0, 1],
        "worker": [0, 0, 0],
        "prefill_worker": [-1, -1, -1],
        "token_gaps_ms": [8.0, 12.0],
        "token_gap_counts": [1, 1],
        "passes": 4,
        "evicted_blocks": 2,
        "prefill_tokens": 237,
        "busy_ms": [28.0],
        "duration_ms": 30.0,
        "segments": SEGMENTS,
    } | columns
    kinds = {name: np.float64 for name in values if name.endswith("_ms")} | {
        "status": np.int8,
        "worker": np.int32,
        "prefill_worker": np.int32,
    }
    return Records(
        **{
            name: np.array(value, kinds.get(name, np.int64))
            if isinstance(value, Sequence) and name != "segments"
            else value
            for name, value in values.items()
        }
    )


SEGMENTS = (
    Segment(worker=0, start_ms=0.0, end_ms=10.0, prefill_tokens=100, decodes=0, passes=1, waiting=0, used_blocks=2),
    Segment(worker=0, start_ms=12.0, end_ms=30.0, prefill_tokens=136, decodes=1, passes=1, waiting=1, used_blocks=5),
)


def trace_lines(requests: int = 40) -> str:
    """A trace file: prompts of 3 or 4 blocks, the first of which they share in three groups."""
    rows = (
        {
            "timestamp": 50 * i,
            "input_length": 1600 + 7 * (i % 5),
            "output_length": 1 + i % 9,
            "hash_ids": [i % 3, 1000 + i % 7, 2000 + i, 3000 + i],
        }
        for i in range(requests)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)
