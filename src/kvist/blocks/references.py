"""`References`: how often each block of a pool is referred to, and by which name."""

from __future__ import annotations

from kvist.blocks.resident import Resident


class References:
    """Counts of references.

    Args:
        capacity: slots are less than that.

    Attributes:
        counts: references to the block in each slot.
        named: references by each name that is in use, of blocks that have several.
    """

    def __init__(self, capacity: int) -> None:
        self.counts = [0] * capacity
        self.named: dict[int, int] = {}

    def by(self, block: Resident, name: int) -> int:
        """How often this block is referred to by this name, which is one of its."""
        return self.named.get(name, 0) if block.aliases else self.counts[block.slot]

    def add(self, block: Resident, name: int) -> None:
        """One more reference to this block by this name, which is one of its."""
        self.counts[block.slot] += 1
        if block.aliases:
            self.named[name] = self.named.get(name, 0) + 1

    def drop(self, block: Resident, name: int) -> None:
        """One reference less by this name, of which there is one."""
        self.counts[block.slot] -= 1
        if block.aliases:
            self.named[name] -= 1
            if not self.named[name]:
                del self.named[name]

    def split(self, block: Resident) -> None:
        """This block, which had one name, is about to get a second: from now on they are counted apart."""
        if self.counts[block.slot]:
            self.named[block.sequence_hash] = self.counts[block.slot]
