"""`Slots`: the numbered places of a pool that hold no full block: free, or handed out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from kvist.errors import NotFound


class Slots:
    """Free slots, the longest free first, and those that somebody owns.

    Args:
        capacity: how many there are, numbered from 0. All are free.
    """

    def __init__(self, capacity: int) -> None:
        self._free = deque(range(capacity))
        self.owned: set[int] = set()

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

    def require_owned(self, slots: Sequence[int]) -> None:
        """Check that these slots have an owner outside the pool.

        Raises:
            NotFound: one has not, or is given twice.
        """
        if len(set(slots)) != len(slots) or not self.owned.issuperset(slots):
            stray = next(
                (slot for slot in slots if slot not in self.owned),
                next((slot for index, slot in enumerate(slots) if slot in slots[:index]), None),
            )
            raise NotFound(f"slot {stray} is not allocated, or given twice; {len(self.owned)} slots are allocated")

    def disown(self, slots: Iterable[int]) -> None:
        """These slots of an owner outside the pool now are the pool's, and not free."""
        self.owned.difference_update(slots)
