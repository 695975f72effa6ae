"""`Offload`: blocks on their way down, from a worker's device through its tiers.

It hears from the block manager what comes to rest and what goes, chooses what is worth a copy, keeps the slots of
evicted blocks while they are read, and tells routers of what arrived. What a tier evicts to make room goes on to the
next one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial

from msgspec.structs import replace

from kvist.blocks import BlockManager
from kvist.blocks.pool import told
from kvist.blocks.resident import Resident
from kvist.tiers.admission import make_admission
from kvist.tiers.config import TiersConfig
from kvist.tiers.descent import Descent
from kvist.tiers.level import Level, TierStats

_Arrival = tuple[int, Resident]
"""A block whose bytes are in a level, by its number, and that no router has heard of."""


class Offload:
    """The way down. Attached to a manager, as its `kvist.blocks.resident.Evictions`.

    A block is told to routers, and can be found, when its bytes have arrived *and* routers know the block before it: a
    router cannot place it otherwise. If the block before it is on its way down, it waits for that one; if it is
    nowhere, the copy is dropped.

    A sink of events that raises stops nothing; `raise_failure` says so when the work at hand is done.

    Args:
        manager: of the device.
        levels: the tiers below it, from the top.
        config: how blocks go down.
        stats: what is counted, one for each level.
    """

    def __init__(
        self, manager: BlockManager, levels: Sequence[Level], config: TiersConfig, stats: Sequence[TierStats]
    ) -> None:
        self._manager = manager
        self._log = manager.log
        self._levels = levels
        self._stats = stats
        self._config = config
        self._blocking = config.mode == "blocking"
        self._ahead = False  # of need: nobody waits for what is evicted now
        self._admission = make_admission(config)
        self._held: dict[int, int] = {}  # slots of evicted blocks that are queued or flying, by lineage hash
        self._failures: list[Exception] = []  # of sinks of events
        self._waiting: dict[int, list[_Arrival]] = {}  # by the lineage hash of the block before them
        self._waits_on: dict[int, int] = {}  # the same the other way round, by lineage hashes
        self._descents = [
            Descent(
                level,
                config,
                self._log,
                stats[number],
                self._failures,
                landed=partial(self._landed, number),
                given_up=partial(self._given_up, number),
                displaced=partial(self._spill, number + 1),
            )
            for number, level in enumerate(levels)
        ]
        self._host = levels[0].pool
        self._from_device = self._descents[0]

    @property
    def held_slots(self) -> Collection[int]:
        """The slots of evicted blocks that are still read."""
        return self._held.values()

    @property
    def is_reading(self) -> bool:
        """Whether slots of the device are read, or will be: blocks of it are queued or flying."""
        return bool(self._from_device.queue or self._from_device.flying)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not any(descent.queue or descent.flying for descent in self._descents) and not self._waiting

    def released(self, blocks: Sequence[Resident]) -> None:
        """See `kvist.blocks.resident.Evictions.released`. Raises, at its end, what sinks of events raised."""
        keys = [block.lineage_hash for block in blocks]
        self._admission.note(keys)
        if self._blocking:
            return
        host, stats, queue = self._host, self._stats[0], self._from_device.queue
        chosen: list[Resident] = []
        here: list[int] = []
        room = self._config.queue_blocks - len(queue)
        for block in reversed(blocks):  # a sequence gives its tail back first
            key = block.lineage_hash
            if key in host:
                here.append(key)
            elif key in queue or host.holds(key):
                continue
            elif not self._admission.admits(key):
                stats.refused += 1
            elif len(chosen) >= room:
                stats.too_busy += 1
            else:
                chosen.append(block)
        if here:
            host.touch(here)
            stats.present += len(here)
        if chosen:
            self._from_device.offer(chosen)
        self.raise_failure()

    def evicted(self, blocks: Sequence[Resident]) -> Collection[int]:
        """See `kvist.blocks.resident.Evictions.evicted`. Raises nothing, or nobody would keep the slots it names."""
        down, held = self._from_device, self._held
        chosen: list[Resident] = []
        kept: list[Resident] = []
        for block in reversed(blocks):  # children go before their parents
            key = block.lineage_hash
            if key in held:
                continue  # the same block, once more: it is being copied from where it was
            if key in down.queue:
                if not (self._blocking or self._ahead):
                    del down.queue[key]
                    self._stats[0].too_busy += 1
                    continue
            elif key not in down.flying:
                if not self._is_wanted(key):
                    continue
                chosen.append(block)
            held[key] = block.slot
            kept.append(block)
        # Either nothing was queued before, or nothing more starts now: what is given up is of this call.
        for block in down.offer(chosen) if chosen else ():
            del held[block.lineage_hash]
        return [block.slot for block in kept if block.lineage_hash in held]

    def keep_free(self) -> None:
        """Evict ahead of need if too few of the device's slots are free. What is not below yet is copied first."""
        manager, config = self._manager, self._config
        if self._blocking or manager.num_free_blocks + len(self._held) >= config.free_low * manager.capacity:
            return
        free = math.ceil(config.free_high * manager.capacity)
        there = manager.num_free_blocks + manager.num_inactive_blocks + len(self._held)
        self._ahead = True
        try:
            manager.free(manager.allocate(min(free, there)))
        finally:
            self._ahead = False

    def raise_failure(self) -> None:
        """Raise what sinks of events raised since the last call: the first error, which names the number of others."""
        failures, self._failures[:] = list(self._failures), []
        if failures:
            if len(failures) > 1:
                failures[0].add_note(f"and {len(failures) - 1} more errors of sinks of events")
            raise failures[0]

    def check_integrity(self) -> None:
        """Check that the figures of what is on its way agree with each other.

        Raises:
            AssertionError: they do not: a bug of ours.
        """
        down = self._from_device
        assert self._held.keys() <= down.queue.keys() | down.flying.keys()
        assert len(set(self._held.values())) == len(self._held)
        waiting = [set[int]() for _ in self._levels]
        for parent, arrivals in self._waiting.items():
            assert arrivals and self._is_coming(parent)
            for number, block in arrivals:
                assert _key_above(block) == parent
                waiting[number].add(block.lineage_hash)
        assert self._waits_on.keys() <= set().union(*waiting)
        for level, descent, landed in zip(self._levels, self._descents, waiting, strict=True):
            assert landed.isdisjoint(descent.flying)
            for key in landed | descent.flying.keys():
                assert key not in level.pool and level.pool.told_by(key) is self._log
            assert not descent.queue or descent.busy

    def _is_wanted(self, key: int) -> bool:
        """Whether a block that goes is to be copied first."""
        if self._host.holds(key):
            self._stats[0].present += 1
        elif not self._admission.admits(key):
            self._stats[0].refused += 1
        elif self._from_device.busy and not (self._blocking or self._ahead):
            self._stats[0].too_busy += 1
        else:
            return True
        return False

    def _landed(self, number: int, batch: list[Resident]) -> None:
        if number == 0:
            self._free(batch)
        self._settle((number, block) for block in batch)

    def _given_up(self, number: int, blocks: list[Resident]) -> None:
        if number == 0:
            self._free(blocks)
        self._settle(waiter for block in blocks for waiter in self._take_waiting(block.lineage_hash))

    def _spill(self, number: int, blocks: list[Resident]) -> None:
        """What the level above had to let go."""
        if number == len(self._levels):
            return
        pool, descent, stats = self._levels[number].pool, self._descents[number], self._stats[number]
        room = self._config.spill_blocks - len(descent.queue) - len(descent.flying)
        chosen: list[Resident] = []
        for block in reversed(blocks):
            key = block.lineage_hash
            if key in descent.queue or pool.holds(key):
                stats.present += 1
            elif len(chosen) >= room:
                stats.too_busy += 1
            else:
                chosen.append(block)
        if chosen:
            descent.offer(chosen)

    def _free(self, blocks: Iterable[Resident]) -> None:
        slots = [self._held.pop(block.lineage_hash) for block in blocks if block.lineage_hash in self._held]
        if slots:
            self._manager.free(slots)

    def _settle(self, arrivals: Iterable[_Arrival]) -> None:
        """Blocks arrived: find out which of them routers can be told of, with all that waited for them."""
        ready: list[tuple[int, Resident, int | None]] = []
        names: dict[int | None, int] = {}
        work = deque(arrivals)
        while work:
            number, block = work.popleft()
            key, parent = block.lineage_hash, _key_above(block)
            name = names[parent] if parent in names else self._name_above(block)
            if parent is None or name is not None:
                names[key] = block.sequence_hash
                ready.append((number, block, name))
            elif self._is_coming(parent) and not self._waits_for(parent, key):
                self._waiting.setdefault(parent, []).append((number, block))
                self._waits_on[key] = parent
                continue
            else:
                self._levels[number].pool.cancel((key,))
                self._stats[number].orphaned += 1
            work.extendleft(reversed(self._take_waiting(key)))
        for number, level in enumerate(self._levels):
            if keys := [block.lineage_hash for at, block, _ in ready if at == number]:
                level.pool.commit(keys)
                self._stats[number].stored += len(keys)
        if self._log.is_heard:
            for number, run, parent in _runs(ready):
                try:
                    self._log.emit(
                        told([replace(run[0], parent=parent), *run[1:]]), tier=self._levels[number].pool.tier
                    )
                except Exception as error:
                    self._failures.append(error)

    def _waits_for(self, key: int, other: int) -> bool:
        """Whether this block, through those before it, waits for the other: they came from two uses that disagree."""
        while key in self._waits_on and key != other:
            key = self._waits_on[key]
        return key == other

    def _take_waiting(self, key: int) -> list[_Arrival]:
        arrivals = self._waiting.pop(key, [])
        for _, block in arrivals:
            self._waits_on.pop(block.lineage_hash, None)
        return arrivals

    def _is_coming(self, key: int) -> bool:
        return any(descent.is_coming(key) for descent in self._descents)

    def _name_above(self, block: Resident) -> int | None:
        """By which name routers know the block before this one, of this worker; ``None`` if they do not."""
        if block.parent is not None and block.parent in self._manager:
            return block.parent
        for level in self._levels:
            if (key := _key_above(block)) is not None and level.pool.told_by(key) is self._log:
                above = level.pool.get(key)
                if above is not None:
                    return above.sequence_hash
        return None


def _runs(ready: Iterable[tuple[int, Resident, int | None]]) -> Iterator[tuple[int, list[Resident], int | None]]:
    """Join what follows each other in one level: its number, the blocks, and the name of the one before them."""
    run: list[Resident] = []
    place, above = 0, None
    for number, block, parent in ready:
        if run and number == place and _key_above(block) == run[-1].lineage_hash:
            run.append(block)
            continue
        if run:
            yield place, run, above
        place, run, above = number, [block], parent
    if run:
        yield place, run, above


def _key_above(block: Resident) -> int | None:
    """Lineage hash of the block before it; ``None`` for a first one. A name is a lineage hash where none is given."""
    return block.parent if block.lineage_parent is None else block.lineage_parent
