"""ARC: two lists of recency, of keys used once and of keys used more often, and a balance that learns from misses.

N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003; names in brackets are its.
"""

from __future__ import annotations

import copy
import itertools
import math
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
        self._learn(keys[::-1])

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
        once, often = self._once_ghosts, self._often_ghosts
        self._drop_ghosts(once, held - len(self._repeated) + len(once) - self._capacity)
        self._drop_ghosts(often, held + len(once) + len(often) - 2 * self._capacity)

    def _drop_ghosts(self, ghosts: OrderedDict[K, None], n: int) -> None:
        """Forget the oldest ``n``, if there are as many."""
        if n > 0:
            oldest = list(itertools.islice(ghosts, n))
            for key in oldest:
                del ghosts[key]
            self._returning.difference_update(oldest)

    def _learn(self, keys: Sequence[K]) -> None:
        """Move the target for keys that come back, of which the policy has ghosts; once, until they are inserted."""
        if self._once_ghosts.keys().isdisjoint(keys) and self._often_ghosts.keys().isdisjoint(keys):
            return
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
        repeated, once, often = self._repeated, self._once, self._often
        if repeated.isdisjoint(keys):
            once.update(dict.fromkeys(keys))
            return
        for key in keys:
            (often if key in repeated else once)[key] = None

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._once.pop(key, None)
            self._often.pop(key, None)
            self._repeated.discard(key)

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        once = (key for key in self._once if key not in staying) if staying else iter(self._once)
        often = (key for key in self._often if key not in staying) if staying else iter(self._often)
        n_once, n_often = len(self._held) - len(self._repeated), len(self._repeated)
        target, tie, repeated = self._target, self._tie_to_once, self._repeated
        victims: list[K] = []
        while (short := n - len(victims)) > 0:
            if n_often == 0 or n_once > target:  # its turn, until n_once is no more than the target
                turn, times = once, short if n_often == 0 else math.ceil(n_once - target)
            elif tie and n_once == target > 0:
                turn, times = once, 1
            else:
                turn, times = often, n_often
            # what is left of a list may all have to stay
            chosen = list(itertools.islice(turn, min(times, short))) or [next(itertools.chain(once, often))]
            victims += chosen
            repeatedly = len(repeated.intersection(chosen))
            n_often -= repeatedly
            n_once -= len(chosen) - repeatedly
        gone_often = repeated.intersection(victims)
        gone_once = [key for key in victims if key not in gone_often] if gone_often else victims
        for key in gone_once:
            del self._once[key]
        self._once_ghosts.update(dict.fromkeys(gone_once))
        if gone_often:
            self._remove(gone_often)
            self._often_ghosts.update(dict.fromkeys(key for key in victims if key in gone_often))
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`. Costs O(n)."""
        twin = copy.copy(self)
        twin._once, twin._often, twin._repeated = self._once.copy(), self._often.copy(), self._repeated.copy()
        twin._once_ghosts, twin._often_ghosts = OrderedDict(), OrderedDict()
        return iter(twin._evict(len(self._held) - len(self._pinned), frozenset()))
