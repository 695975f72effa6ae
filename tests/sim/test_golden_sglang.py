"""SGLang-like replays equal those of the real NVIDIA Dynamo 1.6.1 to the nanosecond."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvist.sim.config import ClusterConfig, EngineConfig, SglangOptions
from kvist.sim.replay import replay
from kvist.sim.trace import read_trace

from .golden import TRACES, engine_of, golden_cases, needs_golden
from .test_golden import DYNAMO, differing, figures, row_of

SMALL: dict[str, Any] = json.loads((DYNAMO / "sglang.json").read_text())


@pytest.mark.parametrize("name", SMALL)
def test_small_trace(name: str) -> None:
    case = SMALL[name]
    engine = dict(case["engine"])
    options = SglangOptions(**engine.pop("sglang", {}))
    trace = read_trace(DYNAMO / "trace.jsonl", block_size=128)
    records = replay(
        trace, EngineConfig(reject_oversized=True, **engine, sglang=options), ClusterConfig(**case["cluster"])
    )
    assert not differing(figures(records), case["requests"])


@needs_golden
def test_real_trace() -> None:
    case = golden_cases()["tool200_1w_sglang"]
    trace = read_trace(TRACES / f"{case['trace']}.jsonl", block_size=512)
    ours = figures(replay(trace, engine_of(case)))
    assert len(case["per_request"]) == len(trace)
    assert not differing(ours, sorted(row_of(request) for request in case["per_request"]))
