"""What the policies share that give each key a rank of its own: the key of the least rank goes first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Set
from heapq import heapify, heappop, heappush

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked

_SLACK = 64  # entries of the heap that need not be valid, besides as many as there are keys


class Ranked(Checked[K]):
    """A policy that ranks each key when it was used, or may go again, whatever the others do.

    Each key costs O(log n), in every call; iterating costs O(n log n). Pinned keys have no rank, and cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0
        self._ranks: dict[K, tuple[float, int]] = {}  # of the keys that are not pinned; no two are equal
        self._heap: list[tuple[tuple[float, int], K]] = []  # all of these, and ranks that keys had before

    @abstractmethod
    def _use(self, key: K) -> None:
        """One use of a key, which may be new."""

    @abstractmethod
    def _worth(self, key: K) -> float:
        """The rank of a key that may go. Of equal ones, the key that got its rank first goes first."""

    @abstractmethod
    def _forget(self, key: K) -> None:
        """A key that is held no more."""

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        for key in keys:
            self._use(key)
        if not pinned:
            self._unpin(keys)

    def _touch(self, keys: Sequence[K]) -> None:
        for key in keys:
            self._use(key)
        self._unpin([key for key in keys if key not in self._pinned])

    def _pin(self, keys: Sequence[K]) -> None:
        for key in keys:
            self._use(key)
            del self._ranks[key]

    def _unpin(self, keys: Sequence[K]) -> None:
        for key in keys:
            rank = self._worth(key), self._clock
            self._clock += 1
            self._ranks[key] = rank
            heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + _SLACK:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapify(self._heap)

    def _remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._ranks.pop(key, None)
            self._forget(key)

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        victims: list[K] = []
        kept = []
        while len(victims) < n:
            entry = heappop(self._heap)
            rank, key = entry
            if self._ranks.get(key) != rank:
                continue
            if key in staying:
                kept.append(entry)
                continue
            del self._ranks[key]
            self._forget(key)
            victims.append(key)
        for entry in kept:
            heappush(self._heap, entry)
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        return iter(sorted(self._ranks, key=self._ranks.__getitem__))
