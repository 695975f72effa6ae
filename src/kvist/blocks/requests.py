"""Moves made plain: what a `Use` asks for, block by block, once it is known to be sound. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from uuid import UUID

from kvist.blocks.moves import FullBlock, LineageEntry, PartialBlock, Promote, UniqueBlock, Use
from kvist.blocks.resident import Resident
from kvist.blocks.table import Table
from kvist.errors import InvalidInput

NAME_LIMIT = 1 << 64
KEY_LIMIT = 1 << 128

Item = Resident | UUID
"""One block that a move asks for: a full one as it would be stored, or the name of a partial one."""


def are_hashes(values: Sequence[object]) -> bool:
    """Whether these are sequence hashes or local hashes: what `require_hashes` says, of many, and faster."""
    return set(map(type, values)) <= {int} and (not values or (min(values) >= 0 and max(values) < NAME_LIMIT))  # type: ignore[type-var, operator]


def require_hashes(hashes: Iterable[object], what: str, limit: int = NAME_LIMIT) -> None:
    """Check that these are hashes.

    Raises:
        InvalidInput: one is not an integer of 0 or more below ``limit``.
    """
    for value in hashes:
        if type(value) is not int or not 0 <= value < limit:
            raise InvalidInput(f"{what} must be an integer from 0 to 2**{limit.bit_length() - 1}-1, not {value!r:.80}")


def require_tokens(token_ids: Iterable[object], block_size: int) -> None:
    """Check that these are the tokens of full blocks.

    Raises:
        InvalidInput: one has not ``block_size`` tokens.
    """
    for tokens in token_ids:
        if not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes) or len(tokens) != block_size:
            raise InvalidInput(f"token_ids of a full block must be {block_size} tokens, not {tokens!r:.80}")


def parts_of(blocks: Sequence[UniqueBlock], what: str) -> list[int | UUID]:
    """The name of each block.

    Raises:
        InvalidInput: one is no block.
    """
    if not isinstance(blocks, Sequence):
        raise InvalidInput(f"{what} needs a sequence of blocks, not {blocks!r:.80}")
    parts: list[int | UUID] = []
    for block in blocks:
        if isinstance(block, FullBlock):
            require_hashes((block.sequence_hash,), "sequence_hash")
            parts.append(block.sequence_hash)
        elif isinstance(block, PartialBlock) and isinstance(block.uuid, UUID):
            parts.append(block.uuid)
        else:
            raise InvalidInput(f"{what} needs FullBlock or PartialBlock, not {block!r:.80}")
    return parts


def items_of(move: Use, table: Table, block_size: int) -> list[Item]:
    """What a move asks for, in order.

    Raises:
        InvalidInput: a field has the wrong type or length; the parent is partial, or one of the blocks; a lineage
            entry contradicts another, or the block that is there.
    """
    parts = parts_of(move.blocks, "Use")
    names = [part for part in parts if isinstance(part, int)]
    parent = _parent_of(move, names)
    _require_lengths(move, len(names))
    require_hashes(move.local_hashes, "local_hash")
    if move.token_ids is not None:
        require_tokens(move.token_ids, block_size)
    entries = _explicit(move, table, names) if move.lineage else _implied(table, names, parent)
    befores: list[int | None] = [parent, *names]
    full = iter(
        zip(
            names,
            entries,
            befores,
            move.local_hashes or repeat(0),
            move.token_ids or repeat(None),
            strict=False,  # the last name is nobody's parent
        )
    )
    items: list[Item] = []
    for part in parts:
        if isinstance(part, UUID):
            items.append(part)
        else:
            name, (key, key_parent), before, local_hash, tokens = next(full)
            items.append(Resident(name, -1, key, key_parent, before, local_hash, tokens))
    return items


def item_of(move: Promote, table: Table, block_size: int) -> Resident:
    """The block that a partial one becomes.

    Raises:
        InvalidInput: as `items_of`.
    """
    if not isinstance(move.uuid, UUID):
        raise InvalidInput(f"Promote needs the uuid of a partial block, not {move.uuid!r:.80}")
    (item,) = items_of(
        Use(
            blocks=[FullBlock(move.sequence_hash)],
            local_hashes=[move.local_hash],
            lineage=() if move.lineage is None else [move.lineage],
            token_ids=None if move.token_ids is None else [move.token_ids],
            parent=None if move.parent_hash is None else FullBlock(move.parent_hash),
        ),
        table,
        block_size,
    )
    assert isinstance(item, Resident)
    return item


def _parent_of(move: Use, names: Sequence[int]) -> int | None:
    if move.parent is None:
        return None
    if not isinstance(move.parent, FullBlock):
        raise InvalidInput(f"the parent of a Use must be a FullBlock, not {move.parent!r:.80}")
    parent = move.parent.sequence_hash
    require_hashes((parent,), "the parent's sequence_hash")
    if parent in names:
        raise InvalidInput(f"block {parent} cannot be its own ancestor: it is the parent, and among the blocks")
    return parent


def _require_lengths(move: Use, full: int) -> None:
    for field, values in (
        ("local_hashes", move.local_hashes),
        ("lineage", move.lineage),
        ("token_ids", () if move.token_ids is None else move.token_ids),
    ):
        if not isinstance(values, Sequence):
            raise InvalidInput(f"{field} of a Use must be a sequence, not {values!r:.80}")
        if values and len(values) != full:
            raise InvalidInput(f"{field} of a Use must name {full} full blocks, not {len(values)}")
    if move.token_ids is not None and len(move.token_ids) != full:
        raise InvalidInput(f"token_ids of a Use must name {full} full blocks, not {len(move.token_ids)}")


def _implied(table: Table, names: Sequence[int], parent: int | None) -> list[LineageEntry]:
    """Lineage entries for blocks that come without: each by its name, and after the block before it.

    Whoever names blocks in an order that contradicts earlier ones gets a root where a block would descend from itself.
    """
    keys = [table.key_of(name) for name in names]
    befores = [None if parent is None else table.key_of(parent), *keys]
    entries: list[LineageEntry] = list(zip(keys, befores, strict=False))
    for index in _cycles(entries, table):
        entries[index] = (keys[index], None)
    return entries


def _explicit(move: Use, table: Table, names: Sequence[int]) -> list[LineageEntry]:
    """The lineage entries of a move, which contradict neither each other nor what is there."""
    keys: dict[int, int] = {}
    parents: dict[int, int | None] = {}
    for name, entry in zip(names, move.lineage, strict=True):
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise InvalidInput(f"a lineage entry must be (hash, parent hash or None), not {entry!r:.80}")
        key, parent = entry
        require_hashes((key,) if parent is None else entry, "a lineage hash", KEY_LIMIT)
        block = table.find(name)
        known = keys.setdefault(name, key if block is None else block.lineage_hash)
        if known != key:
            raise InvalidInput(f"block {name} is of lineage {known}, not {key}")
        if (known_parent := parents.setdefault(key, table.parents.get(key, parent))) != parent:
            raise InvalidInput(f"the parent of lineage {key} is {known_parent}, not {parent}")
    for index in _cycles(move.lineage, table):
        raise InvalidInput(f"lineage {move.lineage[index][0]} would be its own ancestor")
    return list(move.lineage)


def _cycles(entries: Sequence[LineageEntry], table: Table) -> Iterator[int]:
    """Where a block that is new would descend from itself. The caller makes it a root, or gives up."""
    new: dict[int, int | None] = {}
    last = top = None
    for index, (key, parent) in enumerate(entries):
        if key in table.parents or key in new:
            continue
        if parent is None or parent != last:  # else the chain goes on
            top = table.top(parent, new)
        if top is not None and top == key:
            yield index
            parent = top = None
        new[key] = parent
        last = key
