"""Host memory beside an engine: lanes, what may be evicted, who waits for whom."""

from __future__ import annotations

import numpy as np

from kvist.sim.config import HostOffload
from kvist.sim.host import HostMemory, Loaded, Lookup, SourcePool
from kvist.sim.pool import Slots

MB = 1_000_000  # bytes of a block: at 1 GB/s one takes 1 ms
MS = 1_000_000


def host_of(blocks: int, slots: int = 16, **config: float) -> tuple[HostMemory, SourcePool]:
    pool = SourcePool(slots, 1000)
    return HostMemory(HostOffload(num_blocks=blocks, store_gbps=1.0, load_gbps=2.0, **config), MB, pool), pool


def computed(pool: SourcePool, contents: list[int]) -> Slots:
    """Slots that a request holds, with these contents."""
    slots = pool.acquire(np.empty(0, dtype=np.int32), len(contents))
    assert slots is not None
    return pool.cache(slots, np.array(contents, dtype=np.int64))


def stored(host: HostMemory, pool: SourcePool, request: int, prompt: list[int], now: int) -> int:
    """Have a prompt copied; returns when it is."""
    slots = computed(pool, prompt)
    host.store(request, prompt, slots, len(prompt))
    host.end_pass(now)
    pool.release(slots[::-1])
    end = max(host._tails.values())
    host.advance(round(end))
    return round(end)


def test_stores_follow_one_another_and_begin_with_the_end_of_the_pass() -> None:
    host, pool = host_of(10, latency_ms=0.5)
    first, second = computed(pool, [1, 2]), computed(pool, [3])
    host.store(0, [1, 2], first, 2)
    host.store(1, [3], second, 1)
    assert host.deadline() is None
    host.end_pass(7 * MS)
    assert host.deadline() == 9_500_000
    assert host.lookup(5, [1, 2, 9], 0) == (Lookup.LATER, [1, 2])
    host.advance(9_500_000)
    assert host.deadline() == 10_500_000
    assert host.lookup(5, [1, 2, 9], 0) == (Lookup.HIT, [1, 2])
    assert host.lookup(5, [1, 2, 9], 1) == (Lookup.HIT, [2])
    assert host.lookup(5, [9], 0) == (Lookup.MISS, [])


def test_a_slot_that_is_read_makes_the_next_writer_wait() -> None:
    host, pool = host_of(10, slots=2)
    slots = computed(pool, [1, 2])
    host.store(0, [1, 2], slots, 2)
    host.end_pass(0)
    pool.release(slots)
    assert pool.fence == 0
    again = computed(pool, [5])
    assert pool.fence == 2 * MS
    host.store(1, [5], again, 1)
    assert host.has_unstored(1, 1), "the slot is still read for another block"
    host.advance(2 * MS)
    host.store(1, [5], again, 1)
    assert not host.has_unstored(1, 1)


def test_the_least_recently_used_blocks_go_and_the_prompts_own_stay() -> None:
    host, pool = host_of(4)
    now = stored(host, pool, 0, [1, 2], 0)
    now = stored(host, pool, 1, [3, 4], now)
    assert host.lookup(2, [1, 2], 0)[0] is Lookup.HIT, "which touches them, the head last"
    now = stored(host, pool, 3, [7], now)
    assert host.lookup(4, [3], 0)[0] is Lookup.MISS
    stored(host, pool, 5, [4, 8, 9], now)
    assert sorted(host._idle) == [4, 7, 8, 9]


def test_a_fixed_order_says_which_of_those_that_came_at_once_goes_first() -> None:
    pool = SourcePool(16, 100)
    host = HostMemory(HostOffload(num_blocks=3), MB, pool, order=[0, 9, 1, 5, *range(10, 106)])
    stored(host, pool, 0, [1, 2, 3], 0)
    assert list(host._idle) == [2, 3, 1]


def test_a_prompt_larger_than_the_host_is_not_stored() -> None:
    host, pool = host_of(2)
    host.store(0, [1, 2, 3], computed(pool, [1, 2, 3]), 3)
    assert not host.is_moving
    assert host.has_unstored(0, 3)


def test_a_load_waits_for_its_slots_and_holds_what_it_reads() -> None:
    host, pool = host_of(2, slots=4)
    now = stored(host, pool, 0, [1, 2], 0)
    computed(pool, [5, 6])
    slots = computed(pool, [])
    fresh = pool.acquire(slots, 2)
    assert fresh is not None
    host.load(7, Loaded(fresh, 0, [1, 2], np.array([1, 2]), 0), now)
    host.put_aside(7)
    assert host.deadline() == now + MS
    assert host.ready() == []
    assert host.lookup(8, [1], 0)[0] is Lookup.LATER
    host.advance(now + MS)
    assert host.loads[7].has_come
    assert host.ready() == [7]
    assert len(pool.find(np.array([1, 2]))) == 2
    host.admit(7, 2)
    assert not host.has_unstored(7, 2)
    assert host.queue == []


def test_what_comes_for_a_client_that_has_gone_is_kept() -> None:
    host, pool = host_of(2, slots=4)
    now = stored(host, pool, 0, [1, 2], 0)
    fresh = pool.acquire(np.empty(0, dtype=np.int32), 2)
    assert fresh is not None
    host.load(7, Loaded(fresh, 0, [1, 2], np.array([1, 2]), 0), now)
    host.forget(7)
    assert pool.num_used == 2
    host.advance(now + MS)
    assert pool.num_used == 0
    assert len(pool.find(np.array([1, 2]))) == 2
    assert not host.loads
