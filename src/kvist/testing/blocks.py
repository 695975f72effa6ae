"""`ManagerMachine`: any moves on a block manager, beside a plain model of it and an index that follows its events.

    class TestManager(ManagerMachine.TestCase): ...

Or with settings and a policy of your own: subclass `ManagerMachine`, and override `policy`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from random import Random
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvist.blocks import (
    BlockManager,
    Cleared,
    Deref,
    Event,
    FullBlock,
    PartialBlock,
    Promote,
    Removed,
    Resident,
    Stored,
    UniqueBlock,
    Use,
)
from kvist.errors import Conflict, InvalidInput, NotFound, PoolExhausted

_NAMES = st.integers(0, 15)
_UUIDS = st.integers(0, 3).map(lambda number: UUID(int=number))
_BLOCKS = st.lists(_NAMES.map(FullBlock) | _UUIDS.map(PartialBlock), max_size=6)
_CHAINS = st.lists(st.integers(0, 1), max_size=5).map(
    lambda turns: [FullBlock((1 << depth) - 1 + sum(turns[:depth]) % (1 << depth)) for depth in range(len(turns))]
)
"""Paths of one tree, the root first: blocks that always have the same block before them."""


def replay(events: Sequence[Event], held: Collection[int] = (), first: int = 0) -> set[int]:
    """The names that a plain index holds once it heard all these events; raises if they are not in order.

    Args:
        events: the next of a log.
        held: the names that it held before.
        first: number of the first event.
    """
    held = set(held)
    for number, event in enumerate(events, first):
        assert event.event_id == number
        match event.data:
            case Stored(hashes=hashes):
                assert hashes
                assert held.isdisjoint(hashes)
                held.update(hashes)
            case Removed(hashes=hashes):
                assert hashes
                assert held.issuperset(hashes)
                held.difference_update(hashes)
            case Cleared():
                held.clear()
    return held


class Reading:
    """Told of evictions; says of every other block that it is still read."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.told = 0

    def evicted(self, blocks: Sequence[Resident]) -> Collection[int]:
        """See `Evictions.evicted`."""
        slots = [block.slot for block in blocks if block.slot % 2]
        self.read += slots
        self.told += len(blocks)
        return slots

    def released(self, blocks: Sequence[Resident]) -> None:
        """See `Evictions.released`."""
        assert blocks


