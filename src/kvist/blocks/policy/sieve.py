"""SIEVE: a queue in which a hand, going from the oldest to the newest, evicts what was not used since it last came by.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction
Algorithm for Web Caches", NSDI 2024.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked


class Sieve(Checked[K]):
    """Evicts what the hand meets first that was not used. What must stay and is met counts as used.

    Keys keep their places in the queue. The hand divides it in two queues of which each is the shorter to write down:
    those that it has yet to meet, new keys at their end, and those that it has met in this round.

    O(1) a key, on average, and O(1) for each key that must stay and is met: all of them, at worst, in each call. The
    same as libCacheSim's ``Sieve``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ahead: OrderedDict[K, None] = OrderedDict()  # the hand is at the first; empty only if both are
        self._passed: OrderedDict[K, None] = OrderedDict()
        self._used: set[K] = set()

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        self._ahead.update(dict.fromkeys(keys))

    def _touch(self, keys: Sequence[K]) -> None:
        self._used.update(keys)

    def _pin(self, keys: Sequence[K]) -> None:
        self._used.update(keys)

    def _unpin(self, keys: Sequence[K]) -> None:
        pass

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            del (self._ahead if key in self._ahead else self._passed)[key]
            self._used.discard(key)
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        used, pinned, ahead, passed = self._used, self._pinned, self._ahead, self._passed
        nearest = list(itertools.islice(ahead, n))
        if len(nearest) < len(ahead) and not staying and used.isdisjoint(nearest) and pinned.isdisjoint(nearest):
            for key in nearest:
                del ahead[key]
            return nearest
        victims: list[K] = []
        while len(victims) < n:
            key, _ = ahead.popitem(last=False)
            if key in used or key in pinned or key in staying:
                used.discard(key)
                passed[key] = None
            else:
                victims.append(key)
            if not ahead:
                ahead, passed = passed, ahead
        self._ahead, self._passed = ahead, passed
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`. Costs O(n)."""
        twin = copy.copy(self)
        twin._ahead, twin._passed, twin._used = self._ahead.copy(), self._passed.copy(), self._used.copy()
        return iter(twin._evict(len(self._held) - len(self._pinned), frozenset()))
