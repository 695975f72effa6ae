"""`Slots`: the numbered places of a pool that hold no full block: free, or handed out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from kvist.errors import InvalidInput, NotFound


class Slots:
    """Free slots, the longest free first, and those that somebody outside the pool owns.

    Args:
        capacity: how many there are, numbered from 0. All are free.

    Attributes:
        owned: slots with an owner outside the pool.
        reading: those of them that come back by themselves: their blocks were evicted, and are still read.
    """

    def __init__(self, capacity: int) -> None:
        self._free = deque(range(capacity))
        self.owned: set[int] = set()
        self.reading: set[int] = set()

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def __iter__(self) -> Iterator[int]:
        """The free ones, the next to be taken first."""
        return iter(self._free)

    def take(self, n: int) -> list[int]:
        """Take ``n`` free slots, which are there."""
        pop = self._free.popleft
        return [pop() for _ in range(n)]

    def give(self, slots: Iterable[int]) -> None:
        """Free slots that `take` gave."""
        self._free.extend(slots)

    def give_first(self, slot: int) -> None:
        """Free a slot that `take` gave, as the next to be taken."""
        self._free.appendleft(slot)

    def lend(self, n: int) -> list[int]:
        """Take ``n`` free slots, which are there, for an owner outside the pool."""
        slots = self.take(n)
        self.owned.update(slots)
        return slots

    def keep(self, slots: Iterable[int]) -> None:
        """These slots of evicted blocks are still read."""
        self.reading.update(slots)
        self.owned |= self.reading

    def require_owned(self, slots: Sequence[int]) -> None:
        """Check that these slots have an owner outside the pool.

        Raises:
            InvalidInput: they are no sequence of numbers.
            NotFound: one has not, or is given twice.
        """
        try:
            sound = len(set(slots)) == len(slots) and self.owned.issuperset(slots)
        except TypeError:
            raise InvalidInput(f"slots must be a sequence of numbers, not {slots!r:.80}") from None
        if not sound:
            stray = next(
                (slot for slot in slots if slot not in self.owned),
                next((slot for index, slot in enumerate(slots) if slot in slots[:index]), None),
            )
            raise NotFound(f"slot {stray} is not allocated, or given twice; {len(self.owned)} slots are allocated")

    def disown(self, slots: Iterable[int]) -> None:
        """These slots of an owner outside the pool now are the pool's, and not free."""
        self.owned.difference_update(slots)
        self.reading.difference_update(slots)
