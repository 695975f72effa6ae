"""What a residency keeps of a key, and what its users hold. Takes no lock: the residency's guards both."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Self, TypeVar, cast

from kvist.errors import EngineError

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """A key that is loading or resident.

    Attributes:
        size: bytes that it will take, is reserved, or takes; 0 until it is known.
        is_reserved: whether there is room for it.
        refs: leases, and those who wait for one.
        is_resident: whether `value` is there.
        is_stuck: it has to wait for leases of others to end before it can be loaded.
        error: why there will be none.
    """

    key: Hashable
    size: int = 0
    refs: int = 1
    is_resident: bool = False
    is_reserved: bool = False
    is_stuck: bool = False
    is_pinned: bool = False
    value: T | None = None
    error: BaseException | None = None

    @property
    def may_go(self) -> bool:
        """Whether it may be evicted."""
        return self.is_resident and not self.refs and not self.is_pinned


class Lease(Generic[T]):
    """The right to use what is resident. It stays until the lease is closed; a context manager closes it.

    Closing again does nothing, from whatever thread. A lease that is never closed keeps its cartridge for ever.
    """

    __slots__ = ("_entry", "_give_back")

    def __init__(self, entry: Entry[T], give_back: Callable[[Lease[T]], None]) -> None:
        self._entry: Entry[T] | None = entry
        self._give_back = give_back

    @property
    def value(self) -> T:
        """What was loaded; the same object for all who lease it.

        Raises:
            EngineError: the lease is closed.
        """
        if (entry := self._entry) is None:
            raise EngineError("the lease is closed; acquire again")
        return cast(T, entry.value)

    def close(self) -> None:
        """Give it back."""
        self._give_back(self)

    def take(self) -> Entry[T] | None:
        """The entry, which the lease has no more; for the residency, under its lock."""
        entry, self._entry = self._entry, None
        return entry

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def choose(idle: list[Entry[T]], surplus: int) -> list[Entry[T]]:
    """All of them but what is not needed: of ``surplus`` bytes, the most recently used are spared first."""
    chosen = []
    for entry in reversed(idle):
        if entry.size <= surplus:
            surplus -= entry.size
        else:
            chosen.append(entry)
    return chosen[::-1]
