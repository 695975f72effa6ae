"""First in, first out: the key that was inserted first goes first. O(log n) a key."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.blocks.policy.base import K
from kvist.blocks.policy.ranked import Ranked


class Fifo(Ranked[K]):
    """Evicts what was inserted first, whatever was used since. A key that was pinned has the place it had before.

    A key that went and comes back is new. The same as libCacheSim's ``FIFO``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inserted = 0
        self._places: dict[K, int] = {}

    def _touch(self, keys: Sequence[K]) -> None:
        pass

    def _use(self, key: K) -> None:
        if key not in self._places:
            self._places[key] = self._inserted
            self._inserted += 1

    def _worth(self, key: K) -> float:
        return self._places[key]

    def _forget(self, key: K) -> None:
        del self._places[key]
