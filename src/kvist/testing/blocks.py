"""`ManagerMachine`: any moves on a block manager, beside a plain model of it and an index that follows its events.

    class TestManager(ManagerMachine.TestCase): ...

Or with settings and a policy of your own: subclass `ManagerMachine`, and override `policy`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import NamedTuple
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

_NAMES = st.integers(0, 14)
_UUIDS = st.integers(0, 3).map(lambda number: UUID(int=number))
_BLOCKS = st.lists(_NAMES.map(FullBlock) | _UUIDS.map(PartialBlock), max_size=6)


def path(name: int) -> list[int]:
    """The blocks from the root to this one in a tree of two branches at each block: each has one parent, always."""
    return [*path((name - 1) // 2), name] if name else [0]


class Told(NamedTuple):
    """What an index knows of one name. ``None``: it is the root's, or not known."""

    parent: int | None
    local_hash: int | None
    token_ids: Sequence[int] | None


class Follower:
    """An index of one tier that follows a log: of each name, what was told of it. Raises at what cannot be true."""

    def __init__(self) -> None:
        self.names: dict[int, Told] = {}
        self._next_id = 0

    def hear(self, event: Event) -> None:
        """The next event of the log."""
        assert event.event_id == self._next_id
        self._next_id += 1
        match event.data:
            case Stored(hashes=hashes, parent=parent, local_hashes=local_hashes, token_ids=token_ids):
                assert hashes
                assert len(set(hashes)) == len(hashes)
                assert self.names.keys().isdisjoint(hashes)
                local: Sequence[int | None] = local_hashes or [None] * len(hashes)
                tokens: Sequence[Sequence[int] | None] = token_ids or [None] * len(hashes)
                for name, before, own, of in zip(hashes, [parent, *hashes[:-1]], local, tokens, strict=True):
                    self.names[name] = Told(before, own, of)
            case Removed(hashes=hashes):
                assert hashes
                for name in hashes:
                    del self.names[name]
            case Cleared():
                self.names.clear()


