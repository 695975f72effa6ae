"""The tiers of one `PageStore`: reads go down through them, and what lay further down comes up.

Knows tiers and a digest. Must not know the store below them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from kvist.hashing import Buffer
from kvist.ids import format_digest
from kvist.repo.tier.base import PageTier, TierStats
from kvist.store.staging import BUFFER_SIZE, StagingPool

ROOM: Final = 256 << 20
"""Bytes of the buffers for pages on their way into one tier. What finds no room is dropped: no reader waits."""
_KEPT: Final = 4

Page = tuple[bytes, memoryview]
"""Raw digest and bytes, or where they go."""


class Tiers:
    """Tiers, the first asked first. Thread-safe."""

    def __init__(self, tiers: Sequence[PageTier], algorithm: str, digest: Callable[[Buffer], bytes]) -> None:
        """Take over ``tiers``. ``digest`` says of every page from them whether it is the one."""
        self._tiers = tuple(tiers)
        self._algorithm, self._digest = algorithm, digest
        pool = StagingPool(keep=_KEPT)
        self._fillers = tuple(_Filler(tier, pool) for tier in self._tiers)

    def __len__(self) -> int:
        return len(self._tiers)

    def read(self, wanted: Sequence[Page]) -> list[Page]:
        """Fill buffers with pages, verified; return those that no tier has. What one has, those above it get."""
        left = list(wanted)
        for level, tier in enumerate(self._tiers):
            found = tier.read([self._name(raw) for raw, _ in left], [out for _, out in left])
            good: list[Page] = []
            bad: list[Page] = []
            missing: list[Page] = []
            for is_here, (raw, out) in zip(found, left, strict=True):
                right = good if is_here and self._digest(out) == raw else bad if is_here else missing
                right.append((raw, out))
            tier.forget([self._name(raw) for raw, _ in bad])
            self._fill(good, level)
            left = missing + bad
            if not left:
                break
        return left

    def offer(self, pages: Sequence[Page]) -> None:
        """Have pages written to all tiers, in the background. Their buffers are copied before this returns."""
        self._fill(pages, len(self._tiers))

    def stats(self) -> tuple[TierStats, ...]:
        """Of each tier."""
        return tuple(replace(filler.tier.stats(), dropped=filler.dropped) for filler in self._fillers)

    def close(self) -> None:
        """Write what was offered, and close the tiers. Idempotent."""
        for filler in self._fillers:
            filler.close()
        for tier in self._tiers:
            tier.close()

    def _fill(self, pages: Sequence[Page], levels: int) -> None:
        if pages and levels:
            named = [(self._name(raw), page) for raw, page in pages]
            for filler in self._fillers[:levels]:
                filler.add(named)

    def _name(self, raw: bytes) -> str:
        return format_digest(self._algorithm, raw)


@dataclass(slots=True)
class _Slab:
    """Pages in one buffer, which fills from its start."""

    buffer: memoryview
    used: int = 0
    items: list[tuple[str, Buffer]] = field(default_factory=list)

    def add(self, name: str, page: memoryview) -> None:
        place = self.buffer[self.used : self.used + len(page)]
        place[:] = page
        self.items.append((name, place))
        self.used += len(page)


class _Filler:
    """Writes to one tier from a thread of its own. It takes slabs as they are, so one page waits for no other, and a
    tier that is behind gets large batches.

    Attributes:
        dropped: pages for which there was no room.
    """

    def __init__(self, tier: PageTier, pool: StagingPool) -> None:
        self.tier: Final = tier
        self.dropped = 0
        self._pool = pool
        self._changed = threading.Condition()
        self._slabs: deque[_Slab] = deque()
        self._names: set[str] = set()
        self._used = 0  # bytes of the slabs, that which is being written included
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def add(self, pages: Sequence[tuple[str, memoryview]]) -> None:
        """Copy pages, to be written; those that wait already are left out."""
        with self._changed:
            for name, page in pages:
                if name in self._names:
                    continue
                slab = self._slab(len(page))
                if slab is None:
                    self.dropped += 1
                else:
                    slab.add(name, page)
                    self._names.add(name)
            if self._thread is None and self._slabs and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="kvist-tier", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Write what waits, and stop. Idempotent; what is added later is dropped."""
        with self._changed:
            self._is_closed = True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _slab(self, size: int) -> _Slab | None:
        """One with room for a page: the last, or a new one if there may be."""
        if self._slabs and self._slabs[-1].used + size <= len(self._slabs[-1].buffer):
            return self._slabs[-1]
        if self._is_closed or self._used + max(size, BUFFER_SIZE) > ROOM:
            return None
        buffer = self._pool.take() if size <= BUFFER_SIZE else memoryview(bytearray(size))
        self._used += len(buffer)
        self._slabs.append(_Slab(buffer))
        return self._slabs[-1]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._slabs or self._is_closed)
                if not self._slabs:
                    return
                slab = self._slabs.popleft()
            self.tier.write(slab.items)
            with self._changed:
                self._names.difference_update(name for name, _ in slab.items)
                self._used -= len(slab.buffer)
            if len(slab.buffer) == BUFFER_SIZE:
                self._pool.give(slab.buffer)
