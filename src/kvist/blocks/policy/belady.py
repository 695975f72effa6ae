"""Belady's rule: the key that is needed the farthest ahead goes first. O(log n) a key.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5 (2), 1966. No
policy has fewer misses where each miss is inserted, one key at a time: it is the bound for all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvist.blocks.policy.base import K
from kvist.blocks.policy.ranked import Ranked


class Belady(Ranked[K]):
    """Evicts what the future asks for last, or never; of those, what may go since the longest.

    Each use of a key, by insert, touch or pin, takes up the next request for it. A key that is used more often than
    the future asks for it is never needed again.

    Args:
        future: every request to come, in order. O(len(future)) of time and memory, here.
    """

    def __init__(self, future: Sequence[K]) -> None:
        super().__init__()
        self._requests: dict[K, list[int]] = {}  # where the requests for each key are, the next one at the end
        for place in range(len(future) - 1, -1, -1):
            self._requests.setdefault(future[place], []).append(place)

    def _use(self, key: K) -> None:
        if requests := self._requests.get(key):
            requests.pop()

    def _worth(self, key: K) -> float:
        requests = self._requests.get(key)
        return -requests[-1] if requests else -math.inf

    def _forget(self, key: K) -> None:
        pass
