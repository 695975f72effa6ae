"""Belady's rule: the key that is needed the farthest ahead goes first. O(log n) a key.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5 (2), 1966. No
policy has fewer misses where each miss is inserted, one key at a time: it is the bound for all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from heapq import heapify, heappop, heappush

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked

_SLACK = 64  # entries of the heap that need not be valid, besides as many as there are keys


class Belady(Checked[K]):
    """Evicts what the future asks for last, or never; of those, what may go since the longest.

    Each use of a key, by insert, touch or pin, takes up the next request for it. A key that is used more often than
    the future asks for it is never needed again.

    Args:
        future: every request to come, in order. O(len(future)) of time and memory, here.
    """

    def __init__(self, future: Sequence[K]) -> None:
        super().__init__()
        self._requests: dict[K, list[int]] = {}  # where the requests for each key are, the next one at the end
        for place in range(len(future) - 1, -1, -1):
            self._requests.setdefault(future[place], []).append(place)
        self._clock = 0
        self._ranks: dict[K, tuple[float, int]] = {}  # of the keys that are not pinned; no two are equal
        self._heap: list[tuple[tuple[float, int], K]] = []  # all of these, and ranks that keys had before

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        self._use(keys)
        if not pinned:
            self._unpin(keys)

    def _touch(self, keys: Sequence[K]) -> None:
        self._use(keys)
        self._unpin([key for key in keys if key not in self._pinned])

    def _pin(self, keys: Sequence[K]) -> None:
        self._use(keys)
        self._remove(keys)

    def _use(self, keys: Sequence[K]) -> None:
        for key in keys:
            if requests := self._requests.get(key):
                requests.pop()

    def _unpin(self, keys: Sequence[K]) -> None:
        for key in keys:
            requests = self._requests.get(key)
            rank = -requests[-1] if requests else -math.inf, self._clock
            self._clock += 1
            self._ranks[key] = rank
            heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + _SLACK:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapify(self._heap)

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._ranks.pop(key, None)

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        victims: list[K] = []
        kept = []
        while len(victims) < n:
            entry = heappop(self._heap)
            rank, key = entry
            if self._ranks.get(key) != rank:
                continue
            if key in staying:
                kept.append(entry)
                continue
            del self._ranks[key]
            victims.append(key)
        for entry in kept:
            heappush(self._heap, entry)
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        return iter(sorted(self._ranks, key=self._ranks.__getitem__))
