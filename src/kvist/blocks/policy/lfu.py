"""Least frequently used: the key that was used the fewest times since it came goes first. O(log n) a key."""

from __future__ import annotations

from kvist.blocks.policy.base import K
from kvist.blocks.policy.ranked import Ranked


class Lfu(Ranked[K]):
    """Evicts what was used the fewest times; of those, what has been so the longest.

    Insert, touch and pin are one use each. A key that went and comes back was never used before. The same as
    libCacheSim's ``LFU``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[K, int] = {}

    def _use(self, key: K) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1

    def _worth(self, key: K) -> float:
        return self._uses[key]

    def _forget(self, key: K) -> None:
        del self._uses[key]
