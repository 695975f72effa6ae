"""The simulator beside vLLM 0.32's own scheduler and pool, as recorded: what every request found, and when.

The record is made by ``python bench/fidelity.py --parts passes-24 --record tests/data/vllm/passes.jsonl``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from kvist.sim.config import EngineConfig
from kvist.sim.records import Records
from kvist.sim.replay import replay
from kvist.sim.timing import Linear
from kvist.sim.trace import Trace

RECORD: Final = Path(__file__).parent.parent / "data" / "vllm" / "passes.jsonl"
CASES: Final = [json.loads(line) for line in RECORD.read_text().splitlines()]
EVEN: Final = Linear((0.0, 0.0, 10.0), (0.0, 0.0, 10.0), -10.0)
"""Every pass takes 10 ms, as in the record."""


def replayed(case: dict[str, Any]) -> Records:
    columns = {name: np.array(values) for name, values in case["trace"].items() if isinstance(values, list)}
    rows = len(columns["input_tokens"])
    trace = Trace(
        name="case",
        block_size=case["trace"]["block_size"],
        previous=np.full(rows, -1),
        delay_ms=np.zeros(rows),
        request_ids=tuple(map(str, range(rows))),
        **columns,
    )
    return replay(trace, EngineConfig(reject_oversized=True, **case["engine"], timing=EVEN), timeline=True)


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_it_decides_as_vllm_does(case: dict[str, Any]) -> None:
    records, answer = replayed(case), case["answer"]
    assert records.first_reused_input_tokens.tolist() == answer["first_reused_input_tokens"]
    assert records.readmission_count.tolist() == answer["readmission_count"]
    assert records.evicted_blocks == answer["evicted_blocks"]
    # A pass in which someone only computes generated tokens anew takes no time in Dynamo's replay, nor in ours.
    if all(segment.end_ms > segment.start_ms for segment in records.segments):
        for name in ("first_admit_ms", "first_token_ms", "last_token_ms"):
            assert getattr(records, name).tolist() == pytest.approx(answer[name], abs=1e-3), name


def test_the_record_has_what_is_hard() -> None:
    answers = [case["answer"] for case in CASES]
    assert sum(sum(answer["readmission_count"]) for answer in answers) > 50
    assert sum(answer["evicted_blocks"] for answer in answers) > 1000
    assert sum(sum(answer["first_reused_input_tokens"]) for answer in answers) > 10_000
