"""Least frequently used: the key that was used the fewest times since it came goes first. O(1) a key."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from heapq import heapify, heappop, heappush

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked

_SLACK = 64  # entries of the heap that need not be valid, besides as many as there are lists


class Lfu(Checked[K]):
    """Evicts what was used the fewest times; of those, what has been so the longest.

    Insert, touch and pin are one use each. A key that went and comes back was never used before. The same as
    libCacheSim's ``LFU``.

    A list for each number of uses that a key has: where there is none yet, it costs O(log of how many there are).
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[K, int] = {}
        self._lists: dict[int, OrderedDict[K, None]] = {}  # by uses, of the keys that are not pinned; none is empty
        self._order: list[int] = []  # a heap of all uses that have a list, and of some that have none

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        self._uses.update(dict.fromkeys(keys, 1))
        if not pinned:
            self._unpin(keys)

    def _touch(self, keys: Sequence[K]) -> None:
        unpinned = [key for key in keys if key not in self._pinned]
        self._take(unpinned)
        for key in keys:
            self._uses[key] += 1
        self._unpin(unpinned)

    def _pin(self, keys: Sequence[K]) -> None:
        self._take(keys)
        for key in keys:
            self._uses[key] += 1

    def _unpin(self, keys: Sequence[K]) -> None:
        uses, lists = self._uses, self._lists
        last, chosen = 0, OrderedDict[K, None]()
        for key in keys:
            if (n := uses[key]) != last:
                last = n
                if n in lists:
                    chosen = lists[n]
                else:
                    chosen = lists[n] = OrderedDict()
                    heappush(self._order, n)
            chosen[key] = None
        if len(self._order) > 2 * len(lists) + _SLACK:
            self._order = list(lists)
            heapify(self._order)

    def _remove(self, keys: Iterable[K]) -> None:
        gone = list(keys)
        self._take([key for key in gone if key in self._lists.get(self._uses[key], ())])
        for key in gone:
            del self._uses[key]

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        victims: list[K] = []
        kept = []
        while len(victims) < n:
            uses = heappop(self._order)
            if (keys := self._lists.get(uses)) is None:
                continue
            may_go = (key for key in keys if key not in staying) if staying else keys
            chosen = list(itertools.islice(may_go, n - len(victims)))
            for key in chosen:
                del keys[key], self._uses[key]
            victims += chosen
            if keys:
                kept.append(uses)
            else:
                del self._lists[uses]
        for uses in kept:
            heappush(self._order, uses)
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        return itertools.chain.from_iterable(self._lists[n] for n in sorted(self._lists))

    def _take(self, keys: Iterable[K]) -> None:
        """Keys that are not pinned leave their lists."""
        uses, lists = self._uses, self._lists
        for key in keys:
            n = uses[key]
            keys_of = lists[n]
            del keys_of[key]
            if not keys_of:
                del lists[n]
