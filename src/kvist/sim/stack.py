"""What single passes over the chains of a trace tell: LRU's hits at every capacity, and the most that there can be.

Cache only: requests come one after the other, and there is no time. `kvist.sim.curve` says what a hit is.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappush, heappushpop

import numpy as np

from kvist.sim.chains import Chains
from kvist.sim.trace import Ints


def lru_hits(chains: Chains, capacities: Sequence[int]) -> list[int]:
    """Hits of LRU in a cache of each capacity, from one pass (R. L. Mattson et al., "Evaluation techniques for storage
    hierarchies", IBM Systems Journal 9 (2), 1970).

    LRU holds what is on top of the stack of all blocks by their last use, as much as there is room for. A request puts
    its chain on top, the root first, however much of it was there: what had no room, lies below. So a block is a hit
    iff its depth when its request comes is less than the capacity, and as a block was used whenever those behind it
    were, the hits lead the chain.

    In the stack lie chains, one below the other, each without the part that later ones share with it: its beginning.
    A request takes such parts whole, from one chain after the other. O(log n) for each of these, of n requests.
    """
    owner = np.repeat(np.arange(len(chains.offsets) - 1), np.diff(chains.offsets))
    previous = _previous(chains)
    user = np.where(previous < 0, -1, owner[previous])  # who used it last
    starts = np.flatnonzero((np.diff(owner, prepend=-1) != 0) | (np.diff(user, prepend=-1) != 0))
    lengths = np.diff(starts, append=len(owner))
    stack, total = _Fenwick(len(chains.offsets) - 1), 0
    steps = np.zeros(chains.count + 1, np.int64)  # how many more blocks were hit at a depth than at the one before
    for request, before, length in zip(owner[starts].tolist(), user[starts].tolist(), lengths.tolist(), strict=True):
        if before < 0:
            total += length
        else:
            depth = total - stack.sum(before + 1)
            steps[depth] += 1
            steps[depth + length] -= 1
            stack.add(before, -length)
        stack.add(request, length)
    hits = np.concatenate(([0], np.cumsum(np.cumsum(steps))))  # in a cache of so many blocks
    return [int(hits[min(capacity, chains.count)]) for capacity in capacities]


def most_hits(chains: Chains, capacity: int) -> int:
    """The most hits that any policy can have: those of L. A. Belady's MIN, if a block need not be kept at all.

    All blocks of all requests are taken for one stream. A block that is hit was held from its use before until then:
    hits are intervals of the stream, of which no more than the capacity overlap anywhere. That holds for every policy
    of a pool that inserts what is asked for, whatever it pins: during a request it holds the blocks of its chain that
    it found or that it keeps, and those that it keeps for others. The largest such set of intervals is found by
    dropping, whenever there are too many, the one that ends last (M. C. Carlisle, E. L. Lloyd, "On the k-coloring of
    intervals", Discrete Applied Mathematics 59 (3), 1995). It need not lead chains: no policy has to reach it.

    O(log n) a use.
    """
    previous = _previous(chains)
    following = np.full(len(previous), -1)
    again = np.flatnonzero(previous >= 0)
    following[previous[again]] = again
    places = np.flatnonzero((previous >= 0) | (following >= 0))
    uses = zip(places.tolist(), (previous[places] >= 0).tolist(), following[places].tolist(), strict=True)
    is_dropped = bytearray(len(previous))  # the interval that ends there
    ends: list[int] = []  # a heap of the intervals under way, the last to end first; and of some that have ended
    held = hits = 0
    for place, is_again, end in uses:
        if is_again and not is_dropped[place]:
            hits += 1
            held -= 1
        if end < 0:
            continue
        if held < capacity:
            heappush(ends, -end)
            held += 1
        else:  # what has ended ends before this one, so that it is not what is dropped
            is_dropped[-heappushpop(ends, -end)] = 1
    return hits


def _previous(chains: Chains) -> Ints:
    """Of each place in the ids: the last one before it with the same id; -1: none."""
    order = np.argsort(chains.ids, kind="stable")
    again = np.flatnonzero(np.diff(chains.ids[order]) == 0) + 1
    previous = np.full(len(order), -1)
    previous[order[again]] = order[again - 1]
    return previous


class _Fenwick:
    """Sums of the first so many of some numbers, all 0 in the beginning. O(log n) each."""

    def __init__(self, size: int) -> None:
        self._sums = [0] * (size + 1)

    def add(self, index: int, amount: int) -> None:
        """Change one number."""
        sums, place = self._sums, index + 1
        while place < len(sums):
            sums[place] += amount
            place += place & -place

    def sum(self, count: int) -> int:
        """Of the first ``count`` numbers."""
        sums, total = self._sums, 0
        while count:
            total += sums[count]
            count &= count - 1
        return total