class ManagerMachine(RuleBasedStateMachine):
    """Any moves, sound or not. What is refused changes nothing; references are those of a plain count."""

    policy = "lineage"

    @initialize(capacity=st.integers(1, 10), aliases=st.booleans())
    def start(self, capacity: int, aliases: bool) -> None:
        """An empty manager; in some runs no block ever has two names."""
        self.aliases = aliases
        self.events: list[Event] = []
        self.followed: set[int] = set()  # by the index, after the events that are forgotten
        self.forgotten = 0
        self.manager = BlockManager(capacity, 4, self.policy, self.events.append)
        self.references: Counter[int] = Counter()
        self.partials: set[UUID] = set()
        self.lent: list[int] = []
        self.reading = Reading()

    def _refused(self, move: Use | Deref | Promote) -> bool:
        """Carry out a move that may be refused, and then has changed nothing."""
        before = self._state()
        try:
            self.handled = self.manager.process(move)
        except (InvalidInput, NotFound):
            assert self._state() == before
            return True
        return False

    def _state(self) -> tuple[object, ...]:
        manager = self.manager
        return manager.residents(), manager.num_active_block_refs, manager.num_free_blocks, len(self.events)

    def _took(self, blocks: Sequence[UniqueBlock]) -> None:
        for block in blocks:
            if isinstance(block, FullBlock):
                self.references[block.sequence_hash] += 1
            else:
                self.partials.add(block.uuid)

    @rule(
        blocks=_BLOCKS | _CHAINS,
        lineage=st.sampled_from(["implied", "named", "shared"]),
        parent=st.none() | st.none() | _NAMES.map(FullBlock),
        told=st.booleans(),
    )
    def use(self, blocks: list[UniqueBlock], lineage: str, parent: FullBlock | None, told: bool) -> None:
        """Blocks in a sound order or in any; with their own lineage, or two names a block."""
        names = [block.sequence_hash for block in blocks if isinstance(block, FullBlock)]
        keys = [name // 2 * 2 + 100 if lineage == "shared" and self.aliases else name for name in names]
        room = self.manager.num_free_blocks + self.manager.num_inactive_blocks
        move = Use(
            blocks,
            local_hashes=[name + 1000 for name in names] if told else (),
            lineage=() if lineage == "implied" else [(key, None) for key in keys],
            token_ids=[[name] * 4 for name in names] if told else None,
            parent=parent,
        )
        if self._refused(move):
            return
        assert self.handled == len(blocks) or self.handled >= 0
        self._took(blocks[: self.handled])
        if self.handled < len(blocks) and not self.manager.has_offload:
            assert self.manager.num_free_blocks + self.manager.num_inactive_blocks == 0 or room == 0

    @rule(blocks=_BLOCKS)
    def give_back_any(self, blocks: list[UniqueBlock]) -> None:
        """Blocks that are held, or not."""
        asked = Counter(block.sequence_hash for block in blocks if isinstance(block, FullBlock))
        uuids = Counter(block.uuid for block in blocks if isinstance(block, PartialBlock))
        sound = asked <= self.references and uuids <= Counter(self.partials)
        assert self._refused(Deref(blocks)) is not sound
        if sound:
            self.references -= asked
            self.partials -= uuids.keys()

    @rule(rng=st.randoms(use_true_random=False))
    def give_back(self, rng: Random) -> None:
        """Some of what is held, in any order."""
        blocks: list[UniqueBlock] = [FullBlock(name) for name in sorted(self.references.elements())]
        blocks += [PartialBlock(uuid) for uuid in sorted(self.partials)]
        rng.shuffle(blocks)
        del blocks[rng.randint(0, len(blocks)) :]
        assert not self._refused(Deref(blocks))
        self.references -= Counter(block.sequence_hash for block in blocks if isinstance(block, FullBlock))
        self.partials -= {block.uuid for block in blocks if isinstance(block, PartialBlock)}

    @rule(uuid=_UUIDS, name=_NAMES, parent=st.none() | _NAMES, shared=st.booleans())
    def promote(self, uuid: UUID, name: int, parent: int | None, shared: bool) -> None:
        """A partial block that is there, or not."""
        entry = (name // 2 * 2 + 100, None) if shared and self.aliases else None
        if not self._refused(Promote(uuid, name, parent, name + 1000, entry)):
            self.partials.remove(uuid)
            self.references[name] += 1

    @rule(names=st.lists(_NAMES, max_size=4), whole=st.booleans())
    def match(self, names: list[int], whole: bool) -> None:
        """Only what is there."""
        depth = self.manager.peek(names)
        if len(set(names)) < len(names):
            return
        matched = self.manager.match(names, whole=whole)
        assert matched == (0 if whole and depth < len(names) else depth)
        self.references.update(names[:matched])

    @rule(n=st.integers(0, 6))
    def allocate(self, n: int) -> None:
        """All or none."""
        room = self.manager.num_free_blocks + self.manager.num_inactive_blocks
        try:
            slots = self.manager.allocate(n)
        except PoolExhausted:
            assert n > room
            return
        assert len(slots) in ({0, n} if self.manager.has_offload else {n})
        self.lent += slots

    @rule(n=st.integers(0, 6))
    def free(self, n: int) -> None:
        """Of what is lent or read; the oldest first."""
        slots = self.lent + self.reading.read
        self.manager.free(slots[:n])
        self.lent, self.reading.read = self.lent[n:], self.reading.read[max(0, n - len(self.lent)) :]

    @rule(names=st.lists(_NAMES, max_size=4, unique=True), parent=st.none() | _NAMES)
    def register(self, names: list[int], parent: int | None) -> None:
        """Into what is lent."""
        before = self._state()
        blocks = [
            Resident(name, -1, name, before, local_hash=name + 1000)
            for name, before in zip(names, [parent, *names], strict=False)
        ]
        try:
            put = self.manager.register(blocks, self.lent, parent=parent)
        except InvalidInput:
            assert self._state() == before
            return
        assert put == min(len(names), len(self.lent))
        self.lent = self.lent[put:]

    @rule()
    def clear(self) -> None:
        """Only when nothing is active."""
        try:
            self.manager.clear()
        except Conflict:
            assert self.manager.num_active_blocks
        else:
            assert self.manager.num_free_blocks == self.manager.capacity

    @rule()
    def attach_or_detach(self) -> None:
        """In turns."""
        if self.manager.has_offload:
            self.manager.detach()
        else:
            self.manager.attach(self.reading)

    def forget(self) -> None:
        """Replay the events so far for good, so that the next replay is short."""
        self.followed = replay(self.events, self.followed, self.forgotten)
        self.forgotten += len(self.events)
        self.events.clear()

    @invariant()
    def is_whole(self) -> None:
        """Its parts agree."""
        self.manager.check_integrity()

    @invariant()
    def counts_are_right(self) -> None:
        """As the model counts."""
        manager = self.manager
        assert manager.num_active_block_refs == self.references.total() + len(self.partials)
        assert all(manager.refs(name) == count for name, count in self.references.items())
        assert manager.num_partial_blocks == len(self.partials)
        full = [block for block in manager.residents() if any(map(manager.refs, block.names))]
        lent = len(self.lent) + len(self.reading.read)
        assert manager.num_active_blocks == len(full) + len(self.partials) + lent
        assert manager.num_inactive_blocks == len(manager.residents()) - len(full)
        assert manager.active_fraction == manager.num_active_blocks / manager.capacity

    @invariant()
    def events_tell_all(self) -> None:
        """The rule of truth: the replay of all events has the names of all blocks that are there."""
        assert replay(self.events, self.followed, self.forgotten) == {
            name for block in self.manager.residents() for name in block.names
        }


def drive(seed: int, steps: int, policy: str = "lineage") -> ManagerMachine:
    """Let a machine take ``steps`` random steps, and check it after each. Hypothesis ends its own runs sooner.

    Returns:
        The machine as it is then.
    """
    rng = Random(seed)
    machine = ManagerMachine()
    machine.policy = policy
    machine.start(rng.randint(1, 10), rng.random() < 0.5)

    def name() -> int:
        return rng.randrange(16)

    def maybe() -> int | None:
        return name() if rng.random() < 0.3 else None

    def uuid() -> UUID:
        return UUID(int=rng.randrange(4))

    def blocks() -> list[UniqueBlock]:
        return [FullBlock(name()) if rng.random() < 0.8 else PartialBlock(uuid()) for _ in range(rng.randint(0, 6))]

    def chain() -> list[UniqueBlock]:
        turn = rng.randint(0, 1)
        return [FullBlock((1 << depth) - 1 + turn * depth % (1 << depth)) for depth in range(rng.randint(0, 4))]

    def use() -> None:
        parent = maybe()
        machine.use(
            chain() if rng.random() < 0.6 else blocks(),
            rng.choice(["implied", "implied", "named", "shared"]),
            None if parent is None else FullBlock(parent),
            rng.random() < 0.5,
        )

    calls: list[Callable[[], object]] = [
        use,
        use,
        lambda: machine.give_back_any(blocks()),
        lambda: machine.give_back(rng),
        lambda: machine.promote(uuid(), name(), maybe(), rng.random() < 0.3),
        lambda: machine.match([name() for _ in range(rng.randint(0, 3))], rng.random() < 0.5),
        lambda: machine.allocate(rng.randint(0, 3)),
        lambda: machine.free(rng.randint(0, 6)),
        lambda: machine.register(rng.sample(range(16), rng.randint(0, 4)), maybe()),
        machine.clear,
        machine.attach_or_detach,
    ]
    for _ in range(steps):
        rng.choice(calls)()
        machine.is_whole()
        machine.counts_are_right()
        machine.events_tell_all()
        if len(machine.events) > 200:
            machine.forget()
    return machine
