"""What every policy here shares: which keys are held, which of them are pinned, and what is refused.

A policy extends `Checked` and says only its order, in the few methods that are called after a call was found right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence, Set

from kvist.blocks.policy.base import K, Policy
from kvist.errors import AlreadyExists, Conflict, InvalidInput, NotFound, PoolExhausted


class Checked(Policy[K]):
    """A policy whose calls are checked before its order hears of them.

    The methods to fill in get the keys of a call in the order in which their use counts: the tail of the chain first.
    """

    def __init__(self) -> None:
        self._held: set[K] = set()
        self._pinned: set[K] = set()

    @abstractmethod
    def _insert(self, keys: Sequence[K], pinned: bool) -> None:
        """New keys."""

    @abstractmethod
    def _touch(self, keys: Sequence[K]) -> None:
        """One use of held keys, pinned or not."""

    @abstractmethod
    def _pin(self, keys: Sequence[K]) -> None:
        """One use of keys that were not pinned, and are now."""

    @abstractmethod
    def _unpin(self, keys: Sequence[K]) -> None:
        """Keys that were pinned, and are not now."""

    @abstractmethod
    def _remove(self, keys: Iterable[K]) -> None:
        """Keys that are held no more, in no order; each once."""

    @abstractmethod
    def _evict(self, n: int, staying: Set[K]) -> list[K]:
        """Take out and return ``n`` keys that are neither pinned nor staying. There are as many."""

    def _stay(self, protected: set[K]) -> set[K]:
        """Which keys stay when these, held and not pinned, are protected: these alone, for most policies."""
        return protected

    def insert(self, keys: Sequence[K], *, pinned: bool = False) -> None:
        """See `Policy.insert`."""
        new = set(keys)
        if len(new) != len(keys):
            raise AlreadyExists(f"{len(keys)} keys were inserted of which only {len(new)} differ")
        if not new.isdisjoint(self._held):
            raise AlreadyExists(f"key {next(iter(new & self._held))!r:.80} is already there")
        self._held |= new
        if pinned:
            self._pinned |= new
        self._insert(keys[::-1], pinned)

    def touch(self, keys: Sequence[K]) -> None:
        """See `Policy.touch`."""
        used = set(keys)
        self._require(used)
        self._touch(keys[::-1] if len(used) == len(keys) else list(dict.fromkeys(keys))[::-1])

    def pin(self, keys: Sequence[K]) -> None:
        """See `Policy.pin`."""
        pinning = set(keys)
        self._require(pinning)
        if len(pinning) != len(keys) or not pinning.isdisjoint(self._pinned):
            raise Conflict("a key to pin is pinned already, or given twice")
        self._pinned |= pinning
        self._pin(keys[::-1])

    def unpin(self, keys: Sequence[K]) -> None:
        """See `Policy.unpin`."""
        unpinning = set(keys)
        if len(unpinning) != len(keys) or not unpinning <= self._pinned:
            self._require(unpinning)
            raise Conflict("a key to unpin is not pinned, or given twice")
        self._pinned -= unpinning
        self._unpin(keys[::-1])

    def remove(self, keys: Collection[K]) -> None:
        """See `Policy.remove`."""
        gone = dict.fromkeys(keys)
        self._require(gone.keys())
        self._held.difference_update(gone)
        self._pinned.difference_update(gone)
        self._remove(gone)

    def evict(self, n: int, protected: Set[K] = frozenset()) -> list[K]:
        """See `Policy.evict`."""
        if n < 0:
            raise InvalidInput(f"cannot evict {n} keys")
        staying = self._stay(self._held.intersection(protected) - self._pinned) if protected else frozenset()
        may_go = len(self._held) - len(self._pinned) - len(staying)
        if n > may_go:
            raise PoolExhausted(f"{n} keys were to be evicted, {may_go} of {len(self)} may go")
        victims = self._evict(n, staying)
        self._held.difference_update(victims)
        return victims

    def __len__(self) -> int:
        """See `Policy.__len__`."""
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        """See `Policy.__contains__`."""
        return key in self._held

    def _require(self, keys: Set[K]) -> None:
        if not self._held >= keys:
            raise NotFound(f"there is no key {next(iter(keys - self._held))!r:.80}")
