"""Lineage: of the blocks that nothing waits behind, the one whose use ended the longest ago goes first.

The rule of the "lineage" backend of NVIDIA Dynamo's kvbm-logical, its default: a block is worth nothing without those
before it, so only leaves go, and a parent becomes a leaf when the last of its children went. Its age then is its own,
not that of its children. (Where a block in use is between the two, kvbm-logical counts the block behind it as a child;
here it is none. A pool that takes whole chains into use sees no difference.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from heapq import heapify, heappop, heappush

from kvist.blocks.policy.base import K
from kvist.blocks.policy.checked import Checked

_SLACK = 64  # entries of the heap that need not be valid, besides as many as there are keys


class Lineage(Checked[K]):
    """Evicts leaves, the oldest first.

    A leaf is a key that is not pinned and has no child that is held and not pinned. Each key has a tick, given in
    order, the tail of a chain first, when it is inserted, touched or unpinned; pinned keys have none. The leaf of the
    lowest tick goes first. What is protected keeps its ancestors, too.

    `pin`, `unpin`, `insert` and `touch` cost O(1) a key, and O(log n) for each leaf that they make: one, for a chain.
    `evict` costs O(log n) a key, iterating O(n log n).

    Args:
        parents: the parent of each key; a key that it lacks, or gives ``None`` for, is a root. It is read as it is at
            each call: its owner sets a key's parent before it inserts the key, and neither changes nor forgets it
            before the key was evicted or removed. It has no cycles. A parent need not be held.
    """

    heeds_pinned = False

    def __init__(self, parents: Mapping[K, K | None]) -> None:
        super().__init__()
        self._parents = parents
        self._clock = 0
        self._ticks: dict[K, int] = {}  # of the keys that are not pinned
        self._children: dict[K, int] = {}  # how many of those a key is the parent of; none are not listed
        # All leaves by tick, and entries that are leaves no more: those whose tick is not the key's, or that have
        # children. A leaf may be there twice, with the same tick.
        self._heap: list[tuple[int, K]] = []

    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        if not pinned:
            self._unpin(keys)

    def _touch(self, keys: Sequence[K]) -> None:
        ticks, children = self._ticks, self._children
        for key in keys:
            if key in ticks:
                ticks[key] = self._clock
                if key not in children:
                    heappush(self._heap, (self._clock, key))
                self._clock += 1
        self._compact()

    def _pin(self, keys: Sequence[K]) -> None:
        self._take(reversed(keys))  # from the root, so that of a chain no key becomes a leaf on the way
        self._compact()

    def _unpin(self, keys: Sequence[K]) -> None:
        ticks, children, parents = self._ticks, self._children, self._parents
        tick = self._clock
        for key in keys:
            ticks[key] = tick
            if key not in children:
                heappush(self._heap, (tick, key))
            tick += 1
            if (parent := parents.get(key)) is not None:
                children[parent] = children.get(parent, 0) + 1
        self._clock = tick
        self._compact()

    def _remove(self, keys: Iterable[K]) -> None:
        self._take([key for key in keys if key in self._ticks])
        self._compact()

    def _stay(self, protected: set[K]) -> set[K]:
        staying: set[K] = set()
        for key in protected:
            above: K | None = key
            while above is not None and above in self._ticks and above not in staying:
                staying.add(above)
                above = self._parents.get(above)
        return staying

    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        ticks, children, heap = self._ticks, self._children, self._heap
        victims: list[K] = []
        kept = []
        while len(victims) < n:
            entry = heappop(heap)
            tick, key = entry
            if ticks.get(key) != tick or key in children:
                continue
            if key in staying:
                kept.append(entry)
                continue
            victims.append(key)
            self._take((key,))
        for entry in kept:
            heappush(heap, entry)
        return victims

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        twin = copy.copy(self)
        twin._ticks, twin._children, twin._heap = self._ticks.copy(), self._children.copy(), self._heap.copy()
        return iter(twin._evict(len(twin._ticks), frozenset()))

    def _take(self, keys: Iterable[K]) -> None:
        """Take keys out of the order. Parents of which these were the last children become leaves."""
        ticks, children, parents = self._ticks, self._children, self._parents
        for key in keys:
            del ticks[key]
            if (parent := parents.get(key)) is None:
                continue
            if (others := children[parent] - 1) > 0:
                children[parent] = others
            else:
                del children[parent]
                if (tick := ticks.get(parent)) is not None:
                    heappush(self._heap, (tick, parent))

    def _compact(self) -> None:
        """Leave out of the heap what is no leaf, when that is the larger part: O(1) a call, on average."""
        if len(self._heap) > 2 * len(self._ticks) + _SLACK:
            self._heap = [(tick, key) for key, tick in self._ticks.items() if key not in self._children]
            heapify(self._heap)
