"""Our policies miss as often as libCacheSim's, request for request: on single keys of one size, as it knows no chains.

libCacheSim is the reference of the authors of SIEVE and S3-FIFO, in C.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from blocks.driving import misses
from kvist.blocks.policy import Arc, Fifo, Lfu, Lru, Policy, S3Fifo, Sieve

libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed")

CAPACITIES = [20, 64, 99, 250]
POLICIES: dict[str, Callable[[int], Policy[int]]] = {
    "ARC": Arc,
    "FIFO": lambda capacity: Fifo(),
    "LFU": lambda capacity: Lfu(),
    "LRU": lambda capacity: Lru(),
    "S3FIFO": S3Fifo,
    "Sieve": lambda capacity: Sieve(),
}


def mixed_trace(seed: int, length: int) -> list[int]:
    """Requests by a Zipf law, scans of keys that never come again, and loops a little longer than a small cache."""
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, 1001)]
    fresh = itertools.count(10_000)
    trace: list[int] = []
    while len(trace) < length:
        kind = rng.random()
        if kind < 0.6:
            trace += rng.choices(range(1, 1001), weights, k=rng.randrange(50, 400))
        elif kind < 0.8:
            trace += itertools.islice(fresh, rng.randrange(20, 200))
        else:
            start = rng.randrange(2000, 2100)
            trace += list(range(start, start + rng.randrange(10, 120))) * rng.randrange(2, 4)
    return trace[:length]


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_misses_are_the_same_ones(name: str, capacity: int, seed: int) -> None:
    trace = mixed_trace(seed, 10_000)
    reference = getattr(libcachesim, name)(capacity, hashpower=12)
    request = libcachesim.Request()
    request.obj_size = 1
    theirs = []
    for key in trace:
        request.obj_id = key
        theirs.append(not reference.get(request))
    ours = misses(POLICIES[name](capacity), capacity, trace)
    assert ours == theirs
