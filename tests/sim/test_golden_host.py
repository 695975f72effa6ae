"""Replays with host memory equal those of the real NVIDIA Dynamo 1.6.1 to the nanosecond."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvist.sim.config import ClusterConfig, EngineConfig, HostOffload
from kvist.sim.replay import replay
from kvist.sim.trace import read_trace

from .golden import TRACES, engine_of, golden_cases, needs_golden
from .test_golden import DYNAMO, differing, figures, row_of

SMALL: dict[str, Any] = json.loads((DYNAMO / "host.json").read_text())


@pytest.mark.parametrize("name", SMALL)
def test_small_trace(name: str) -> None:
    case = SMALL[name]
    trace = read_trace(DYNAMO / "trace.jsonl", block_size=128)
    engine = EngineConfig(reject_oversized=True, **case["engine"], host_offload=HostOffload(**case["host"]))
    records = replay(trace, engine, ClusterConfig(**case["cluster"]))
    assert not differing(figures(records), case["requests"])


@needs_golden
def test_real_trace() -> None:
    case = golden_cases()["tool200_1w_hostoffload"]
    trace = read_trace(TRACES / f"{case['trace']}.jsonl", block_size=512)
    ours, theirs = figures(replay(trace, engine_of(case))), [row_of(request) for request in case["per_request"]]
    for rows in (ours, theirs):
        rows.sort(key=lambda row: [-1 if value is None else value for value in row])
    assert len(theirs) == len(trace)
    assert not differing([row[:9] for row in ours], [row[:9] for row in theirs])
