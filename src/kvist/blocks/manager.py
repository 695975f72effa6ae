"""`BlockManager`: carries out the moves of a scheduler on a pool of blocks.

Decisions only: it knows no bytes, no clock and no engine. It plans a move wholly before it changes anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, cast
from uuid import UUID

from msgspec import Struct, structs

from kvist.blocks.events import Stored
from kvist.blocks.held import items_at
from kvist.blocks.moves import Deref, FullBlock, LineageEntry, Move, PartialBlock, Promote, UniqueBlock, Use
from kvist.blocks.plan import Plan, plan_use
from kvist.blocks.pool import BlockPool, removed
from kvist.blocks.requests import Item, are_hashes, item_of, items_of, parts_of
from kvist.blocks.resident import Resident
from kvist.errors import Conflict, InvalidInput, NotFound


class PrefillCost(Struct, frozen=True):
    """What it would cost to prefill a sequence now.

    Attributes:
        new_blocks: blocks of the sequence that are not there.
        new_tokens: input tokens that are not in blocks that are there.
        cached_tokens: input tokens that are.
    """

    new_blocks: int
    new_tokens: int
    cached_tokens: int


class Prefillable(Protocol):
    """What `BlockManager.prefill_cost` reads of a sequence; `kvist.sim.sequence.ActiveSequence` has it."""

    @property
    def unique_blocks(self) -> Sequence[UniqueBlock]:
        """Its blocks, the root first."""

    @property
    def lineage(self) -> Sequence[LineageEntry]:
        """Of each full block; those for which there is none are matched by their sequence hashes."""

    @property
    def num_input_tokens(self) -> int:
        """Length of its prompt."""

    @property
    def enable_prefix_caching(self) -> bool:
        """Whether it may reuse blocks that it did not store itself."""


class BlockManager(BlockPool):
    """A pool that a scheduler drives by moves. See `BlockPool` for its arguments.

    The rules are those of the KVBM backend of NVIDIA Dynamo's mocker, with four corrections: a move is planned wholly
    before it is carried out; what it hits is never evicted for it; one Stored for each contiguous run, after the
    Removed that made room for it; every name of a block is told when it is stored, hit and removed.
    """

    def process(self, move: Move) -> int:
        """Carry out a move.

        Returns:
            Of a Use: how many leading blocks it handled, which stay held; fewer than asked for if the pool is full but
            for the block they come after, or if whoever is attached still reads evicted blocks: those count as on
            their way, so that asking again evicts no more. Of the others: 1.

        Raises:
            InvalidInput: the move cannot be right, or contradicts the lineage of a block that is there.
            NotFound: Deref or Promote of a block that is not held, or not as often.
        """
        if isinstance(move, Use):
            return self._use(move)
        if isinstance(move, Deref):
            self._give_back(move)
            return 1
        if isinstance(move, Promote):
            self._promote(move)
            return 1
        raise InvalidInput(f"a move must be a Use, Deref or Promote, not {move!r:.80}")

    def use(
        self,
        hashes: Sequence[int],
        *,
        local_hashes: Sequence[int] = (),
        token_ids: Sequence[Sequence[int]] | None = None,
        parent: int | None = None,
    ) -> int:
        """A `Use` of full blocks by their sequence hashes alone, which is `process`'s fast lane.

        Args:
            hashes: of a stretch of one sequence, its root side first.
            local_hashes: as in `Use`.
            token_ids: as in `Use`.
            parent: sequence hash of the block before the first, or ``None``.

        Returns:
            As `process`.

        Raises:
            InvalidInput: as `process`.
        """
        try:
            names = list(hashes)
        except TypeError:
            raise InvalidInput(f"use needs a sequence of hashes, not {hashes!r:.80}") from None
        handled = self._use_plain(names, local_hashes, token_ids, parent)
        if handled is not None:
            return handled
        blocks = [FullBlock(name) for name in names]
        above = None if parent is None else FullBlock(parent)
        return self._use_any(Use(blocks, local_hashes, (), token_ids, above))

    def deref(self, hashes: Sequence[int]) -> None:
        """A `Deref` of full blocks by their sequence hashes alone.

        Raises:
            InvalidInput: a hash cannot be one.
            NotFound: as `process`.
        """
        counts = self._references.counts
        try:
            chain = None if self._table.odd else self._held.take(hashes)
            names, slots = chain or (list(hashes), None)
            found = [] if slots is not None else list(map(self._table.slots.get, names))
        except TypeError:
            raise InvalidInput(f"Deref needs sequence_hash values, not {hashes!r:.80}") from None
        if slots is None:
            self._held.clear()
            slots = [slot for slot in found if slot is not None]
            plain = len(slots) == len(found) == len(set(slots)) and set(map(type, names)) <= {int}
            if self._table.odd or not plain:
                return self._deref_any([FullBlock(name) for name in names])
        if not slots:
            return None
        held = items_at(slots, counts)
        if 0 in held:
            return self._deref_any([FullBlock(name) for name in names])
        for slot in slots:
            counts[slot] -= 1
        if held.count(1) == len(held):
            return self._release(names)
        return self._release([name for name, count in zip(names, held, strict=True) if count == 1])

    def prefill_cost(self, sequence: Prefillable) -> PrefillCost:
        """What it would cost to prefill this sequence now. Changes nothing, and counts as no use.

        Its leading full blocks that are there are cached: none if it does without prefix caching. As in the original,
        a sequence may be cached wholly, though an engine computes at least its last token anew.
        """
        cached = 0
        if sequence.enable_prefix_caching:
            table, keys = self._table, sequence.lineage
            for index, block in enumerate(sequence.unique_blocks):
                if not isinstance(block, FullBlock):
                    break
                key = keys[index][0] if index < len(keys) else block.sequence_hash
                if table.find(block.sequence_hash) is None and table.get(key) is None:
                    break
                cached += 1
        cached_tokens = min(cached * self._block_size, sequence.num_input_tokens)
        return PrefillCost(
            new_blocks=len(sequence.unique_blocks) - cached,
            new_tokens=sequence.num_input_tokens - cached_tokens,
            cached_tokens=cached_tokens,
        )

    def _use(self, move: Use) -> int:
        names, partial = _full_and_partial(move.blocks, last=True)
        plain = (
            isinstance(move.lineage, list | tuple) and not move.lineage and isinstance(move.parent, FullBlock | None)
        )
        if names is None or not plain:
            return self._use_any(move)
        parent = move.parent.sequence_hash if isinstance(move.parent, FullBlock) else None
        handled = self._use_plain(names, move.local_hashes, move.token_ids, parent, partial)
        return self._use_any(move) if handled is None else handled

    def _give_back(self, move: Deref) -> None:
        names, partial = _full_and_partial(move.blocks, last=False)
        if names is None or (partial is not None and partial not in self._partials):
            return self._deref_any(move.blocks)
        self.deref(names)
        if partial is not None:
            self._slots.give((self._partials.pop(partial),))
        return None

    def _use_plain(
        self,
        names: list[int],
        local_hashes: Sequence[int],
        token_ids: Sequence[Sequence[int]] | None,
        parent: int | None,
        partial: UUID | None = None,
    ) -> int | None:
        """Use full blocks that are matched by their names, active ones, then inactive ones, then new ones; and one
        new partial block.

        Returns:
            ``None``, and nothing is done, if that is not the pattern, if they do not fit, or if they are not in order:
            `_use_any` does what this does, and all else.
        """
        table, counts = self._table, self._references.counts
        if table.odd or (parent is not None and (not are_hashes([parent]) or parent in names)):
            return None
        kept = None if parent is None else self._idle(parent)
        try:
            if not set(map(type, names)) <= {int}:
                return None
            found = list(map(table.slots.get, names))
        except TypeError:
            return None
        asked, misses = len(names), found.count(None)
        hits = asked - misses
        new = names[hits:]
        slots = [slot for slot in found if slot is not None] if misses else cast(list[int], found)
        held = items_at(slots, counts)
        idle = held.count(0)
        active = hits - idle
        taking = misses + (partial is not None)
        short = taking - len(self._slots)
        if (
            partial in self._partials
            or found[hits:].count(None) != misses
            or held[active:].count(0) != idle
            or taking + idle + (kept is not None) > len(self._slots) + self._inactive
            or (short > 0 and self._evictions is not None)
            or (new and not self._may_follow(new))
            or not self._are_told_of(asked, local_hashes, token_ids)
        ):
            return None
        if idle:
            try:
                self._policy.pin(names[active:hits])
            except Conflict:  # one is given twice
                return None
            self._inactive -= idle
        if active and self._policy.heeds_pinned:
            self._policy.touch(names[:active])
        for slot in slots:
            counts[slot] += 1
        differ = sum(items_at(slots, counts)) == sum(held) + hits
        gone = self._make_room(short, new, kept) if short > 0 else []
        taken = self._slots.take(taking)
        if partial is not None:
            self._partials[partial] = taken.pop()
        if new:
            anchor = names[hits - 1] if hits else parent
            local_hashes = local_hashes[hits:]
            token_ids = None if token_ids is None else token_ids[hits:]
            table.add_chain(new, taken, anchor, local_hashes, token_ids)
            self._policy.insert(new, pinned=True)
            for slot in taken:
                counts[slot] = 1
            slots += taken
        if differ:
            self._held.add(names, slots)
        if (new or gone) and self._log.is_heard:
            stored = [Stored(new, anchor, local_hashes, token_ids)] if new else []
            self._log.emit_all([*removed(gone), *stored])
        return asked + (partial is not None)

    def _may_follow(self, new: list[int]) -> bool:
        """Whether these are hashes of new blocks, which differ, and which no block that is there descends from."""
        return are_hashes(new) and len(set(new)) == len(new) and self._table.orphans.keys().isdisjoint(new)

    def _are_told_of(self, asked: int, local_hashes: Sequence[int], token_ids: Sequence[Sequence[int]] | None) -> bool:
        """Whether these can be what is known of ``asked`` full blocks."""
        try:
            return (not local_hashes or (len(local_hashes) == asked and are_hashes(local_hashes))) and (
                token_ids is None
                or (
                    len(token_ids) == asked
                    and set(map(type, token_ids)) <= {list, tuple}
                    and set(map(len, token_ids)) <= {self._block_size}
                )
            )
        except (TypeError, ValueError):  # ValueError: an array, which is neither true nor false
            return False

    def _use_any(self, move: Use) -> int:
        """Use any blocks, one by one."""
        items = items_of(move, self._table, self._block_size)
        kept = None if move.parent is None else self._idle(cast(FullBlock, move.parent).sequence_hash)
        plan = self._plan(items, self._capacity, len(self._slots) + self._inactive, kept)
        short = plan.misses - len(self._slots) - self._coming
        if short <= 0:  # what is still read covers what is missing, if anything is
            plan = self._plan_fitting(items, plan)
        self._pin(plan)
        gone: list[Resident] = []
        if short > 0:
            gone = self._make_room(short, list(plan.new), kept if kept not in plan.idle else None)
            fitting = self._plan_fitting(items, plan)
            self._unpin([key for key in plan.idle if key not in fitting.idle])
            plan = fitting
        self._carry_out(plan)
        self._tell(plan, gone, with_local=bool(move.local_hashes), with_tokens=move.token_ids is not None)
        return plan.handled

    def _idle(self, name: int) -> int | None:
        """The key of the block of this name, if it is there and nobody refers to it."""
        block = self._table.find(name)
        return None if block is None or self._references.counts[block.slot] else block.lineage_hash

    def _make_room(self, n: int, new: list[int], kept: int | None) -> list[Resident]:
        """Evict ``n`` blocks, because these are to be stored, but not the one they come after. See `_evict`."""
        self._policy.expect(new)
        if kept is None:
            return self._evict(n)
        self._policy.pin([kept])
        try:
            return self._evict(n)
        finally:
            self._policy.unpin([kept])

    def _plan(self, items: Sequence[Item], misses: int, takes: int, kept: int | None) -> Plan:
        counts = self._references.counts
        return plan_use(items, self._table, counts, self._partials, misses=misses, takes=takes, kept=kept)

    def _plan_fitting(self, items: Sequence[Item], plan: Plan) -> Plan:
        """The leading part of a plan for which slots are free now."""
        if plan.misses <= len(self._slots):
            return plan
        return self._plan(items, len(self._slots), self._capacity, None)

    def _pin(self, plan: Plan) -> None:
        """What is planned is one use of what it hits, which is not evicted for it."""
        self._policy.pin(list(plan.idle))
        self._inactive -= len(plan.idle)
        if self._policy.heeds_pinned:
            self._policy.touch(list(plan.active))

    def _unpin(self, keys: list[int]) -> None:
        """These hits come behind what fits."""
        self._policy.unpin(keys)
        self._inactive += len(keys)

    def _carry_out(self, plan: Plan) -> None:
        """Do what is planned, in which what nobody referred to is pinned, and for which there are free slots."""
        table = self._table
        slots = self._slots.take(plan.misses)
        blocks = [structs.replace(item, slot=slot) for item, slot in zip(plan.new.values(), slots, strict=False)]
        self._partials.update(zip(plan.partials, slots[len(blocks) :], strict=True))
        for block in blocks:
            table.add(block)
        self._policy.insert(list(plan.new), pinned=True)
        for name, key in zip(plan.names, plan.keys, strict=True):
            there = table.get(key)
            assert there is not None
            self._add_reference(there, name)

    def _tell(self, plan: Plan, gone: Sequence[Resident], *, with_local: bool, with_tokens: bool) -> None:
        if self._log.is_heard:
            stored = plan.stored(with_local=with_local, with_tokens=with_tokens)
            self._log.emit_all([*removed(gone), *stored])

    def _deref_any(self, blocks: Sequence[UniqueBlock]) -> None:
        """Give back any blocks, one by one."""
        parts = parts_of(blocks, "Deref")
        self._held.clear()
        for part, count in Counter(parts).items():
            held = self.refs(part) if isinstance(part, int) else int(part in self._partials)
            if count > held:
                raise NotFound(f"block {part} was to be given back {count} times, and is held {held} times")
        released = []
        for part in parts:
            if isinstance(part, UUID):
                self._slots.give((self._partials.pop(part),))
                continue
            block = self._table.find(part)
            assert block is not None
            self._references.drop(block, part)
            if not self._references.counts[block.slot]:
                released.append(block.lineage_hash)
        self._release(released)

    def _promote(self, move: Promote) -> None:
        item = item_of(move, self._table, self._block_size)
        if move.uuid not in self._partials:
            raise NotFound(f"partial block {move.uuid} was to be promoted, and is not held")
        slot = self._partials.pop(move.uuid)
        self._slots.give_first(slot)  # to be taken again at once, if the block is new
        plan = self._plan([item], 1, self._capacity, None)
        self._pin(plan)
        self._carry_out(plan)
        self._tell(plan, (), with_local=bool(move.local_hash), with_tokens=move.token_ids is not None)


def _full_and_partial(blocks: Sequence[UniqueBlock], *, last: bool) -> tuple[list[int] | None, UUID | None]:
    """The names of full blocks, and of one partial block behind them (if not ``last``: before them), if there is one.

    ``None`` for the names if that is not what the blocks are.
    """
    try:
        return [block.sequence_hash for block in blocks], None  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        pass
    if isinstance(blocks, Sequence) and blocks:
        partial, rest = (blocks[-1], blocks[:-1]) if last else (blocks[0], blocks[1:])
        if (
            isinstance(partial, PartialBlock)
            and isinstance(partial.uuid, UUID)
            and all(isinstance(block, FullBlock) for block in rest)
        ):
            return [block.sequence_hash for block in rest if isinstance(block, FullBlock)], partial.uuid
    return None, None
