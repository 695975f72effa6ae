"""`Ascent`: the bytes of one load on their way up through the links. Knows how many, and from where; not of what."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from kvist.tiers.config import TiersConfig
from kvist.tiers.level import Level, TierStats


class Ascent:
    """Starts at once. On each link, one batch of it goes at a time, so that batches of other loads get their share.

    A batch from a lower level takes each link above it in turn, while the next batch is on the link behind it.

    Args:
        levels: from the top.
        stats: of the worker, one for each level.
        config: sizes.
        origins: of each block, the number of the level it comes from.
        done: called when the last byte has arrived.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        stats: Sequence[TierStats],
        config: TiersConfig,
        origins: Iterable[int],
        done: Callable[[], None],
    ) -> None:
        self._levels = levels
        self._stats = stats
        self._block_bytes = config.block_bytes
        self._done = done
        self._lanes = [deque[int]() for _ in levels]  # sizes of batches that wait for each link up
        self._busy = [False] * len(levels)
        self._left = 0
        for number, blocks in groupby(origins):
            count = sum(1 for _ in blocks)
            self._left += count
            for start in range(0, count, config.batch_blocks):
                self._lanes[number].append(min(config.batch_blocks, count - start))
        for number in range(len(levels)):
            self._go(number)

    def _go(self, number: int) -> None:
        if self._busy[number] or not self._lanes[number]:
            return
        self._busy[number] = True
        count = self._lanes[number].popleft()
        size = count * self._block_bytes
        self._stats[number].bytes_out += size
        self._levels[number].up.start(size, lambda: self._through(number, count))

    def _through(self, number: int, count: int) -> None:
        self._busy[number] = False
        self._go(number)
        if number > 0:
            self._lanes[number - 1].append(count)
            self._go(number - 1)
            return
        self._left -= count
        if not self._left:
            self._done()
