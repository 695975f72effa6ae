"""Moves: what a scheduler asks of the block manager. Values only; knows nothing of how they are carried out.

The three moves and their fields are those of NVIDIA Dynamo's mocker, whose traces and tests they can express.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from msgspec import Struct


class FullBlock(Struct, frozen=True, gc=False):
    """A block whose tokens are all known.

    Attributes:
        sequence_hash: its chained hash: equal hashes mean equal tokens in this block and all before it.
    """

    sequence_hash: int


class PartialBlock(Struct, frozen=True, gc=False):
    """A block that is being filled. One sequence owns it; nothing can match it.

    Attributes:
        uuid: its name until it is promoted.
    """

    uuid: UUID


UniqueBlock = FullBlock | PartialBlock

LineageEntry = tuple[int, int | None]
"""The hash by which a full block is matched and evicted, and that of the block before it (``None`` for a first one)."""


class Use(Struct, frozen=True):
    """Take a reference to each of these blocks, in order; store those that are not there.

    A sequence hash names one block for ever: whoever gives it another lineage entry after its block went tells of two
    blocks by one name, and the tiers below and the routers cannot keep them apart.

    Attributes:
        blocks: a stretch of one sequence, its root side first.
        local_hashes: hashes of the tokens of each full block alone, or empty.
        lineage: one entry for each full block. Empty: a block is matched by its sequence hash, and its parent is the
            full block before it in this move, or ``parent``.
        token_ids: of each full block, or ``None``; they travel in events.
        parent: the block before the first, or ``None`` if that is the root.
    """

    blocks: Sequence[UniqueBlock]
    local_hashes: Sequence[int] = ()
    lineage: Sequence[LineageEntry] = ()
    token_ids: Sequence[Sequence[int]] | None = None
    parent: UniqueBlock | None = None


class Deref(Struct, frozen=True):
    """Give back one reference to each of these blocks, in order. A sequence gives its tail back first.

    Attributes:
        blocks: a block may be given as often as references to it are held.
    """

    blocks: Sequence[UniqueBlock]


class Promote(Struct, frozen=True):
    """A partial block became full.

    Attributes:
        uuid: the partial block's.
        sequence_hash: what it is called from now on.
        parent_hash: sequence hash of the block before it, or ``None``.
        local_hash: hash of its tokens alone, or 0 if nobody asks.
        lineage: its lineage entry, or ``None`` for ``(sequence_hash, parent_hash)``.
        token_ids: its tokens, or ``None``.
    """

    uuid: UUID
    sequence_hash: int
    parent_hash: int | None = None
    local_hash: int = 0
    lineage: LineageEntry | None = None
    token_ids: Sequence[int] | None = None


Move = Use | Deref | Promote
