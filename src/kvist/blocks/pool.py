"""`BlockPool`: the blocks of one tier of one worker: who holds which, and which of them go.

Decisions only: it knows no bytes, no clock, no engine and no moves. It tells of every change in events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from uuid import UUID

from msgspec.structs import replace

from kvist.blocks import integrity
from kvist.blocks.events import Cleared, Event, EventLog, Removed, Stored
from kvist.blocks.held import Held
from kvist.blocks.policy import Policy, make_policy
from kvist.blocks.references import References
from kvist.blocks.requests import KEY_LIMIT, require_hashes, require_tokens
from kvist.blocks.resident import Evictions, Resident
from kvist.blocks.slots import Slots
from kvist.blocks.table import Table
from kvist.errors import Conflict, InvalidInput, NotFound, PoolExhausted


class BlockPool:
    """Blocks that are free, active (referred to, partial, or lent), or inactive (full, kept until they are evicted).

    A full block is its lineage hash; sequence hashes are the names by which it is referred to, mostly one. A reference
    belongs to the name by which it was taken. Calls come from one thread at a time. Calls that raise a typed error
    have changed nothing.

    Args:
        capacity: how many blocks, 1 or more.
        block_size: tokens in a block, 1 or more.
        policy: one of `kvist.blocks.policy.POLICIES`, or an empty policy over lineage hashes.
        events: who hears of what is stored and removed: a sink, or a log that other tiers share. A sink's error reaches
            the caller, who then does not hear what the call returns; the change is made, and told wholly.
        dp_rank: data-parallel rank in events; a log has its own.

    Raises:
        InvalidInput: one of these cannot be right.
    """

    def __init__(
        self,
        capacity: int,
        block_size: int,
        policy: str | Policy[int] = "lineage",
        events: Callable[[Event], None] | EventLog | None = None,
        dp_rank: int = 0,
    ) -> None:
        for name, value, least in (("capacity", capacity, 1), ("block_size", block_size, 1), ("dp_rank", dp_rank, 0)):
            if type(value) is not int or value < least:
                raise InvalidInput(f"{name} must be an integer of {least} or more, not {value!r:.80}")
        self._capacity = capacity
        self._block_size = block_size
        if not isinstance(policy, str | Policy):
            raise InvalidInput(f"policy must be a name or a Policy, not {policy!r:.80}")
        if not (events is None or isinstance(events, EventLog) or callable(events)):
            raise InvalidInput(f"events must be a function or an EventLog, not {events!r:.80}")
        self._log = events if isinstance(events, EventLog) else EventLog(events, dp_rank=dp_rank)
        self._table = Table(capacity)
        self._policy: Policy[int] = (
            make_policy(policy, capacity=capacity, parents=self._table.parents) if isinstance(policy, str) else policy
        )
        if len(self._policy) != 0:
            raise InvalidInput(f"the policy of a new pool must be empty, not hold {len(self._policy)} keys")
        self._references = References(capacity)
        self._held = Held()
        self._partials: dict[UUID, int] = {}  # the slot of each
        self._slots = Slots(capacity)
        self._inactive = 0
        self._evictions: Evictions | None = None

    @property
    def capacity(self) -> int:
        """How many blocks the pool has."""
        return self._capacity

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank in its events."""
        return self._log.dp_rank

    @property
    def log(self) -> EventLog:
        """Where its events go; tiers below share it."""
        return self._log

    @property
    def num_active_blocks(self) -> int:
        """Blocks that are neither free nor inactive, each once; partial and lent ones too."""
        return self._capacity - len(self._slots) - self._inactive

    @property
    def num_active_block_refs(self) -> int:
        """References to full blocks, and partial blocks. O(capacity)."""
        return len(self._partials) + sum(self._references.counts)

    @property
    def num_inactive_blocks(self) -> int:
        """Full blocks that nobody refers to: they can be hit, and evicted."""
        return self._inactive

    @property
    def num_partial_blocks(self) -> int:
        """Blocks that are being filled."""
        return len(self._partials)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return len(self._slots)

    @property
    def active_fraction(self) -> float:
        """Active blocks of the capacity, 0 to 1."""
        return self.num_active_blocks / self._capacity

    @property
    def has_offload(self) -> bool:
        """Whether somebody is attached."""
        return self._evictions is not None

    def attach(self, evictions: Evictions) -> None:
        """Tell this one of what is released and evicted from now on.

        Raises:
            Conflict: somebody is attached.
        """
        if self._evictions is not None:
            raise Conflict("somebody is told of this pool's evictions already; detach first")
        self._evictions = evictions

    def detach(self) -> None:
        """Tell nobody any more. Slots that are still read stay lent until `free` gets them.

        Raises:
            NotFound: nobody is attached.
        """
        if self._evictions is None:
            raise NotFound("nobody is attached to this pool")
        self._evictions = None

    def residents(self) -> list[Resident]:
        """All full blocks, active and inactive, in the order in which they were stored."""
        return list(self._table)

    def refs(self, sequence_hash: int) -> int:
        """How many references are held by this name.

        Raises:
            InvalidInput: it cannot be a name.
        """
        require_hashes((sequence_hash,), "sequence_hash")
        block = self._table.find(sequence_hash)
        return 0 if block is None else self._references.by(block, sequence_hash)

    def __contains__(self, sequence_hash: object) -> bool:
        """Whether a full block of this name is there."""
        return isinstance(sequence_hash, int) and self._table.find(sequence_hash) is not None

    def peek(self, hashes: Sequence[int]) -> int:
        """How many leading sequence hashes name blocks that are there. Changes nothing, and counts as no use.

        Raises:
            InvalidInput: these cannot be names.
        """
        find = self._table.find
        try:
            for index, name in enumerate(hashes):
                if find(name) is None:
                    return index
            return len(hashes)
        except TypeError:
            raise InvalidInput(f"sequence hashes were expected, not {hashes!r:.80}") from None

    def match(self, hashes: Sequence[int], *, whole: bool = False) -> int:
        """Refer to the longest leading part that is there, once each.

        Args:
            hashes: sequence hashes, the root first.
            whole: all of it, or nothing.

        Returns:
            How many leading hashes are referred to now; `BlockManager.deref` gives them back.

        Raises:
            InvalidInput: a hash is given twice, or cannot be one.
        """
        if not isinstance(hashes, Sequence):
            raise InvalidInput(f"sequence hashes were expected, not {hashes!r:.80}")
        require_hashes(hashes, "a hash to match")
        if len(set(hashes)) != len(hashes):
            raise InvalidInput("a hash to match is given twice")
        matched = self.peek(hashes)
        if whole and matched < len(hashes):
            return 0
        self._refer(hashes[:matched])
        return matched

    def allocate(self, n: int) -> list[int]:
        """Lend ``n`` slots, all or none; evict for them if need be.

        Returns:
            The slots. None of them if whoever is attached still reads some that were evicted, for this or before: ask
            again when it has freed those. What it reads counts as on its way: only what that does not cover is evicted.

        Raises:
            InvalidInput: ``n`` is no integer of 0 or more.
            PoolExhausted: fewer are free, inactive, or on their way.
        """
        if type(n) is not int or n < 0:
            raise InvalidInput(f"cannot allocate {n!r:.80} slots")
        coming = self._coming
        if n > len(self._slots) + self._inactive + coming:
            raise PoolExhausted(
                f"{n} slots were asked for; {len(self._slots)} are free, {self._inactive} inactive and {coming} on "
                f"their way of {self._capacity}"
            )
        if (short := n - len(self._slots) - coming) > 0:
            self._log.emit_all(removed(self._evict(short)))
        return self._slots.lend(n) if n <= len(self._slots) else []

    def free(self, slots: Sequence[int]) -> None:
        """Give back slots that `allocate` lent, or that `Evictions.evicted` said are still read.

        Raises:
            InvalidInput: they are no sequence of numbers.
            NotFound: one is not lent, or given twice.
        """
        self._slots.require_owned(slots)
        self._slots.disown(slots)
        self._slots.give(slots)

    def register(self, blocks: Sequence[Resident], slots: Sequence[int], *, parent: int | None = None) -> int:
        """Put full blocks into lent slots, each after the one before it, as inactive blocks; as a swap-in does.

        One slot is used up for each block: what is there already gives its slot back, and the next is told as its
        child. Slots beyond the blocks stay lent. The policy counts it as one use; `Evictions` is not told.

        Args:
            blocks: as they are to be; their ``slot``, ``parent`` and ``aliases`` say nothing.
            slots: that `allocate` lent.
            parent: sequence hash of the block before the first, or ``None``.

        Returns:
            How many blocks were put: fewer than given if there are fewer slots.

        Raises:
            NotFound: a slot is not lent, or given twice.
            InvalidInput: a block cannot be right, is given twice, or contradicts one that is there.
        """
        self._slots.require_owned(slots)
        if not isinstance(blocks, Sequence) or not all(isinstance(block, Resident) for block in blocks):
            raise InvalidInput(f"blocks to register must be a sequence of Resident, not {blocks!r:.80}")
        putting = blocks[: len(slots)]
        self._require_sound(putting, parent)
        parent = None if parent is None else self._table.first_name(parent)
        runs: list[list[Resident]] = [[]]
        for block, slot in zip(putting, slots, strict=False):  # slots may be left over
            there = self._table.get(block.lineage_hash)
            if there is None:
                runs[-1].append(replace(block, slot=slot, parent=parent, aliases=()))
                parent = block.sequence_hash
            else:
                self._slots.give((slot,))
                runs.append([])
                parent = self._table.first_name(there.sequence_hash)
        self._slots.disown(slots[: len(putting)])
        new = [block for run in runs for block in run]
        for block in new:
            self._table.add(block)
        self._policy.insert([block.lineage_hash for block in new])
        self._inactive += len(new)
        if self._log.is_heard:
            self._log.emit_all(map(told, filter(None, runs)))
        return len(putting)

    def clear(self) -> None:
        """Evict all blocks at once, without offering them to whoever is attached.

        Publishes Cleared; if the log has ever told of other tiers, which may keep their blocks, Removed.

        Raises:
            Conflict: blocks are active, or whoever is attached reads some.
        """
        if self.num_active_blocks:
            raise Conflict(f"{self.num_active_blocks} blocks are active; a pool is cleared when none is")
        if self._evictions is not None and self._evictions.is_reading:
            raise Conflict("blocks are being copied, or wait for it; a pool is cleared when none is")
        if not self._inactive:
            return
        gone = self._table.pop(self._policy.evict(self._inactive))
        self._inactive = 0
        self._slots.give(block.slot for block in gone)
        self._log.emit_all(removed(gone) if self._log.tells_of_lower else (Cleared(),))

    def check_integrity(self) -> None:
        """Check every invariant that ties the parts of the pool together. O(capacity).

        Raises:
            IntegrityError: one does not hold, which is an error of the pool or of its policy.
        """
        integrity.check(
            capacity=self._capacity,
            table=self._table,
            policy=self._policy,
            references=self._references,
            partials=self._partials,
            slots=self._slots,
            inactive=self._inactive,
        )

    @property
    def _coming(self) -> int:
        """How many slots whoever is attached still reads, and is to free."""
        return 0 if self._evictions is None else len(self._slots.reading)

    def _refer(self, names: Sequence[int]) -> None:
        """Refer once to each of these blocks, which are there and differ."""
        idle: list[int] = []
        active: list[int] = []
        for name in names:
            block = self._table.find(name)
            assert block is not None
            (active if self._references.counts[block.slot] else idle).append(block.lineage_hash)
            self._add_reference(block, name)
        if self._policy.heeds_pinned:
            self._policy.touch(active)
        self._policy.pin(idle)
        self._inactive -= len(idle)

    def _add_reference(self, block: Resident, name: int) -> None:
        """Refer once to a block that is there by a name, which may be new to it."""
        if block.sequence_hash != name:
            if not block.aliases:
                self._references.split(block)
            block = self._table.rename(block, name)
        self._references.add(block, name)

    def _release(self, keys: list[int]) -> None:
        """Nobody refers to these blocks any more, in this order. The list is used up."""
        if keys:
            keys.reverse()
            self._policy.unpin(keys)
            self._inactive += len(keys)
            if self._evictions is not None:
                self._evictions.released([block for block in map(self._table.get, reversed(keys)) if block])

    def _evict(self, n: int) -> list[Resident]:
        """Make room for ``n`` blocks, of which slots that are still read are none. The caller tells of it."""
        gone = self._table.pop(self._policy.evict(n))
        self._inactive -= n
        if self._evictions is None:
            self._slots.give([block.slot for block in gone])
            return gone
        read: set[int] = set()
        try:
            read.update(self._evictions.evicted(gone))
        finally:
            self._slots.give([block.slot for block in gone if block.slot not in read])
            self._slots.keep(block.slot for block in gone if block.slot in read)
        return gone

    def _require_sound(self, blocks: Sequence[Resident], parent: int | None) -> None:
        """Check blocks that are to be registered."""
        require_hashes([block.sequence_hash for block in blocks], "sequence_hash")
        require_hashes([block.lineage_hash for block in blocks], "a lineage hash", KEY_LIMIT)
        require_hashes([block.local_hash for block in blocks], "local_hash")
        require_tokens([block.token_ids for block in blocks if block.token_ids is not None], self._block_size)
        if parent is not None:
            require_hashes((parent,), "parent")
        for names in ([block.sequence_hash for block in blocks], [block.lineage_hash for block in blocks]):
            if len(set(names)) != len(names):
                raise InvalidInput("a block to register is given twice")
        new: dict[int, int | None] = {}
        for block in blocks:
            key, above = block.lineage_hash, block.lineage_parent
            named = self._table.find(block.sequence_hash)
            if named is not None and named.lineage_hash != key:
                raise InvalidInput(f"block {block.sequence_hash} is of lineage {named.lineage_hash}, not {key}")
            if self._table.parents.get(key, above) != above:
                raise InvalidInput(f"the parent of lineage {key} is {self._table.parents[key]}, not {above}")
            if key not in self._table.parents:
                if self._table.top(above, new) == key:
                    raise InvalidInput(f"lineage {key} would be its own ancestor")
                new[key] = above


def removed(gone: Sequence[Resident]) -> list[Removed]:
    """What to say of blocks that went: nothing if none did."""
    return [Removed([name for block in gone for name in block.names])] if gone else []


def told(run: Sequence[Resident]) -> Stored:
    """What to say of one contiguous run of blocks; token ids only if all of them are known."""
    tokens = [block.token_ids for block in run if block.token_ids is not None]
    return Stored(
        hashes=[block.sequence_hash for block in run],
        parent=run[0].parent,
        local_hashes=[block.local_hash for block in run],
        token_ids=tokens if len(tokens) == len(run) else None,
    )
