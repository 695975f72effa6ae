"""Pins: chunks that a lookup has promised, and that no eviction may take before it is over. Knows keys and a clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from typing import Final, Generic

from kvist.blocks.policy import Policy
from kvist.blocks.policy.base import K


class Pins(Generic[K]):
    """How often each key is pinned. Thread-safe.

    A pin of which nobody has heard for ``timeout_s`` protects no more: LMCache 0.5.6 never unpins what a lookup of
    asynchronous loading found and did not load, and its own pins time out likewise (``pin_timeout_sec``).
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self._timeout_s: Final = timeout_s
        self._clock: Final = clock
        self._lock: Final = threading.Lock()
        self._pins: dict[K, tuple[int, float]] = {}

    def pin(self, key: K) -> None:
        """Pin once more."""
        with self._lock:
            self._pins[key] = (self._count(key) + 1, self._clock())

    def unpin(self, key: K) -> bool:
        """Take one pin back; whether there was one."""
        with self._lock:
            count = self._count(key)
            self._pins.pop(key, None)
            if count > 1:
                self._pins[key] = (count - 1, self._clock())
            return count > 0

    def forget(self, key: K) -> None:
        """Take all pins of a key back."""
        with self._lock:
            self._pins.pop(key, None)

    def held(self) -> frozenset[K]:
        """Keys that are pinned now."""
        with self._lock:
            return frozenset(key for key in self._pins if self._count(key))

    def __contains__(self, key: K) -> bool:
        """Whether the key is pinned now."""
        with self._lock:
            return self._count(key) > 0

    def _count(self, key: K) -> int:
        count, since = self._pins.get(key, (0, 0.0))
        return count if count and self._clock() - since < self._timeout_s else 0


class Pinning(Policy[K]):
    """Another policy, which never evicts what is pinned. The pins may change in any thread, at any time."""

    def __init__(self, inner: Policy[K], pins: Pins[K]) -> None:
        self._inner, self._pins = inner, pins

    def insert(self, keys: Sequence[K], *, pinned: bool = False) -> None:
        """See `Policy.insert`."""
        self._inner.insert(keys, pinned=pinned)

    def touch(self, keys: Sequence[K]) -> None:
        """See `Policy.touch`."""
        self._inner.touch(keys)

    def pin(self, keys: Sequence[K]) -> None:
        """See `Policy.pin`."""
        self._inner.pin(keys)

    def unpin(self, keys: Sequence[K]) -> None:
        """See `Policy.unpin`."""
        self._inner.unpin(keys)

    def remove(self, keys: Collection[K]) -> None:
        """See `Policy.remove`."""
        self._inner.remove(keys)

    def evict(self, n: int, protected: Set[K] = frozenset()) -> list[K]:
        """See `Policy.evict`."""
        return self._inner.evict(n, protected | self._pins.held())

    def __iter__(self) -> Iterator[K]:
        """See `Policy.__iter__`."""
        return iter(self._inner)

    def __len__(self) -> int:
        """See `Policy.__len__`."""
        return len(self._inner)

    def __contains__(self, key: object) -> bool:
        """See `Policy.__contains__`."""
        return key in self._inner
