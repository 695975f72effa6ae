"""The scheduler's jumps against an engine that goes pass by pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.sim.cluster import Arrivals, RoundRobin, run
from kvist.sim.config import EngineConfig
from kvist.sim.pool import SlotPool
from kvist.sim.requests import NEVER, Requests
from kvist.sim.scheduler import Scheduler
from kvist.sim.timing import Clock, Fixed, Linear, Polynomial

from .slow_engine import Request, SlowEngine

MS = 1_000_000
LONGEST = 40  # prompt, in tokens
Rows = list[tuple[int, int, int, int, int]]
timings = st.sampled_from(
    [
        Polynomial(),
        Fixed(3.0, 1.0),
        Linear((0.0, 0.01, 1.5), (0.1, 0.002, 1.0), -0.5),
        Linear((0.0, 0.1, 0.0), (0.0, 0.0, 0.25)),
    ]
)


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    seats = draw(st.integers(1, 6))
    is_chunked = draw(st.booleans())
    return EngineConfig(
        num_blocks=draw(st.integers(3, 24)),
        block_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
        max_num_seqs=seats,
        max_num_batched_tokens=draw(st.integers(max(seats, 2) if is_chunked else LONGEST, LONGEST)),
        max_model_len=draw(st.none() | st.integers(4, 60)),
        prefix_caching=draw(st.booleans()),
        chunked_prefill=is_chunked,
        scheduling=draw(st.sampled_from(["vllm", "vllm", "trtllm"])),
        preemption=draw(st.sampled_from(["lifo", "fifo"])) if is_chunked else "lifo",
        timing=draw(timings),
        speedup=draw(st.sampled_from([1.0, 1.7])),
        decode_speedup=draw(st.sampled_from([1.0, 2.3])),
        startup_ms=draw(st.sampled_from([0.0, 0.0, 7.5])),
    )


@st.composite
def workloads(draw: st.DrawFn) -> Rows:
    """Of each request: arrival in ns, prompt tokens, output tokens, family, tokens that it shares with its family."""
    one = st.tuples(
        st.one_of(st.just(0), st.integers(0, 40).map(lambda ms: ms * MS), st.integers(0, 60 * MS)),
        st.integers(1, LONGEST),
        st.integers(0, 25),
        st.integers(0, 2),
        st.integers(0, 40),
    )
    return sorted(draw(st.lists(one, min_size=1, max_size=14)))


def contents_of(rows: Rows, size: int) -> list[list[int]]:
    """Contents of all blocks of each request, numbered from 0."""
    numbers: dict[object, int] = {}
    return [
        [
            numbers.setdefault(
                (family, block) if (block + 1) * size <= min(shared, prompt) else (row, block, "own"), len(numbers)
            )
            for block in range((prompt + output) // size + 1)
        ]
        for row, (_, prompt, output, family, shared) in enumerate(rows)
    ]


def columns(rows: Rows, engine: EngineConfig) -> Requests:
    requests = Requests()
    own = sum(len(blocks) for blocks in contents_of(rows, engine.block_size))
    for (_, prompt, output, _, _), blocks in zip(rows, contents_of(rows, engine.block_size), strict=True):
        requests.add(prompt, output, np.array(blocks[: prompt // engine.block_size], dtype=np.int64), own)
        own += len(blocks)
    return requests


def clock_of(engine: EngineConfig) -> Clock:
    return Clock(engine.timing, engine.capacity_tokens, speedup=engine.speedup, decode_speedup=engine.decode_speedup)


def served(rows: Rows, engine: EngineConfig, jump: int = 4096) -> tuple[Requests, Scheduler, int]:
    requests = columns(rows, engine)
    contents = 2 * sum(len(blocks) for blocks in contents_of(rows, engine.block_size))
    worker = Scheduler(engine, requests, SlotPool(engine.num_blocks, contents), clock_of(engine), longest_jump=jump)
    arrivals = Arrivals([row[0] for row in rows], [-1] * len(rows), [0] * len(rows), None)
    return requests, worker, run(requests, [worker], RoundRobin(1), arrivals)


def gaps_of(worker: Scheduler) -> Counter[int]:
    gaps: Counter[int] = Counter()
    for times, batch in worker.gaps:
        for time in times.tolist():
            gaps[time] += batch
    return +gaps


@settings(max_examples=200)
@given(engines(), workloads())
def test_equals_the_engine_that_goes_pass_by_pass(engine: EngineConfig, rows: Rows) -> None:
    slow = SlowEngine(engine, clock_of(engine))
    expected = [
        Request(prompt, output, blocks, arrival)
        for (arrival, prompt, output, _, _), blocks in zip(rows, contents_of(rows, engine.block_size), strict=True)
    ]
    end = slow.serve(expected)
    requests, worker, ours = served(rows, engine)
    for row, want in enumerate(expected):
        times = [NEVER if at >= len(want.tokens) else want.tokens[at] for at in (0, 1)]
        assert requests.rejected[row] == want.rejected
        assert requests.admitted[row] == (NEVER if want.admitted is None else want.admitted)
        assert requests.generated[row] == len(want.tokens)
        assert [requests.first_token[row], requests.second_token[row]] == times
        assert requests.last_token[row] == (want.tokens[-1] if want.tokens else NEVER)
        assert requests.reused[row] == want.reused
        assert requests.first_reused[row] == want.first_reused
        assert requests.admissions[row] == want.admissions
    assert ours == end
    assert gaps_of(worker) == slow.gaps
    assert worker.passes == slow.passes
    assert worker.pool.num_evicted == slow.evicted
    assert worker.is_idle
    assert worker.pool.num_used == 0


@settings(max_examples=100)
@given(engines(), workloads(), st.integers(1, 9))
def test_how_long_a_jump_may_be_shows_nowhere(engine: EngineConfig, rows: Rows, jump: int) -> None:
    requests, worker, end = served(rows, engine)
    again, short, other = served(rows, engine, jump)
    again.blocks = requests.blocks
    assert (again, other) == (requests, end)
    assert (gaps_of(short), short.passes, short.busy, short.prefilled) == (
        gaps_of(worker),
        worker.passes,
        worker.busy,
        worker.prefilled,
    )


@settings(max_examples=100)
@given(engines(), workloads(), st.data())
def test_an_abort_leaves_nothing_held(engine: EngineConfig, rows: Rows, data: st.DataObject) -> None:
    engine = replace(engine, startup_ms=0.0)
    requests = columns(rows, engine)
    contents = 2 * sum(len(blocks) for blocks in contents_of(rows, engine.block_size))
    jump = data.draw(st.sampled_from([1, 4096]))
    worker = Scheduler(engine, requests, SlotPool(engine.num_blocks, contents), clock_of(engine), longest_jump=jump)
    now = 0
    for row in range(len(rows)):
        worker.submit(row, now)
        if not worker.is_busy:
            worker.begin(now)
    dropped = set()
    while worker.wake is not None:
        if data.draw(st.booleans()):
            row = data.draw(st.integers(0, len(rows) - 1))
            now = data.draw(st.integers(now, worker.wake))
            before = requests.generated[row], requests.last_token[row]
            gone = row in worker.running or row in worker.waiting
            worker.abort(row, now)
            assert row not in worker.running
            assert row not in worker.waiting
            if gone:
                dropped.add(row)
            else:
                assert (requests.generated[row], requests.last_token[row]) == before
        now = worker.wake
        ended = worker.step()
        assert not dropped & {*ended.first, *ended.finished, *ended.rejected}
        worker.begin(now)
    assert worker.is_idle
    assert worker.pool.num_used == 0


def test_a_request_that_comes_in_a_jump_is_admitted_at_the_end_of_the_pass() -> None:
    engine = EngineConfig(num_blocks=100, block_size=4, timing=Fixed(10.0, 3.0))
    rows = [(0, 4, 50, 0, 0), (24 * MS, 4, 1, 1, 0)]
    requests, _, _ = served(rows, engine)
    assert requests.admitted[1] == 25 * MS
    assert requests.first_token[1] == (25 + 10 + 3) * MS


@pytest.mark.parametrize("preemption", ["lifo", "fifo"])
def test_who_gives_way(preemption: str) -> None:
    engine = EngineConfig(
        num_blocks=4, block_size=4, preemption=preemption, timing=Fixed(10.0, 1.0), prefix_caching=False
    )
    requests, _, _ = served([(0, 7, 6, 0, 0), (0, 7, 6, 1, 0)], engine)
    assert requests.admissions == ([1, 2] if preemption == "lifo" else [2, 1])