class Reading:
    """Told of evictions; says of every other block that it is still read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    @property
    def is_reading(self) -> bool:
        """See `Evictions.is_reading`."""
        return bool(self.read)

    def evicted(self, blocks: Sequence[Resident]) -> Collection[int]:
        """See `Evictions.evicted`."""
        slots = [block.slot for block in blocks if block.slot % 2]
        self.read += slots
        return slots

    def released(self, blocks: Sequence[Resident]) -> None:
        """See `Evictions.released`."""
        assert blocks


class ManagerMachine(RuleBasedStateMachine):
    """Any moves, sound or not. What is refused changes nothing; references are those of a plain count."""

    policy = "lineage"

    @initialize(capacity=st.integers(1, 10), kind=st.sampled_from(["sound", "odd", "aliases"]))
    def start(self, capacity: int, kind: str) -> None:
        """An empty manager.

        Args:
            capacity: of it.
            kind: "sound": a block always has the same block before it; "aliases": it may have two names.
        """
        self.sound = kind == "sound"
        self.aliases = kind == "aliases"
        self.events: list[Event] = []  # of the last step
        self.index = Follower()
        self.told: dict[int, Told] = {}  # of each name that is there, as the moves said it, the first told first
        self.keys: dict[int, int] = {}  # of each name that ever was, its last
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

    def _key(self, name: int) -> int:
        """What a block is matched by: its name, or, shared by two names, another number."""
        return name // 2 * 2 + 100 if self.aliases else name

    def _was_told(self, name: int, key: int, before: int | None, known: Told) -> None:
        """A block was named: if an index does not know that name, it hears of it, as the child of ``before``."""
        if name in self.told:
            return
        above = before
        if before in self.told:  # by the first of its names
            above = next(other for other in self.told if self.keys[other] == self.keys[before])
        self.told[name] = known._replace(parent=above)
        self.keys[name] = key

    def _fits(self, blocks: Sequence[UniqueBlock], keys: Sequence[int], parent: int | None, misses: int) -> int:
        """How many leading blocks fit in what is free and inactive, if so many may be stored."""
        held = {self.keys[name] for name in self.references.keys() & self.told.keys() if self.references[name]}
        there = {self.keys[name] for name in self.told}
        kept = {self.keys[parent]} - held if parent in self.told else set()
        room = self.manager.num_free_blocks + self.manager.num_inactive_blocks
        new: set[int | UUID] = set()
        idle: set[int] = set()
        full = iter(keys)
        for number, block in enumerate(blocks):
            one = next(full) if isinstance(block, FullBlock) else block.uuid
            if one in held or one in idle or one in new or one in self.partials:
                continue
            if len(new) + len(idle) + len(kept - idle) >= room or (one not in there and len(new) >= misses):
                return number
            if isinstance(one, int) and one in there:
                idle.add(one)
            else:
                new.add(one)
        return len(blocks)

    @rule(
        blocks=_BLOCKS | _NAMES.map(lambda name: [FullBlock(above) for above in path(name)]),
        named=st.booleans(),
        parent=st.none() | st.none() | _NAMES.map(FullBlock),
        told=st.booleans(),
    )
    def use(self, blocks: list[UniqueBlock], named: bool, parent: FullBlock | None, told: bool) -> None:
        """Blocks in a sound order or in any; with their own lineage or without."""
        names = [block.sequence_hash for block in blocks if isinstance(block, FullBlock)]
        if self.sound:
            names = path(names[-1]) if names else []
            parent = FullBlock(names.pop(0)) if parent and len(names) > 1 else None
            blocks = [FullBlock(name) for name in names] + [
                block for block in blocks if isinstance(block, PartialBlock)
            ]
        named = not self.sound and (named or (self.aliases and not self.told.keys() >= {*names}))
        keys = [self._key(name) for name in names]
        before = None if parent is None else parent.sequence_hash
        free = self.manager.num_free_blocks
        least, most = (self._fits(blocks, keys, before, misses) for misses in (free, self.manager.capacity))
        move = Use(
            blocks,
            local_hashes=[name + 1000 for name in names] if told else (),
            lineage=[(key, None) for key in keys] if named else (),
            token_ids=[[name] * 4 for name in names] if told else None,
            parent=parent,
        )
        if self._refused(move):
            return
        assert self.handled <= most
        assert self.handled >= (least if self.manager.has_offload else most)
        handled = blocks[: self.handled]
        self.partials.update(block.uuid for block in handled if isinstance(block, PartialBlock))
        took = [block.sequence_hash for block in handled if isinstance(block, FullBlock)]
        self.references.update(took)
        for name, key, above_it in zip(took, keys, [before, *names], strict=False):
            self._was_told(name, key, above_it, Told(None, *((name + 1000, [name] * 4) if told else (None, None))))

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

    @rule(uuid=_UUIDS, name=_NAMES, parent=st.none() | _NAMES)
    def promote(self, uuid: UUID, name: int, parent: int | None) -> None:
        """A partial block that is there, or not."""
        if self.sound:
            parent = path(name)[-2] if name else None
        key = self._key(name)
        entry = (key, None) if self.aliases else None
        if not self._refused(Promote(uuid, name, parent, name + 1000, entry)):
            self.partials.remove(uuid)
            self.references[name] += 1
            self._was_told(name, key, parent, Told(None, name + 1000, None))

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
        reading = len(self.reading.read) if self.manager.has_offload else 0
        room = self.manager.num_free_blocks + self.manager.num_inactive_blocks + reading
        try:
            slots = self.manager.allocate(n)
        except PoolExhausted:
            assert n > room
            return
        assert n <= room
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
        if self.sound:
            names, parent = path(names[-1])[1:] if names else [], 0
        blocks = [
            Resident(name, -1, self._key(name), None if self.aliases else above, local_hash=name + 1000)
            for name, above in zip(names, [parent, *names], strict=False)
        ]
        try:
            put = self.manager.register(blocks, self.lent, parent=parent)
        except InvalidInput:
            assert self._state() == before
            return
        assert put == min(len(names), len(self.lent))
        self.lent = self.lent[put:]
        above = parent
        for name in names[:put]:
            known = next((other for other in self.told if self.keys[other] == self._key(name)), None)
            if known is None:
                self._was_told(name, self._key(name), above, Told(None, name + 1000, None))
            above = name if known is None else known

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
        """The rule of truth: an index knows of each name that is there what the moves said, and never of too many."""
        for event in self.events:
            self.index.hear(event)
            assert len({self.keys[name] for name in self.index.names}) <= self.manager.capacity
        self.events.clear()
        names = {name: block.lineage_hash for block in self.manager.residents() for name in block.names}
        self.told = {name: told for name, told in self.told.items() if name in names}
        assert {name: self.keys[name] for name in self.told} == names
        assert self.index.names == self.told
        if self.sound:
            assert all(told.parent == (path(name)[-2] if name else None) for name, told in self.told.items())


def drive(seed: int, steps: int, policy: str = "lineage") -> ManagerMachine:
    """Let a machine take ``steps`` random steps, and check it after each. Hypothesis ends its own runs sooner.

    Returns:
        The machine as it is then.
    """
    rng = Random(seed)
    machine = ManagerMachine()
    machine.policy = policy
    machine.start(rng.randint(1, 10), rng.choice(["sound", "odd", "aliases"]))

    def name() -> int:
        return rng.randrange(15)

    def maybe() -> int | None:
        return name() if rng.random() < 0.3 else None

    def uuid() -> UUID:
        return UUID(int=rng.randrange(4))

    def blocks() -> list[UniqueBlock]:
        return [FullBlock(name()) if rng.random() < 0.8 else PartialBlock(uuid()) for _ in range(rng.randint(0, 6))]

    def chain() -> list[UniqueBlock]:
        return [FullBlock(above) for above in path(name())]

    def use() -> None:
        parent = maybe()
        machine.use(
            chain() if rng.random() < 0.6 else blocks(),
            rng.random() < 0.3,
            None if parent is None else FullBlock(parent),
            rng.random() < 0.5,
        )

    calls: list[Callable[[], object]] = [
        use,
        use,
        lambda: machine.give_back_any(blocks()),
        lambda: machine.give_back(rng),
        lambda: machine.promote(uuid(), name(), maybe()),
        lambda: machine.match([name() for _ in range(rng.randint(0, 3))], rng.random() < 0.5),
        lambda: machine.allocate(rng.randint(0, 3)),
        lambda: machine.free(rng.randint(0, 6)),
        lambda: machine.register(rng.sample(range(15), rng.randint(0, 4)), maybe()),
        machine.clear,
        machine.attach_or_detach,
    ]
    for _ in range(steps):
        rng.choice(calls)()
        machine.is_whole()
        machine.counts_are_right()
        machine.events_tell_all()
    return machine
