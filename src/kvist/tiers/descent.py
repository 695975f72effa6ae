"""`Descent`: one worker's blocks on their way into one tier. Knows a queue, a link and room; not the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from kvist.blocks.events import EventLog
from kvist.blocks.resident import Resident
from kvist.tiers.config import TiersConfig
from kvist.tiers.level import Level, TierStats


class Descent:
    """A queue in front of a level's link down. Its blocks go in batches, a few batches at a time.

    A block is *queued*, then *flying*: its room is reserved and its bytes are on the link. One that needs no copy or
    finds no room when its turn comes is given up.

    Args:
        level: where they go.
        config: sizes of batches, and how many fly at a time.
        log: of the worker.
        stats: of the worker in this tier.
        failures: gets what sinks of events raise, which stops nothing here.
        landed: gets each batch whose last byte has arrived; its blocks are still *arriving* in the pool.
        given_up: gets blocks that left the queue without a copy, after a batch landed.
        displaced: gets blocks that were evicted from the level.

    Attributes:
        queue: queued blocks, by lineage hash, in order.
        flying: flying blocks, by lineage hash.
    """

    def __init__(
        self,
        level: Level,
        config: TiersConfig,
        log: EventLog,
        stats: TierStats,
        failures: list[Exception],
        *,
        landed: Callable[[list[Resident]], None],
        given_up: Callable[[list[Resident]], None],
        displaced: Callable[[list[Resident]], None],
    ) -> None:
        self.queue: dict[int, Resident] = {}
        self.flying: dict[int, Resident] = {}
        self._level = level
        self._config = config
        self._log = log
        self._stats = stats
        self._failures = failures
        self._landed = landed
        self._given_up = given_up
        self._displaced = displaced
        self._running = 0

    @property
    def busy(self) -> bool:
        """Whether its next block would have to wait."""
        return self._running >= self._config.transfers

    def is_coming(self, key: int) -> bool:
        """Whether this block is queued or flying, or landed and not yet resident."""
        pool = self._level.pool
        return key in self.queue or (key not in pool and pool.told_by(key) is self._log)

    def offer(self, blocks: Iterable[Resident]) -> list[Resident]:
        """Queue blocks, parents before their children, and start what can start.

        Args:
            blocks: neither queued nor in the pool.

        Returns:
            Those of them that were given up at once.
        """
        self.queue.update({block.lineage_hash: block for block in blocks})
        return self._start()

    def _start(self) -> list[Resident]:
        pool, stats = self._level.pool, self._stats
        left: list[Resident] = []
        while self.queue and not self.busy:
            batch = [self.queue.pop(key) for key in list(islice(self.queue, self._config.batch_blocks))]
            missing = [block for block in batch if not pool.holds(block.lineage_hash)]
            fit, gone = pool.reserve(missing, self._log)
            stats.present += len(batch) - len(missing)
            stats.no_room += len(missing) - fit
            stats.evicted += len(gone)
            if fit < len(batch):
                stays = {block.lineage_hash for block in missing[:fit]}
                left += [block for block in batch if block.lineage_hash not in stays]
            if fit:
                self._fly(missing[:fit])
            if gone:
                try:
                    pool.tell_gone(gone)
                except Exception as error:
                    self._failures.append(error)
                self._displaced([block for _, block in gone])
        return left

    def _fly(self, batch: list[Resident]) -> None:
        size = len(batch) * self._config.block_bytes
        self.flying.update({block.lineage_hash: block for block in batch})
        self._running += 1
        self._stats.bytes_in += size
        self._level.down.start(size, lambda: self._land(batch))

    def _land(self, batch: list[Resident]) -> None:
        self._running -= 1
        for block in batch:
            del self.flying[block.lineage_hash]
        self._landed(batch)
        if left := self._start():
            self._given_up(left)
