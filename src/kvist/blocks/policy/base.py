"""The `Policy` contract: an order of eviction over keys.

Knows keys, in which order they were used, and which are in use now. Must not know what a key names, how large that is,
what time it is, or where anything is stored: the pool that owns the policy decides *when* and *how much* is evicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence, Set
from typing import ClassVar, Generic, TypeVar

from kvist.errors import Conflict, InvalidInput

K = TypeVar("K", bound=Hashable)


class Policy(ABC, Generic[K]):
    """An order of eviction over the keys of one pool.

    Calls that raise have changed nothing. Calls come from one thread at a time. Equal calls give equal orders.

    ``keys`` of a call are a request's chain of blocks, its root first, and no key twice (but see `touch`). They count
    as used from the tail to the root, so that of one chain the tail goes first: a block is worth nothing without those
    before it.

    `kvist.testing.policy.PolicyTests` is the suite that every policy passes.

    Attributes:
        heeds_pinned: whether `touch` of pinned keys changes anything; if not, whoever pins many need not call it.
    """

    heeds_pinned: ClassVar[bool] = True

    @abstractmethod
    def insert(self, keys: Sequence[K], *, pinned: bool = False) -> None:
        """Take in new keys, as one use of all of them.

        Args:
            keys: see the class.
            pinned: they are in use, as after `pin`.

        Raises:
            AlreadyExists: the policy holds one of them, or one is given twice.
        """

    @abstractmethod
    def touch(self, keys: Sequence[K]) -> None:
        """Note one use of all these keys, pinned or not.

        Args:
            keys: see the class. A key that is given twice counts once, where it is given first.

        Raises:
            NotFound: the policy does not hold one of them.
        """

    @abstractmethod
    def pin(self, keys: Sequence[K]) -> None:
        """Note one use of all these keys, and let none of them go before it is unpinned.

        Raises:
            NotFound: the policy does not hold one of them.
            Conflict: one of them is pinned, or given twice.
        """

    @abstractmethod
    def unpin(self, keys: Sequence[K]) -> None:
        """These keys may go again. Their use ends now, which is what a policy of recency dates them by.

        Raises:
            NotFound: the policy does not hold one of them.
            Conflict: one of them is not pinned, or given twice.
        """

    @abstractmethod
    def remove(self, keys: Collection[K]) -> None:
        """Forget keys, pinned or not, that the pool dropped for reasons of its own. A key may be given twice.

        Raises:
            NotFound: the policy does not hold one of them.
        """

    def expect(self, keys: Sequence[K]) -> None:
        """Hear which keys are inserted next, before room is made for them.

        No pool must call it, and most policies do nothing: it is for those that remember what they evicted, and learn
        from what comes back before they choose what goes. Keys that are held are ignored.
        """

    @abstractmethod
    def evict(self, n: int, protected: Set[K] = frozenset()) -> list[K]:
        """Choose ``n`` keys, forget them, and return them in the order in which they go.

        Args:
            n: how many, 0 or more.
            protected: keys that stay besides those that are pinned; those the policy does not hold are ignored.

        Raises:
            PoolExhausted: fewer than ``n`` keys may go.
            InvalidInput: ``n`` is negative.
        """

    def serve(self, keys: Sequence[K], capacity: int) -> int:
        """One request that has the pool to itself: `pin` what is there, make room, `insert` the rest, `unpin` all.

        Args:
            keys: see the class. Of more than the pool holds, the first that it holds count.
            capacity: how many keys the pool holds, 1 or more.

        Returns:
            How many leading keys were there.

        Raises:
            Conflict: a key of the policy is pinned, or one of these is given twice.
            InvalidInput: ``capacity`` is not positive.
        """
        keys = servable(keys, capacity)
        if sum(1 for _ in self) < len(self):
            raise Conflict("a request has the pool to itself only when nothing is pinned")
        there, new = [key for key in keys if key in self], [key for key in keys if key not in self]
        leading = keys.index(new[0]) if new else len(keys)
        self.pin(there)
        if (short := len(self) + len(new) - capacity) > 0:
            self.expect(new)
            self.evict(short)
        self.insert(new, pinned=True)
        self.unpin(keys)
        return leading

    @abstractmethod
    def __iter__(self) -> Iterator[K]:
        """The keys that are not pinned, in the order in which they would go if nothing else happened. No change."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys the policy holds, pinned ones too."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether the policy holds this key, pinned or not."""


def servable(keys: Sequence[K], capacity: int) -> Sequence[K]:
    """The keys of a request that `Policy.serve` heeds."""
    if capacity < 1:
        raise InvalidInput(f"capacity must be 1 or more, not {capacity}")
    if len(keys) > capacity:
        keys = keys[:capacity]
    if len(set(keys)) < len(keys):
        raise Conflict("a key of a request is given twice")
    return keys
