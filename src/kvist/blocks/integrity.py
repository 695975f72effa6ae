"""What must hold between the parts of a pool, whatever happened to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from uuid import UUID

from kvist.blocks.policy import Policy
from kvist.blocks.references import References
from kvist.blocks.slots import Slots
from kvist.blocks.table import Table
from kvist.errors import IntegrityError


def check(
    *,
    capacity: int,
    table: Table,
    policy: Policy[int],
    references: References,
    partials: Mapping[UUID, int],
    slots: Slots,
    inactive: int,
) -> None:
    """Check a pool.

    Raises:
        IntegrityError: something does not hold; it names all that does not.
    """
    wrong = [
        *_wrong_slots(capacity, table, partials, slots),
        *_wrong_names(table),
        *_wrong_references(table, references),
        *_wrong_order(table, policy, references, inactive),
    ]
    if wrong:
        raise IntegrityError("; ".join(wrong))


def _wrong_slots(capacity: int, table: Table, partials: Mapping[UUID, int], slots: Slots) -> Iterator[str]:
    if not slots.reading <= slots.owned:
        yield f"slots {sorted(slots.reading - slots.owned)} are read, and have no owner"
    places = [*slots, *slots.owned, *partials.values(), *(block.slot for block in table)]
    if sorted(places) != list(range(capacity)):
        yield f"the slots of a pool of {capacity} are {sorted(places)}, not each once"


def _wrong_names(table: Table) -> Iterator[str]:
    names: dict[int, int] = {}
    for key, slot in table.slots.items():
        block = table.blocks[slot]
        if block is None or block.lineage_hash != key or block.slot != slot:
            yield f"block {key} is listed in slot {slot}, where {block} is"
            continue
        if table.parents.get(key, -1) != block.lineage_parent:
            yield f"the parent of block {key} is {block.lineage_parent}, not {table.parents.get(key, -1)}"
        for name in block.names:
            if name in names:
                yield f"name {name} belongs to block {names[name]} and block {key}"
            names[name] = key
            if table.find(name) is not block:
                yield f"block {key} is not found by its name {name}"
    if len(table.parents) != len(table):
        yield f"{len(table.parents)} parents are listed of {len(table)} blocks"
    if len(table) != sum(block is not None for block in table.blocks):
        yield f"{len(table)} blocks are listed, and others are in slots"
    if table.odd != {name: key for name, key in names.items() if name != key}:
        yield f"names are listed as {table.odd}"
    several = {block.lineage_hash: block.names for block in table if block.aliases}
    if table.first.keys() != several.keys() or any(table.first[key] not in several[key] for key in several):
        yield f"the first names of blocks that have several are listed as {table.first}"
    children = Counter(parent for parent in table.parents.values() if parent is not None)
    for key in {*children, *table.slots, *table.orphans}:
        if table.children(key) != children[key]:
            yield f"block {key} has {children[key]} children, not {table.children(key)}"
    if table.orphans != {key: count for key, count in children.items() if key not in table.slots}:
        yield f"parents that are not there are listed as {table.orphans}"
    sound: set[int] = set()
    for key in table.slots:
        path: dict[int, None] = {}
        above: int | None = key
        while above is not None and above in table.parents and above not in sound:
            if above in path:
                yield f"block {above} descends from itself"
                break
            path[above] = None
            above = table.parents[above]
        sound.update(path)


def _wrong_references(table: Table, references: References) -> Iterator[str]:
    named: dict[int, int] = {}
    for slot, (block, count) in enumerate(zip(table.blocks, references.counts, strict=True)):
        if count < 0 or (block is None and count):
            yield f"there are {count} references to what is in slot {slot}"
        if block is not None and block.aliases and count:
            counts = {name: references.named[name] for name in block.names if name in references.named}
            if sum(counts.values()) != count or min(counts.values()) < 1:
                yield f"there are {count} references to block {block.lineage_hash}, and by name {counts}"
            named.update(counts)
    if named != references.named:
        yield f"references by name are listed as {references.named}"


def _wrong_order(table: Table, policy: Policy[int], references: References, inactive: int) -> Iterator[str]:
    idle = {block.lineage_hash for block in table if not references.counts[block.slot]}
    if inactive != len(idle):
        yield f"{inactive} blocks are counted as inactive, and {len(idle)} are"
    order = list(policy)
    if len(order) != len(idle) or set(order) != idle:
        yield f"the policy would evict {order}, and {sorted(idle)} are inactive"
    if len(policy) != len(table):
        yield f"the policy holds {len(policy)} blocks of {len(table)}"
