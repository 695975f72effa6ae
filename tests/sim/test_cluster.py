"""When requests come, what a replay reports of its way, and that it ends with all of them or says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvist.errors import EngineError, InvalidInput
from kvist.sim.cluster import Arrivals, RoundRobin, run
from kvist.sim.config import ClusterConfig, EngineConfig, HostOffload, SglangOptions
from kvist.sim.replay import replay
from kvist.sim.requests import Requests
from kvist.sim.scheduler import Ended
from kvist.sim.timing import Fixed
from kvist.sim.trace import Trace

Row = tuple[float | None, int, int, list[int]] | tuple[float | None, int, int, list[int], int, float]
SIZE = 4


def trace_of(*rows: Row, block_size: int = SIZE) -> Trace:
    """Of each request: arrival in ms, prompt tokens, output tokens, blocks; then whom it follows, after how many ms."""
    blocks = [row[3] for row in rows]
    return Trace(
        "made",
        block_size,
        np.array([np.nan if row[0] is None else row[0] for row in rows]),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=np.int64),
        np.cumsum([0, *map(len, blocks)]),
        np.array([content for row in blocks for content in row], dtype=np.int64),
        np.array([row[4] if len(row) == 6 else -1 for row in rows], dtype=np.int64),
        np.array([row[5] if len(row) == 6 else 0.0 for row in rows]),
        tuple(map(str, range(len(rows)))),
    )


def small(**others: Any) -> EngineConfig:
    return EngineConfig(**{"block_size": SIZE, "num_blocks": 50, "timing": Fixed(3.0, 1.0), **others})


# When requests come.


def came(arrivals: Arrivals, ends: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """When requests come, after some have ended."""
    found = []
    for request, now in (*ends, (-1, 0)):
        while (at := arrivals.next) is not None:
            found.append((at, arrivals.pop()))
        if request >= 0:
            arrivals.over(request, now)
    return found


def test_followers_share_the_seat_of_the_one_before_them() -> None:
    #         0 <- 1, 2 (which comes first), and 3 is another session's
    arrivals = Arrivals([None] * 4, [-1, 0, 0, -1], [0, 9, 5, 0], 1)
    assert came(arrivals, [(0, 100), (2, 200), (1, 300)]) == [(0, 0), (105, 2), (200, 1), (300, 3)]


def test_a_session_keeps_its_seat() -> None:
    arrivals = Arrivals([None] * 3, [-1, 0, -1], [0, 50, 0], 1)
    assert came(arrivals, [(0, 100), (1, 200)]) == [(0, 0), (150, 1), (200, 2)]


def test_followers_have_the_seats_that_are_free() -> None:
    arrivals = Arrivals([None] * 4, [-1, 0, 0, 0], [0, 7, 7, 7], 3)
    assert came(arrivals, [(0, 100)]) == [(0, 0), (107, 1), (107, 2), (107, 3)]
    arrivals = Arrivals([3, None, None], [-1, 0, 0], [0, 7, 7], None)
    assert came(arrivals, [(0, 100)]) == [(3, 0), (107, 1), (107, 2)]


def test_a_fork_does_not_exceed_the_concurrency() -> None:
    forks = trace_of((0, 4, 10, [1]), *((None, 8, 10, [1, 2 + i], 0, 0.0) for i in range(3)))
    records = replay(forks, small(), ClusterConfig(concurrency=1))
    assert (records.arrival_ms[1:] >= records.last_token_ms[:-1]).all()


# The way of a replay, and its end.


class Stuck:
    """A worker that takes requests and does nothing."""

    wake: int | None = None
    is_busy = False

    def submit(self, request: int, now: int) -> None: ...

    def step(self) -> Ended:
        return Ended()

    def begin(self, now: int) -> None: ...

    def settle(self, now: int) -> None: ...


def test_what_is_not_served_is_an_error() -> None:
    requests = Requests()
    for _ in range(2):
        requests.add(4, 1, np.arange(1), 1)
    with pytest.raises(EngineError, match=r"worker 0 can not go on: request 0 .* as 1 others"):
        run(requests, [Stuck()], RoundRobin(1), Arrivals([0, 0], [-1, -1], [0, 0], None))


def test_progress_counts_those_that_are_turned_away() -> None:
    seen: list[int] = []
    trace = trace_of((0, 8, 2, [1, 2]), (0, 400, 2, list(range(100))))
    assert replay(trace, small(reject_oversized=True), progress=seen.append).status.tolist() == [0, 1]
    assert sum(seen) == 2


EMPTY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vllm": ({}, {}),
    "lru": ({"policy": "lru"}, {}),
    "sglang": ({"scheduling": "sglang"}, {}),
    "host": ({"kv_bytes_per_token": 1, "host_offload": HostOffload(num_blocks=3)}, {}),
    "kv": ({}, {"router": "kv", "workers": 2}),
    "prefill": ({}, {"prefill_workers": 1}),
    "concurrency": ({}, {"concurrency": 2}),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_trace_is_served(name: str) -> None:
    engine, cluster = EMPTY[name]
    records = replay(trace_of((0, 8, 2, [1, 2])).head(0), small(**engine), ClusterConfig(**cluster))
    assert (len(records), records.duration_ms) == (0, 0)


def test_moves_of_one_worker_may_come_at_one_time() -> None:
    trace = trace_of(*((i // 4, 8, 20, [i, i + 100]) for i in range(16)))
    engine = small(num_blocks=10, timing=Fixed(0.0, 0.0))
    records = replay(trace, engine, ClusterConfig(router="kv", workers=2))
    assert (records.output_length == 20).all()


def test_loaded_slots_do_not_keep_the_head_of_the_queue_out_for_ever() -> None:
    """The head needs slots that another, whose blocks have come, holds behind it; nothing else runs."""
    trace = trace_of(
        (10.5, 31, 4, [0, 1, 2, 3, 4, 1000, 1001, 1002]),
        (10.5, 16, 0, [100, 101, 102, 103]),
        (None, 8, 0, [100, 101], 0, 0.0),
        (10.5, 33, 0, [200, 201, 202, 203, 16000, 16001, 16002, 16003, 16004]),
        (None, 33, 0, [100, 101, 102, 103, 104, 105, 18000, 18001, 18002], 3, 3.0),
        (100, 27, 23, [4000, 4001, 4002, 4003, 4004, 4005, 4006]),
        (None, 33, 0, [200, 201, 202, 203, 204, 205, 8000, 8001, 8002], 5, 3.0),
    )
    engine = EngineConfig(
        num_blocks=9,
        block_size=8,
        max_num_seqs=2,
        max_num_batched_tokens=40,
        timing=Fixed(3.0, 1.0),
        kv_bytes_per_token=100_000,
        host_offload=HostOffload(num_blocks=30, load_gbps=0.001, latency_ms=1.5),
    )
    records = replay(trace, engine)
    assert records.output_length.tolist() == trace.output_tokens.tolist()
    assert not np.isnan(records.first_admit_ms).any()


# What SGLang's scheduling can not serve.

LONG = trace_of((0, 120, 4, list(range(30))), (0, 8, 2, [90, 91]))


def test_what_the_pool_of_sglang_can_not_hold_is_refused_or_turned_away() -> None:
    with pytest.raises(InvalidInput, match=r"num_blocks must hold more than .* 127 tokens in blocks of 4 .row 0.* 31"):
        replay(LONG, small(scheduling="sglang", num_blocks=31))
    for blocks, status in ((31, [1, 0]), (32, [0, 0])):
        engine = small(scheduling="sglang", num_blocks=blocks, reject_oversized=True)
        assert replay(LONG, engine).status.tolist() == status


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunked_prefill_size": 3}, "chunked_prefill_size must be a whole number of blocks of 4 .* up to 123; got 3"),
        ({"chunked_prefill_size": 18}, "chunked_prefill_size must be a whole number of blocks of 4"),
        ({"max_prefill_tokens": 64}, "max_prefill_tokens must hold 124 tokens, .*; got 64"),
    ],
)
def test_parts_of_prompts_that_sglang_never_admits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        replay(LONG, small(scheduling="sglang", sglang=SglangOptions(**options)))
