"""S3-FIFO: three queues. Most keys are used once, and leave a small queue soon; the others go on to the main one.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

import copy
import itertools
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
        if self._has_evicted and self._ghosts.keys().isdisjoint(keys):
            self._small.update(dict.fromkeys(keys, 0))
        else:
            for key in keys:
                if key in self._ghosts:
                    del self._ghosts[key]
                    self._main[key] = 0
                elif len(self._small) >= self._small_size and not self._has_evicted:
                    self._main[key] = 0
                else:
                    self._small[key] = 0
        # Not before: a key must not be forgotten for those that were evicted to make room for it.
        for key in list(itertools.islice(self._ghosts, max(0, len(self._ghosts) - self._ghost_size))):
            del self._ghosts[key]

    def _touch(self, keys: Sequence[K]) -> None:
        small, main = self._small, self._main
        for key in keys:
            (small if key in small else main)[key] += 1

    def _pin(self, keys: Sequence[K]) -> None:
        self._touch(keys)

    def _unpin(self, keys: Sequence[K]) -> None:
        pass

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            del (self._small if key in self._small else self._main)[key]

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        self._has_evicted = self._has_evicted or n > 0
        victims: list[K] = []
        while len(victims) < n:
            if self._small and len(self._main) <= self._main_size:
                queue, other = self._from_small, self._from_main
            else:
                queue, other = self._from_main, self._from_small
            if not queue(victims, n, staying):
                other(victims, n, staying)
        return victims

    def _from_small(self, victims: list[K], n: int, staying: Set[K]) -> bool:
        """Add a victim, and others while it is this queue's turn. Whether it had all that it was asked for."""
        small, main, ghosts, pinned = self._small, self._main, self._ghosts, self._pinned
        left, room = n - len(victims), self._main_size - len(main)
        while small:
            key, uses = small.popitem(last=False)
            if uses >= _OFTEN or key in pinned or key in staying:
                main[key] = 0
                room -= 1
                continue
            ghosts[key] = None
            victims.append(key)
            left -= 1
            if not left or room < 0:
                return True
        return False

    def _from_main(self, victims: list[K], n: int, staying: Set[K]) -> bool:
        """See `_from_small`."""
        small, main, pinned, main_size = self._small, self._main, self._pinned, self._main_size
        stayed = 0  # of the keys that were met, how many must stay, one after the other
        while stayed < len(main):
            key, uses = main.popitem(last=False)
            stays = key in pinned or key in staying
            if not uses and not stays:
                victims.append(key)
                if len(victims) == n or (small and len(main) <= main_size):
                    return True
                stayed = 0
                continue
            main[key] = max(min(uses, _MOST) - 1, 0)
            stayed = stayed + 1 if stays else 0
        return False

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`. Costs O(n)."""
        twin = copy.copy(self)
        twin._small, twin._main, twin._ghosts = self._small.copy(), self._main.copy(), OrderedDict()
        return iter(twin._evict(len(self._held) - len(self._pinned), frozenset()))
