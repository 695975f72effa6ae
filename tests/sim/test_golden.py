"""Replays equal those of the real NVIDIA Dynamo 1.6.1 to the nanosecond: a small trace always, real ones if there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvist.sim import fleet
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.disaggregation import DecodeScheduler
from kvist.sim.pool import SlotPool
from kvist.sim.records import STATUS, Records
from kvist.sim.replay import replay
from kvist.sim.requests import Requests
from kvist.sim.timing import Clock, Polynomial
from kvist.sim.trace import read_trace

from .golden import TRACES, engine_of, golden_cases, needs_golden

DYNAMO = Path(__file__).parents[1] / "data" / "dynamo"
SMALL: dict[str, Any] = json.loads((DYNAMO / "replays.json").read_text())
OTHERS = ("sglang", "hostoffload")  # schedulers with tests of their own
LARGE = [name for name in golden_cases() if not name.endswith(OTHERS)]
FREE = ("disaggregated, small", "disaggregated, missing")  # prompts are computed again in some of their decode workers
KV = [name for name, case in SMALL.items() if case["cluster"].get("router") == "kv"]


def ns(ms: float | None) -> int | None:
    return None if ms is None or np.isnan(ms) else round(ms * 1e6)


def figures(records: Records) -> list[list[Any]]:
    """As `tests/data/dynamo/make.py` writes them, by length of the prompt."""
    times = (records.arrival_ms, records.first_admit_ms, records.first_token_ms, records.last_token_ms)
    counts = (records.output_length, records.reused_input_tokens, records.admission_count)
    rows = (
        [
            int(records.input_length[row]),
            *(ns(float(column[row])) for column in times),
            *(int(column[row]) for column in counts),
            int(STATUS[records.status[row]] == "completed"),
            int(records.worker[row]),
            int(records.prefill_worker[row]),
        ]
        for row in range(len(records))
    )
    return sorted(rows, key=lambda row: [-1 if value is None else value for value in row])


def differing(ours: list[list[Any]], theirs: list[list[Any]]) -> list[tuple[int, list[Any], list[Any]]]:
    return [(row, one, other) for row, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]


def engine_of_small(case: dict[str, Any]) -> EngineConfig:
    return EngineConfig(**case["engine"], reject_oversized=True)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in KV])
def test_small_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in FREE:
        monkeypatch.setattr(fleet, "DecodeScheduler", FreeDecodeScheduler)
    case = SMALL[name]
    trace = read_trace(DYNAMO / "trace.jsonl", block_size=128)
    records = replay(trace, engine_of_small(case), ClusterConfig(**case["cluster"]))
    assert not differing(figures(records), case["requests"])


class FreeDecodeScheduler(DecodeScheduler):
    """As Dynamo's decode workers, which compute a preempted prompt again in no time."""

    def __init__(self, engine: EngineConfig, requests: Requests, pool: SlotPool, clock: Clock, **options: Any) -> None:
        super().__init__(engine, requests, pool, clock, **options)
        self._clock = Clock(NoPrompts(), engine.capacity_tokens)


class NoPrompts(Polynomial):
    def prefill_ms(self, tokens: int) -> float:
        return 0.0


def row_of(request: list[Any]) -> list[Any]:
    arrival, inputs, _, outputs, admitted, first, last, _, reused, admissions, _, status, worker = request
    times = (arrival, admitted, first, last)
    return [inputs, *map(ns, times), outputs, reused, admissions, int(status == "completed"), worker, -1]


@needs_golden
@pytest.mark.parametrize("name", LARGE)
def test_real_trace(name: str) -> None:
    """The golden file is not in the order of the trace; equal requests that came at once differ in their times."""
    case = golden_cases()[name]
    concurrency = case["kw"].get("replay_concurrency")
    trace = read_trace(TRACES / f"{case['trace']}.jsonl", block_size=512)
    records = replay(
        trace,
        engine_of(case),
        ClusterConfig(workers=case["workers"], concurrency=concurrency),
    )
    ours = figures(records)
    for rows in (ours, theirs := [row_of(request) for request in case["per_request"]]):
        rows.sort(key=lambda row: [-1 if value is None else value for value in row])
        for row in rows:
            row[-2] = row[-2] if row[-3] else None
    assert len(theirs) == len(trace)
    assert not differing(ours, theirs)
