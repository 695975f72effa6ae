"""`Plan`: what a move comes to, worked out before anything changes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from uuid import UUID

from msgspec.structs import replace

from kvist.blocks.events import Stored
from kvist.blocks.requests import Item
from kvist.blocks.resident import Resident
from kvist.blocks.table import Table


class Plan:
    """What to do for the longest leading part of a move that fits.

    Attributes:
        handled: how many leading blocks fit.
        names: of the full blocks among them, as often as they are named.
        keys: of the same.
        idle: keys of blocks that nobody refers to, the root first; once each.
        active: keys of blocks that somebody refers to; once each.
        new: blocks to be stored, by key; their slots are not yet chosen.
        partials: new partial blocks.
        told: full blocks of which an index does not know the name, in order.
    """

    def __init__(self) -> None:
        self.handled = 0
        self.names: list[int] = []
        self.keys: list[int] = []
        self.idle: dict[int, None] = {}
        self.active: dict[int, None] = {}
        self.new: dict[int, Resident] = {}
        self.partials: dict[UUID, None] = {}
        self.told: list[Resident] = []

    @property
    def misses(self) -> int:
        """How many slots are to be taken."""
        return len(self.new) + len(self.partials)

    def stored(self, *, with_local: bool, with_tokens: bool) -> list[Stored]:
        """One event for each contiguous run of what is to be told.

        Args:
            with_local: local hashes are known.
            with_tokens: token ids are known.
        """
        runs: list[list[Resident]] = []
        for item in self.told:
            if runs and runs[-1][-1].sequence_hash == item.parent:
                runs[-1].append(item)
            else:
                runs.append([item])
        return [
            Stored(
                hashes=[item.sequence_hash for item in run],
                parent=run[0].parent,
                local_hashes=[item.local_hash for item in run] if with_local else (),
                token_ids=[item.token_ids or () for item in run] if with_tokens else None,
            )
            for run in runs
        ]


def plan_use(
    items: Sequence[Item],
    table: Table,
    counts: Sequence[int],
    partials: Container[UUID],
    *,
    misses: int,
    takes: int,
    kept: int | None = None,
) -> Plan:
    """Plan a `Use`.

    Args:
        items: what it asks for.
        table: the blocks that are there.
        counts: references to the block in each slot.
        partials: the partial blocks that are there.
        misses: how many blocks may be stored.
        takes: how many blocks that nobody refers to may be stored, hit or kept.
        kept: key of such a block that is to stay where it is.
    """
    plan = Plan()
    known: dict[int, set[int]] = {}  # names of each key, after the move
    first: dict[int, int] = {}  # of each name, the one by which its block was told first
    for item in items:
        taken = plan.misses + len(plan.idle) + (kept is not None and kept not in plan.idle)
        if isinstance(item, UUID):
            if item not in partials and item not in plan.partials:
                if plan.misses >= misses or taken >= takes:
                    break
                plan.partials[item] = None
        else:
            key = item.lineage_hash
            block = table.get(key)
            if (before := item.parent) is not None:
                above = first[before] if before in first else table.first_name(before)
                item = item if above == before else replace(item, parent=above)
            if block is None and key not in plan.new:
                if plan.misses >= misses or taken >= takes:
                    break
                plan.new[key] = item
            elif block is not None and counts[block.slot]:
                plan.active[key] = None
            elif block is not None and key not in plan.idle:
                if taken >= takes:
                    break
                plan.idle[key] = None
            if item.sequence_hash not in known.setdefault(key, set() if block is None else set(block.names)):
                known[key].add(item.sequence_hash)
                plan.told.append(item)
            told_as = plan.new[key].sequence_hash if block is None else table.first_name(block.sequence_hash)
            first[item.sequence_hash] = told_as
            plan.names.append(item.sequence_hash)
            plan.keys.append(key)
        plan.handled += 1
    return plan
