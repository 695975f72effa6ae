"""Least recently used: the key whose last use ended the longest ago goes first. O(1) a key."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked


class Lru(Checked[K]):
    """Evicts the least recently used. What is protected is passed over, and keeps its place."""

    heeds_pinned = False

    def __init__(self) -> None:
        super().__init__()
        self._order: OrderedDict[K, None] = OrderedDict()  # not pinned; the next to go first

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        if not pinned:
            self._unpin(keys)

    def _touch(self, keys: Sequence[K]) -> None:
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)

    def _pin(self, keys: Sequence[K]) -> None:
        self._remove(keys)

    def _unpin(self, keys: Sequence[K]) -> None:
        self._order.update(dict.fromkeys(keys))

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._order.pop(key, None)

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        may_go = (key for key in self._order if key not in staying) if staying else self._order
        victims = list(itertools.islice(may_go, n))
        self._remove(victims)
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        return iter(self._order)
