"""What every policy here shares: which keys are held, which of them are pinned, and what is refused.

A policy extends `Checked` and says only its order, in the few methods that are called after a call was found right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence, Set

from kvist.blocks.policy.base import K, Policy, servable
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
        held = self._held
        if not held.isdisjoint(keys):
            raise AlreadyExists(f"key {next(key for key in keys if key in held)!r:.80} is already there")
        before = len(held)
        held.update(keys)
        if len(held) - before != len(keys):
            differ = len(held) - before
            held.difference_update(keys)
            raise AlreadyExists(f"{len(keys)} keys were inserted of which only {differ} differ")
        if pinned:
            self._pinned.update(keys)
        self._insert(keys[::-1], pinned)

    def touch(self, keys: Sequence[K]) -> None:
        """See `Policy.touch`."""
        used = set(keys)
        self._require(used)
        self._touch(keys[::-1] if len(used) == len(keys) else list(dict.fromkeys(keys))[::-1])

    def pin(self, keys: Sequence[K]) -> None:
        """See `Policy.pin`."""
        pinned = self._pinned
        if not self._held.issuperset(keys):
            self._require(set(keys))
        before = len(pinned)
        if not pinned.isdisjoint(keys):
            raise Conflict("a key to pin is pinned already")
        pinned.update(keys)
        if len(pinned) - before != len(keys):
            pinned.difference_update(keys)
            raise Conflict("a key to pin is given twice")
        self._pin(keys[::-1])

    def unpin(self, keys: Sequence[K]) -> None:
        """See `Policy.unpin`."""
        pinned = self._pinned
        if not pinned.issuperset(keys):
            self._require(set(keys))
            raise Conflict("a key to unpin is not pinned")
        before = len(pinned)
        pinned.difference_update(keys)
        if before - len(pinned) != len(keys):
            pinned.update(keys)
            raise Conflict("a key to unpin is given twice")
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

    def serve(self, keys: Sequence[K], capacity: int) -> int:
        """See `Policy.serve`. Checked once, where the single calls check each time."""
        held, pinned = self._held, self._pinned
        if pinned:
            raise Conflict("a request has the pool to itself only when nothing is pinned")
        keys = servable(keys, capacity)
        is_there = list(map(held.__contains__, keys))
        leading = is_there.index(False) if False in is_there else len(keys)
        there, new = keys[:leading], keys[leading:]
        if True in is_there[leading:]:
            there, new = [key for key in keys if key in held], [key for key in keys if key not in held]
        pinned.update(keys)
        if there:
            self._pin(there[::-1])
        if new:
            if (short := len(held) + len(new) - capacity) > 0:
                self.expect(new)
                held.difference_update(self._evict(short, frozenset()))
            held.update(new)
            self._insert(new[::-1], True)
        pinned.clear()
        self._unpin(keys[::-1])
        return leading

    def __len__(self) -> int:
        """See `Policy.__len__`."""
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        """See `Policy.__contains__`."""
        return key in self._held

    def _require(self, keys: Set[K]) -> None:
        if not self._held >= keys:
            raise NotFound(f"there is no key {next(iter(keys - self._held))!r:.80}")
