"""Least recently used: the key whose last use is the longest ago goes first. O(1) a key."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence, Set

from kvist.blocks.policy.base import K, Policy
from kvist.errors import AlreadyExists, InvalidInput, NotFound, PoolExhausted


class Lru(Policy[K]):
    """Evicts the least recently used. What is protected is passed over, and keeps its place."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()  # the next to go first

    def insert(self, keys: Sequence[K]) -> None:
        """See `Policy.insert`."""
        new = dict.fromkeys(keys)
        if len(new) != len(keys):
            raise AlreadyExists(f"{len(keys)} keys were inserted of which only {len(new)} differ")
        for key in new:
            if key in self._order:
                raise AlreadyExists(f"key {key!r:.80} is already there")
        for key in reversed(new):
            self._order[key] = None

    def touch(self, keys: Sequence[K]) -> None:
        """See `Policy.touch`."""
        self._require(keys)
        for key in reversed(dict.fromkeys(keys)):
            self._order.move_to_end(key)

    def remove(self, keys: Collection[K]) -> None:
        """See `Policy.remove`."""
        self._require(keys)
        for key in keys:
            self._order.pop(key, None)

    def evict(self, n: int, protected: Set[K] = frozenset()) -> list[K]:
        """See `Policy.evict`."""
        if n < 0:
            raise InvalidInput(f"cannot evict {n} keys")
        chosen = list(itertools.islice((key for key in self._order if key not in protected), n))
        if len(chosen) < n:
            raise PoolExhausted(f"{n} keys were to be evicted, {len(chosen)} of {len(self._order)} may go")
        for key in chosen:
            del self._order[key]
        return chosen

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        return iter(self._order)

    def __len__(self) -> int:
        """See `Policy.__len__`."""
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        """See `Policy.__contains__`."""
        return key in self._order

    def _require(self, keys: Collection[K]) -> None:
        for key in keys:
            if key not in self._order:
                raise NotFound(f"there is no key {key!r:.80}")
