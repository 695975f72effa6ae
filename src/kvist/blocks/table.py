"""`Table`: the full blocks of a pool by lineage hash and by name. Knows no references and no order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from types import MappingProxyType

from msgspec.structs import replace

from kvist.blocks.resident import Resident


class Table:
    """The full blocks that a pool holds.

    A block is its lineage hash, its key. It has one or more names, which are sequence hashes; a name belongs to one
    block. Mostly the one name is the key itself, and then `odd` is empty.

    Args:
        capacity: how many blocks there may be; their slots are less than that.

    Attributes:
        slots: the slot of each block by its key, in the order in which they came.
        blocks: each block by its slot.
        parents: the key of the block before each, by key. The policy of a pool may read it as it changes.
        odd: the key of each name that is not its block's key.
        first: the name by which a block was told first, by key, of blocks that got another.
        orphans: keys that are not there and are parents of blocks that are; of how many.
    """

    def __init__(self, capacity: int) -> None:
        self.slots: dict[int, int] = {}
        self.blocks: list[Resident | None] = [None] * capacity
        self.parents: dict[int, int | None] = {}
        self.odd: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.orphans: dict[int, int] = {}
        self._children = [0] * capacity  # of the block in each slot

    def __len__(self) -> int:
        """How many blocks are there."""
        return len(self.slots)

    def __iter__(self) -> Iterator[Resident]:
        """The blocks, in the order in which they came."""
        return filter(None, map(self.get, self.slots))

    def get(self, key: int) -> Resident | None:
        """The block of this key, if it is there."""
        slot = self.slots.get(key)
        return None if slot is None else self.blocks[slot]

    def find(self, name: int) -> Resident | None:
        """The block of this name, if it is there."""
        block = self.get(name)
        if block is not None and (block.sequence_hash == name or name in block.aliases):
            return block
        key = self.odd.get(name)
        return None if key is None else self.get(key)

    def key_of(self, name: int) -> int:
        """The key of the block of this name; the name itself if it is not there."""
        block = self.find(name)
        return name if block is None else block.lineage_hash

    def first_name(self, name: int) -> int:
        """The name by which the block of this name was told first; the name itself if it is not there."""
        block = self.find(name)
        return name if block is None else self.first.get(block.lineage_hash, block.sequence_hash)

    def top(self, key: int | None, new: Mapping[int, int | None] = MappingProxyType({})) -> int | None:
        """The first ancestor of a block, or the block itself, that is not there. ``None``: all are, up to the root.

        Args:
            key: of the block.
            new: parents of blocks that are to be added.
        """
        parents = self.parents
        while key is not None and (key in parents or key in new):
            key = parents[key] if key in parents else new[key]
        return key

    def add(self, block: Resident) -> None:
        """Hold a new block, with the names it has."""
        key, parent = block.lineage_hash, block.lineage_parent
        self.slots[key] = block.slot
        self.blocks[block.slot] = block
        self.parents[key] = parent
        self._children[block.slot] = self.orphans.pop(key, 0)
        self._add_child(parent)
        for name in block.names:
            if name != key:
                self.odd[name] = key

    def add_chain(
        self,
        names: list[int],
        slots: list[int],
        parent: int | None,
        local_hashes: Sequence[int],
        token_ids: Sequence[Sequence[int]] | None,
    ) -> None:
        """Hold new blocks, each the parent of the next, and with one name that is its key. `add` of each, but faster.

        Args:
            names: none is among `orphans`.
            slots: of each.
            parent: name, and key, of the block before the first.
            local_hashes: of each, or empty.
            token_ids: of each, or ``None``.
        """
        befores = [parent, *names[:-1]]
        made = map(
            Resident, names, slots, names, befores, befores, local_hashes or repeat(0), token_ids or repeat(None)
        )
        blocks, children = self.blocks, self._children
        for slot, block in zip(slots, made, strict=True):
            blocks[slot] = block
            children[slot] = 1
        children[slots[-1]] = 0
        self.slots.update(zip(names, slots, strict=True))
        self.parents.update(zip(names, befores, strict=True))
        self._add_child(parent)

    def rename(self, block: Resident, name: int) -> Resident:
        """Make this the name by which a block goes, new to it or not; it keeps the others."""
        self.first.setdefault(block.lineage_hash, block.sequence_hash)
        aliases = tuple(other for other in block.names if other != name)
        renamed = replace(block, sequence_hash=name, aliases=aliases)
        self.blocks[block.slot] = renamed
        if name != block.lineage_hash:
            self.odd[name] = block.lineage_hash
        return renamed

    def pop(self, keys: Sequence[int]) -> list[Resident]:
        """Forget blocks, and return them."""
        gone = []
        slots, blocks, parents, children = self.slots, self.blocks, self.parents, self._children
        for key in keys:
            slot = slots.pop(key)
            block = blocks[slot]
            assert block is not None
            blocks[slot] = None
            gone.append(block)
            if children[slot]:
                self.orphans[key] = children[slot]
            if (parent := parents.pop(key)) is not None:
                if (above := slots.get(parent)) is not None:
                    children[above] -= 1
                elif self.orphans[parent] > 1:
                    self.orphans[parent] -= 1
                else:
                    del self.orphans[parent]
        if self.odd:
            for block in gone:
                self.first.pop(block.lineage_hash, None)
                for name in block.names:
                    self.odd.pop(name, None)
        return gone

    def children(self, key: int) -> int:
        """How many blocks that are there have this key as their parent."""
        slot = self.slots.get(key)
        return self.orphans.get(key, 0) if slot is None else self._children[slot]

    def _add_child(self, parent: int | None) -> None:
        if parent is not None:
            if (slot := self.slots.get(parent)) is None:
                self.orphans[parent] = self.orphans.get(parent, 0) + 1
            else:
                self._children[slot] += 1
