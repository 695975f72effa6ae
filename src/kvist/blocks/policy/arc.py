"""ARC: two lists of recency, of keys used once and of keys used more often, and a balance that learns from misses.

N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003; names in brackets are its.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked


class Arc(Checked[K]):
    """Evicts the least recently used: of the keys used once (T1) if they exceed a target (p), else of the others (T2).

    A key that goes leaves a ghost (in B1 or B2). When it comes back, it
    counts as used more often, and moves the target towards the list that it went from. The paper moves it before it
    evicts: a pool that wants that calls `expect` before `evict`, and then this is the same as libCacheSim's ``ARC``.
    For a pool that does not, it moves one eviction later.

    Pinned keys count for their list; they are the most recently used of it when they are unpinned.

    O(1) a key, and O(1) for each protected key that an eviction meets.

    Args:
        capacity: of the pool, in blocks (c).
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._target = 0.0
        self._once: OrderedDict[K, None] = OrderedDict()  # not pinned; the least recently used first
        self._often: OrderedDict[K, None] = OrderedDict()
        self._repeated: set[K] = set()  # all keys that are held and used more than once, pinned or not
        self._once_ghosts: OrderedDict[K, None] = OrderedDict()
        self._often_ghosts: OrderedDict[K, None] = OrderedDict()
        self._returning: set[K] = set()  # keys with a ghost that were expected, and have moved the target
        self._tie_to_once = False  # one of them was used often

    def expect(self, keys: Sequence[K]) -> None:
        """See `Policy.expect`."""
        self._tie_to_once = False
        self._learn(reversed(keys))

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        self._learn(keys)
        self._tie_to_once = False
        for key in self._returning.intersection(keys):
            self._repeated.add(key)
            (self._once_ghosts if key in self._once_ghosts else self._often_ghosts).pop(key)
            self._returning.remove(key)
        if not pinned:
            self._unpin(keys)
        held = len(self._held)
        while self._once_ghosts and held - len(self._repeated) + len(self._once_ghosts) > self._capacity:
            self._returning.discard(self._once_ghosts.popitem(last=False)[0])
        while self._often_ghosts and held + len(self._once_ghosts) + len(self._often_ghosts) > 2 * self._capacity:
            self._returning.discard(self._often_ghosts.popitem(last=False)[0])

    def _learn(self, keys: Iterable[K]) -> None:
        """Move the target for keys that come back, of which the policy has ghosts; once, until they are inserted."""
        once, often = len(self._once_ghosts), len(self._often_ghosts)
        for key in keys:
            if key in self._often_ghosts:
                self._tie_to_once = True
            elif key not in self._once_ghosts:
                continue
            if key in self._returning:
                continue
            self._returning.add(key)
            if key in self._once_ghosts:
                self._target = min(self._target + max(often / once, 1), self._capacity)
            else:
                self._target = max(self._target - max(once / often, 1), 0)

    def _touch(self, keys: Sequence[K]) -> None:
        self._repeated.update(keys)
        for key in keys:
            if key not in self._pinned:
                self._once.pop(key, None)
                self._often[key] = None
                self._often.move_to_end(key)

    def _pin(self, keys: Sequence[K]) -> None:
        self._repeated.update(keys)
        for key in keys:
            self._once.pop(key, None)
            self._often.pop(key, None)

    def _unpin(self, keys: Sequence[K]) -> None:
        for key in keys:
            (self._often if key in self._repeated else self._once)[key] = None

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._once.pop(key, None)
            self._often.pop(key, None)
            self._repeated.discard(key)

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        once = (key for key in self._once if key not in staying)
        often = (key for key in self._often if key not in staying)
        n_once, n_often = len(self._held) - len(self._repeated), len(self._repeated)
        victims: list[K] = []
        for _ in range(n):
            too_many = n_once > self._target or (n_once == self._target and self._tie_to_once)
            from_once = (n_once > 0 and too_many) or n_often == 0
            key = next(itertools.chain(once, often) if from_once else itertools.chain(often, once))
            victims.append(key)
            if key in self._repeated:
                n_often -= 1
                self._often_ghosts[key] = None
            else:
                n_once -= 1
                self._once_ghosts[key] = None
        self._remove(victims)
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`. Costs O(n)."""
        twin = copy.copy(self)
        twin._once, twin._often, twin._repeated = self._once.copy(), self._often.copy(), self._repeated.copy()
        twin._once_ghosts, twin._often_ghosts = OrderedDict(), OrderedDict()
        return iter(twin._evict(len(self._held) - len(self._pinned), frozenset()))
