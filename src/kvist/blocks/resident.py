"""`Resident`: what a pool knows of one block, and `Evictions`: who is told when blocks come to rest or go.

Values and a protocol; knows nothing of pools, links or tiers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from msgspec import Struct


class Resident(Struct, frozen=True, gc=False):
    """One full block of a pool, as it is now: a value, which later changes of the pool do not reach.

    Attributes:
        sequence_hash: its name in events: the latest by which it was stored or hit.
        slot: where it lies, 0 or more; -1 while it lies nowhere.
        lineage_hash: what it is matched and evicted by.
        lineage_parent: lineage hash of the block before it, or ``None`` for a first one.
        parent: sequence hash of the block before it, by which that was told first; ``None`` for a first one.
        local_hash: hash of its tokens alone; 0 if it is not known.
        token_ids: its tokens; ``None`` if they are not known.
        aliases: the other sequence hashes that name it, the latest first.
    """

    sequence_hash: int
    slot: int
    lineage_hash: int
    lineage_parent: int | None = None
    parent: int | None = None
    local_hash: int = 0
    token_ids: Sequence[int] | None = None
    aliases: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[int, ...]:
        """All sequence hashes that name it, the latest first."""
        return (self.sequence_hash, *self.aliases)


class Evictions(Protocol):
    """Who wants to keep a copy of what a pool holds, or evicts. Given to `BlockManager.attach`.

    Calls come in the midst of a move: they must not call the manager back, but may emit events of their own tiers.
    """

    @property
    def is_reading(self) -> bool:
        """Whether blocks of this pool are being copied, or wait for it: they must stay where they are."""

    def evicted(self, blocks: Sequence[Resident]) -> Collection[int]:
        """These blocks go, in this order; their slots are still what they were.

        Returns:
            The slots, of these blocks, that are still read. They count as active until `BlockManager.free` gets them.
        """

    def released(self, blocks: Sequence[Resident]) -> None:
        """Nobody refers to these blocks any more, in this order. They stay where they are until they are evicted."""
