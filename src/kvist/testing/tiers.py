"""Two workers with tiers below them, driven at random: nothing is lost, and the events are true.

`TiersMachine` is for finding small examples, with settings of your own:

    TestTiers = TiersMachine.TestCase
    TestTiers.settings = settings(max_examples=100, stateful_step_count=100)

`drive` is for going on for long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvist.blocks import BlockManager, Cleared, Deref, Event, FullBlock, Removed, Stored, Tier, Use
from kvist.blocks.policy import POLICIES
from kvist.errors import Conflict
from kvist.tiers import Level, Load, LoadState, Network, TierConfig, Tiers, TiersConfig, TierStats

_BLOCKS = 30
_ALIAS = 1000  # added to a block's hash: another name of the same block
_blocks = st.integers(0, _BLOCKS - 1)
_workers = st.integers(0, 1)
_TIERS = [Tier.HOST, Tier.DISK, Tier.EXTERNAL]


def random_config(random: Random) -> TiersConfig:
    """Tiers so small that they are always full, with one to three levels."""
    depth = random.randint(1, 3)
    low = random.choice([0.0, 0.2])

    def tier(largest: int) -> TierConfig:
        return TierConfig(
            capacity=random.randint(1, largest),
            down_gb_per_s=random.choice([0.3, 1.0, 4.0, math.inf]),
            up_gb_per_s=random.choice([0.3, 1.0, 4.0, math.inf]),
            latency_ms=random.choice([0.0, 0.5]),
            policy=random.choice(sorted(POLICIES)),
        )

    return TiersConfig(
        block_bytes=1_000_000,
        host=tier(10),
        disk=tier(20) if depth > 1 else None,
        external=tier(30) if depth > 2 else None,
        mode=random.choice(["watermark", "blocking"]),
        admission=random.choice(["always", "always", "second_touch", "frequency"]),
        batch_blocks=random.randint(1, 4),
        transfers=random.randint(1, 3),
        queue_blocks=random.randint(1, 20),
        spill_blocks=random.randint(1, 8),
        free_low=low,
        free_high=random.choice([low, 0.4]),
    )


def above(block: int) -> int | None:
    """The block before a block: two roots, and two children of each block. Each number is a block."""
    return None if block < 2 else block // 2 - 1


def chain(block: int) -> list[int]:
    """The hashes of a block and of all before it, the root first."""
    hashes: list[int] = []
    at: int | None = block
    while at is not None:
        hashes.append(at)
        at = above(at)
    return hashes[::-1]


class View:
    """What a router knows of one worker that sends these events. It takes nothing that makes no sense, or is not true.

    What is true of a block is `above`, and its number: its local hash is one more, and its tokens are its number twice.

    Args:
        capacities: of each tier, in blocks.

    Attributes:
        tiers: the names of the blocks in each tier.
    """

    def __init__(self, capacities: Mapping[Tier, int]) -> None:
        self.tiers: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        self._capacities = capacities
        self._next = 0

    def hear(self, event: Event) -> None:
        """Apply one event.

        Raises:
            AssertionError: it does not follow from the ones before.
        """
        assert event.event_id == self._next
        self._next += 1
        here, data = self.tiers[event.tier], event.data
        if isinstance(data, Stored):
            assert data.hashes
            assert here.isdisjoint(data.hashes), f"stored twice in {event.tier}: {data}"
            assert data.parent is None or any(data.parent in names for names in self.tiers.values()), (
                f"stored in {event.tier} after a block that nobody was told of: {data}"
            )
            blocks = [name % _ALIAS for name in data.hashes]
            befores = [None if data.parent is None else data.parent % _ALIAS, *blocks[:-1]]
            assert [above(block) for block in blocks] == befores, f"stored after another block: {data}"
            assert data.local_hashes == [block + 1 for block in blocks], f"local hashes of other blocks: {data}"
            assert data.token_ids == [[block, block] for block in blocks], f"tokens of other blocks: {data}"
            here.update(data.hashes)
            held = len({name % _ALIAS for name in here})
            assert held <= self._capacities[event.tier], f"{held} blocks in {event.tier}, which holds fewer: {data}"
        elif isinstance(data, Removed):
            assert data.hashes
            assert here.issuperset(data.hashes), f"removed from {event.tier}, and not there: {data}"
            here.difference_update(data.hashes)
        else:
            assert isinstance(data, Cleared)
            for names in self.tiers.values():
                names.clear()


class Worker:
    """A device, the tiers below it, what runs there, and what a router hears."""

    def __init__(self, capacity: int, policy: str, config: TiersConfig, network: Network, shared: dict[Tier, Level]):
        capacities = {Tier.DEVICE: capacity}
        self.view = View(capacities)
        self.manager = BlockManager(capacity, 2, policy, events=self.view.hear)
        self.tiers = Tiers(self.manager, config, network=network, shared=shared)
        capacities.update((level.pool.tier, level.pool.capacity) for level in self.tiers.levels)
        self.sequences: list[list[int]] = []
        self.loads: list[Load] = []

    def use(self, hashes: Sequence[int], names: Sequence[int]) -> int:
        """Refer to a chain by these names; as much of it as there is room for."""
        handled = self.manager.process(
            Use(
                [FullBlock(name) for name in names],
                local_hashes=[hash + 1 for hash in hashes],
                lineage=list(zip(hashes, [None, *hashes], strict=False)),
                token_ids=[[hash, hash] for hash in hashes],
            )
        )
        if handled:
            self.sequences.append(list(names[:handled]))
        return handled

    def release(self, number: int) -> None:
        """Give one sequence back, its tail first."""
        sequence = self.sequences.pop(number)
        self.manager.process(Deref([FullBlock(name) for name in reversed(sequence)]))

    def check(self) -> None:
        """Compare what is there with what was told, and the slots with who has them.

        Raises:
            AssertionError: they differ.
        """
        self.tiers._offload.raise_failure()  # what the view found wrong
        self.manager.check_integrity()
        self.tiers.check_integrity()
        told = self.view.tiers
        assert told[Tier.DEVICE] == {name for block in self.manager.residents() for name in block.names}
        for level in self.tiers.levels:
            mine = [block for block in level.pool if level.pool.told_by(block.lineage_hash) is self.manager.log]
            assert told[level.pool.tier] == {block.sequence_hash for block in mine}
            for block in level.pool:
                assert block.local_hash == block.lineage_hash + 1
                assert block.token_ids == [block.lineage_hash] * 2
        self.loads = [load for load in self.loads if load.state is LoadState.RUNNING]
        lent = sum(load.blocks for load in self.loads)
        refs = self.manager.refs
        referred = sum(any(map(refs, block.names)) for block in self.manager.residents())
        held = self.manager.num_active_blocks - referred - lent
        assert held == len(self.tiers._offload.held_slots)
        assert not self.tiers.is_idle or held == 0


class Cluster:
    """Two workers on one network, with a shared lowest tier if there are three.

    Args:
        random: decides how they are made.
    """

    def __init__(self, random: Random) -> None:
        config = random_config(random)
        self.network = Network(random.choice([0.0, 0.1, 12345.678]))
        shared: dict[Tier, Level] = {}
        if config.external is not None:
            shared[Tier.EXTERNAL] = Level.make(self.network, Tier.EXTERNAL, config.external)
        capacity, policy = random.randint(1, 16), random.choice(sorted(POLICIES))
        self.workers = [Worker(capacity, policy, config, self.network, shared) for _ in range(2)]
        self.ended: list[Load] = []

    def use(self, worker: int, block: int, alias: int) -> None:
        """A sequence begins."""
        hashes = chain(block)
        self.workers[worker].use(hashes, [hash + alias for hash in hashes])

    def release(self, worker: int, number: int) -> None:
        """A sequence ends."""
        sequences = self.workers[worker].sequences
        if sequences:
            self.workers[worker].release(number % len(sequences))

    def load(self, worker: int, block: int, alias: int) -> None:
        """What lies below of a chain is asked for."""
        each = self.workers[worker]
        keys = chain(block)
        hashes, lineage = [key + alias for key in keys], list(zip(keys, [None, *keys], strict=False))
        device, below = each.manager.peek(hashes), each.tiers.peek(hashes, lineage=lineage)
        room = each.manager.num_free_blocks + each.manager.num_inactive_blocks
        load = each.tiers.load(hashes, lineage=lineage)
        if load in each.loads:
            return
        if load.state is LoadState.RUNNING:
            each.loads.append(load)
            load.then(self.ended.append)
            assert 0 < load.blocks <= below - device
        else:
            assert load.state is LoadState.BLOCKED or below == device or room < below

    def wait(self) -> None:
        """Time passes until something ends."""
        deadline = self.network.deadline()
        if deadline is not None:
            assert deadline >= self.network.now
            self.workers[0].tiers.advance(deadline)

    def advance(self, worker: int, pause: float) -> None:
        """Time passes."""
        self.workers[worker].tiers.advance(self.network.now + pause)

    def clear(self, worker: int) -> None:
        """One worker is to forget everything."""
        each = self.workers[worker]
        idle = each.tiers.is_idle and not each.manager.num_active_blocks
        try:
            each.tiers.clear()
        except Conflict:
            assert not idle
        else:
            assert idle
            for tier, names in each.view.tiers.items():
                assert not names or tier is Tier.EXTERNAL  # the other may read what this one brought

    def clear_device(self, worker: int) -> None:
        """One device is to forget everything, and not what lies below."""
        each = self.workers[worker]
        busy = each.manager.num_active_blocks > 0 or each.tiers._offload.is_reading
        try:
            each.manager.clear()
        except Conflict:
            assert busy
        else:
            assert not busy
            assert not each.view.tiers[Tier.DEVICE]

    def check(self) -> None:
        """Compare blocks, slots, bytes and events.

        Raises:
            AssertionError: they do not agree.
        """
        for worker in self.workers:
            worker.check()
        for number in range(len(self.workers[0].tiers.levels)):
            self._check_bytes(number)
        for load in self.ended:
            assert load.state is LoadState.DONE and load.ended_at is not None and load.ended_at <= self.network.now
            assert load.brought == load.blocks
        self.ended.clear()

    def finish(self) -> None:
        """Let all that is under way end, and give all slots back."""
        self._drain()
        for worker in self.workers:
            assert worker.tiers.is_idle
            while worker.sequences:
                worker.release(0)
            self._drain()
            worker.check()
            assert worker.manager.num_active_blocks == 0
        for worker in self.workers:
            worker.tiers.clear()
            assert not any(worker.view.tiers.values())

    def _drain(self) -> None:
        while (deadline := self.network.deadline()) is not None:
            self.network.advance(deadline)

    def _check_bytes(self, number: int) -> None:
        """What the workers sent is what the links carried."""
        levels = {id(worker.tiers.levels[number]): worker.tiers.levels[number] for worker in self.workers}.values()
        stats = [worker.tiers.stats[_TIERS[number]] for worker in self.workers]
        assert sum(each.bytes_in for each in stats) == sum(level.down.started_bytes for level in levels)
        assert sum(each.bytes_out for each in stats) == sum(level.up.started_bytes for level in levels)
        for level in levels:
            for link in (level.down, level.up):
                assert link.ended_bytes <= link.started_bytes
                assert link.active or link.ended_bytes == link.started_bytes
                assert not link.active or self.network.deadline() is not None


def drive(seed: int, steps: int) -> dict[Tier, TierStats]:
    """Do ``steps`` random things to a cluster, and check it after each.

    Args:
        seed: decides what; equal seeds do equal things.
        steps: how many.

    Returns:
        What the first worker counted.

    Raises:
        AssertionError: something was lost, or told wrong.
    """
    random = Random(seed)
    cluster = Cluster(random)
    names = ["use", "release", "load", "wait", "advance", "clear", "clear_device"]
    for name in random.choices(names, [40, 40, 30, 30, 10, 1, 3], k=steps):
        worker, block = random.randrange(2), random.randrange(_BLOCKS)
        match name:
            case "use":
                cluster.use(worker, block, random.choice([0, 0, 0, _ALIAS]))
            case "release":
                cluster.release(worker, random.randrange(9))
            case "load":
                cluster.load(worker, block, random.choice([0, 0, 0, _ALIAS]))
            case "wait":
                cluster.wait()
            case "advance":
                cluster.advance(worker, random.choice([0.0, 0.25, 1.0, 7.0]))
            case "clear":
                cluster.clear(worker)
            case "clear_device":
                cluster.clear_device(worker)
        cluster.check()
    stats = cluster.workers[0].tiers.stats
    cluster.finish()
    return stats


class TiersMachine(RuleBasedStateMachine):
    """A `Cluster` in the hands of hypothesis."""

    @initialize(random=st.randoms())
    def build(self, random: Random) -> None:
        """See `Cluster`."""
        self.cluster = Cluster(random)

    @rule(worker=_workers, block=_blocks, alias=st.sampled_from([0, 0, 0, _ALIAS]))
    def use(self, worker: int, block: int, alias: int) -> None:
        """See `Cluster.use`."""
        self.cluster.use(worker, block, alias)

    @rule(worker=_workers, number=st.integers(0, 9))
    def release(self, worker: int, number: int) -> None:
        """See `Cluster.release`."""
        self.cluster.release(worker, number)

    @rule(worker=_workers, block=_blocks, alias=st.sampled_from([0, 0, 0, _ALIAS]))
    def load(self, worker: int, block: int, alias: int) -> None:
        """See `Cluster.load`."""
        self.cluster.load(worker, block, alias)

    @rule()
    def wait(self) -> None:
        """See `Cluster.wait`."""
        self.cluster.wait()

    @rule(worker=_workers, pause=st.sampled_from([0.0, 0.25, 1.0, 7.0]))
    def advance(self, worker: int, pause: float) -> None:
        """See `Cluster.advance`."""
        self.cluster.advance(worker, pause)

    @rule(worker=_workers)
    def clear(self, worker: int) -> None:
        """See `Cluster.clear`."""
        self.cluster.clear(worker)

    @rule(worker=_workers)
    def clear_device(self, worker: int) -> None:
        """See `Cluster.clear_device`."""
        self.cluster.clear_device(worker)

    @invariant()
    def nothing_is_lost(self) -> None:
        """See `Cluster.check`."""
        self.cluster.check()

    def teardown(self) -> None:
        """See `Cluster.finish`."""
        if hasattr(self, "cluster"):
            self.cluster.finish()
