"""S3-FIFO: three queues. Most keys are used once, and leave a small queue soon; the others go on to the main one.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked

_OFTEN = 2  # uses in the small queue after which a key goes on to the main one
_MOST = 3  # uses that the main queue counts


class S3Fifo(Checked[K]):
    """Evicts from the small queue what was used less than twice, else from the main queue what was not used.

    The small queue is a tenth of the pool; a ghost queue remembers keys that left it, as many as nine tenths, and
    such a key comes back to the main queue. The main queue puts a key that was used back to its end, with one use
    less, of three that count. Keys that come before the first eviction and find the small queue full go to the main
    queue. What must stay and is met counts as used: it moves on.

    O(1) a key, on average, and O(1) for each key that must stay and is met: all of them, at worst, in each call. The
    same as libCacheSim's ``S3FIFO`` from 20 blocks on; a smaller one inserts nothing there, and has a small queue of
    one block here.

    Args:
        capacity: of the pool, in blocks.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._small_size = max(1, capacity // 10)
        self._main_size = capacity - self._small_size
        self._ghost_size = capacity * 9 // 10
        self._small: OrderedDict[K, int] = OrderedDict()  # the oldest first, with its uses after the first one
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghosts: OrderedDict[K, None] = OrderedDict()
        self._has_evicted = False

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        for key in keys:
            if key in self._ghosts:
                del self._ghosts[key]
                self._main[key] = 0
            elif len(self._small) >= self._small_size and not self._has_evicted:
                self._main[key] = 0
            else:
                self._small[key] = 0
        # Not before: a key must not be forgotten for those that were evicted to make room for it.
        while len(self._ghosts) > self._ghost_size:
            self._ghosts.popitem(last=False)

    def _touch(self, keys: Sequence[K]) -> None:
        for key in keys:
            (self._small if key in self._small else self._main)[key] += 1

    def _pin(self, keys: Sequence[K]) -> None:
        self._touch(keys)

    def _unpin(self, keys: Sequence[K]) -> None:
        pass

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            del (self._small if key in self._small else self._main)[key]

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        self._has_evicted = self._has_evicted or n > 0
        return [self._next(staying) for _ in range(n)]

    def _next(self, staying: Set[K]) -> K:
        if self._small and len(self._main) <= self._main_size:
            order = self._from_small, self._from_main
        else:
            order = self._from_main, self._from_small
        while True:  # a queue that has no victim leaves one to the other
            for queue in order:
                if (victim := queue(staying)) is not None:
                    return victim

    def _from_small(self, staying: Set[K]) -> K | None:
        while self._small:
            key, uses = self._small.popitem(last=False)
            if uses < _OFTEN and key not in self._pinned and key not in staying:
                self._ghosts[key] = None
                return key
            self._main[key] = 0
        return None

    def _from_main(self, staying: Set[K]) -> K | None:
        stayed = 0  # of the keys that were met, how many must stay, one after the other
        while stayed < len(self._main):
            key, uses = self._main.popitem(last=False)
            stays = key in self._pinned or key in staying
            if not uses and not stays:
                return key
            self._main[key] = max(min(uses, _MOST) - 1, 0)
            stayed = stayed + 1 if stays else 0
        return None

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`. Costs O(n)."""
        twin = copy.copy(self)
        twin._small, twin._main, twin._ghosts = self._small.copy(), self._main.copy(), OrderedDict()
        return iter(twin._evict(len(self._held) - len(self._pinned), frozenset()))
