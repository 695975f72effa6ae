"""The `Policy` contract: an order of eviction over keys.

Knows keys and in which order they were used. Must not know what a key names, how large that is, how many there may be,
what time it is, or where anything is stored: the pool that owns the policy decides *when* and *how much* is evicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence, Set
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Policy(ABC, Generic[K]):
    """An order of eviction over the keys of one pool.

    Calls that raise have changed nothing. Calls come from one thread at a time. Equal calls give equal orders.

    `kvist.testing.policy.PolicyTests` is the suite that every policy passes.
    """

    @abstractmethod
    def insert(self, keys: Sequence[K]) -> None:
        """Take in new keys, as one use of all of them.

        Args:
            keys: as in `touch`.

        Raises:
            AlreadyExists: the policy holds one of them, or one is given twice.
        """

    @abstractmethod
    def touch(self, keys: Sequence[K]) -> None:
        """Note one use of all these keys.

        Args:
            keys: a request's chain of blocks, its root first. They count as used from the tail to the root, so that
                of one chain the tail goes first: a block is worth nothing without those before it. A key that is
                given twice counts where it is given first.

        Raises:
            NotFound: the policy does not hold one of them.
        """

    @abstractmethod
    def remove(self, keys: Collection[K]) -> None:
        """Forget keys that the pool dropped for reasons of its own.

        Raises:
            NotFound: the policy does not hold one of them.
        """

    @abstractmethod
    def evict(self, n: int, protected: Set[K] = frozenset()) -> list[K]:
        """Choose ``n`` keys, forget them, and return them in the order in which they go.

        Args:
            n: how many, 0 or more.
            protected: keys that stay; those the policy does not hold are ignored.

        Raises:
            PoolExhausted: fewer than ``n`` keys are not protected.
            InvalidInput: ``n`` is negative.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[K]:
        """All keys in the order in which they would be evicted if nothing else happened. Changes nothing."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys the policy holds."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether the policy holds this key."""
