"""First in, first out: the key that was inserted first goes first. O(1) a key."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from heapq import heapify, heappop, heappush

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked

_SLACK = 64  # entries of the heap that need not be valid, besides as many as there are keys


class Fifo(Checked[K]):
    """Evicts what was inserted first, whatever was used since. A key that was pinned has the place it had before.

    A key that went and comes back is new. The same as libCacheSim's ``FIFO``.

    A key that had to stay when an eviction met it leaves the queue, so that it is met once. It costs O(log n) each
    time that it may go again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._queue: OrderedDict[K, None] = OrderedDict()  # the oldest first
        self._met: dict[K, int] = {}  # keys that left the queue at its head, numbered in the order in which they did
        self._numbers = 0
        self._freed: list[tuple[int, K]] = []  # a heap of the met keys that may go, and of entries that are not valid

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        self._queue.update(dict.fromkeys(keys))

    def _touch(self, keys: Sequence[K]) -> None:
        pass

    def _pin(self, keys: Sequence[K]) -> None:
        pass

    def _unpin(self, keys: Sequence[K]) -> None:
        if self._met:
            self._free(self._met.keys() & keys)

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            if self._met.pop(key, None) is None:
                del self._queue[key]

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        met, pinned, queue = self._met, self._pinned, self._queue
        victims: list[K] = []
        kept: list[K] = []
        while self._freed and len(victims) < n:
            number, key = heappop(self._freed)
            if met.get(key) != number or key in pinned:
                continue
            if key in staying:
                kept.append(key)
                continue
            victims.append(key)
            del met[key]
        oldest = list(itertools.islice(queue, n - len(victims)))
        if not staying and pinned.isdisjoint(oldest):
            for key in oldest:
                del queue[key]
            return victims + oldest if victims else oldest
        while len(victims) < n:
            key, _ = queue.popitem(last=False)
            if key not in pinned and key not in staying:
                victims.append(key)
                continue
            met[key] = self._numbers
            self._numbers += 1
            if key in staying:
                kept.append(key)
        self._free(kept)
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        return (key for key in itertools.chain(self._met, self._queue) if key not in self._pinned)

    def _free(self, keys: Iterable[K]) -> None:
        """Met keys that may go."""
        for key in keys:
            heappush(self._freed, (self._met[key], key))
        if len(self._freed) > 2 * len(self._met) + _SLACK:
            self._freed = [(number, key) for key, number in self._met.items() if key not in self._pinned]
            heapify(self._freed)
