"""Four lists of recency, from cold to very hot, by how often a key was used. The coldest goes first. O(1) a key.

The "multi_lru" backend of NVIDIA Dynamo's kvbm-logical, with its thresholds.
"""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import TypeVar

from kvist.blocks.policy.checked import Checked
from kvist.blocks.policy.tinylfu import MOST, TinyLfu

HashK = TypeVar("HashK", int, bytes)

_THRESHOLDS = (3, 8, 15)


class MultiLru(Checked[HashK]):
    """Evicts the least recently used of the cold keys; when there are none, of the warm, the hot, the very hot.

    Cold is what was used less than 3 times, warm less than 8, hot less than 15, as `TinyLfu` estimates. Insert, touch
    and pin are one use each; it remembers those of keys that went. A key comes to its list when it is inserted,
    touched or unpinned; it stays there when the estimate changes.

    Args:
        capacity: of the pool, in blocks.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._frequency = TinyLfu(capacity)
        self._lists: list[OrderedDict[HashK, None]] = [OrderedDict() for _ in range(len(_THRESHOLDS) + 1)]
        self._list_for: list[OrderedDict[HashK, None]] = [
            self._lists[bisect.bisect(_THRESHOLDS, uses)] for uses in range(MOST + 1)
        ]
        self._list_of: dict[HashK, OrderedDict[HashK, None]] = {}  # of each key that is not pinned

    def _insert(self, keys: Sequence[HashK], pinned: bool) -> None:
        self._frequency.count(*keys)
        if not pinned:
            self._unpin(keys)

    def _touch(self, keys: Sequence[HashK]) -> None:
        self._frequency.count(*keys)
        unpinned = [key for key in keys if key in self._list_of]
        self._remove(unpinned)
        self._unpin(unpinned)

    def _pin(self, keys: Sequence[HashK]) -> None:
        self._frequency.count(*keys)
        self._remove(keys)

    def _unpin(self, keys: Sequence[HashK]) -> None:
        estimate, list_for, list_of = self._frequency.estimate, self._list_for, self._list_of
        for key in keys:
            chosen = list_for[estimate(key)]
            chosen[key] = None
            list_of[key] = chosen

    def _remove(self, keys: Iterable[HashK]) -> None:
        for key in keys:
            if (chosen := self._list_of.pop(key, None)) is not None:
                del chosen[key]

    def _evict(self, n: int, staying: Set[HashK]) -> list[HashK]:
        victims = list(itertools.islice((key for key in self if key not in staying) if staying else self, n))
        self._remove(victims)
        return victims

    def __iter__(self) -> Iterator[HashK]:
        """See `Policy.__iter__`."""
        return itertools.chain.from_iterable(self._lists)
