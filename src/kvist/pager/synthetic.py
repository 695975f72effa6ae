"""An engine that computes nothing: pages and tables in memory, for tests of whatever stands above a pager."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvist.errors import Conflict, InvalidInput, PoolExhausted
from kvist.layout import Layout
from kvist.pager.base import CachePager, PageBytes
from kvist.repo.manifest import LogicalSeq


@dataclass(slots=True)
class _Pool:
    """What clones of one synthetic engine share. A pause holds the lock: other threads wait until it is undone."""

    pages: dict[int, PageBytes] = field(default_factory=dict)
    sequences: dict[str, LogicalSeq] = field(default_factory=dict)
    pending: dict[int, SyntheticCachePager] = field(default_factory=dict)  # who allocated the slot
    next_ix: int = 0
    pauses: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


class SyntheticCachePager(CachePager):
    """The `CachePager` contract over a dict.

    Slots are numbered upwards and never used twice. `clone` gives a second pager on the same engine.

    Attributes:
        calls: how often each method was called, for tests.
    """

    def __init__(self, layout: Layout, *, slots: int | None = None) -> None:
        self._layout = layout
        self._slots = slots
        self._pool = _Pool()
        self.calls: Counter[str] = Counter()

    def clone(self) -> SyntheticCachePager:
        """A pager on the same pool."""
        other = SyntheticCachePager(self._layout, slots=self._slots)
        other._pool = self._pool
        return other

    def populate(self, pages: int, seed: int, *, sequence_id: str | None = None, fill: int | None = None) -> LogicalSeq:
        """Add a sequence of ``pages`` pages whose bytes depend on ``seed`` and position alone.

        Equal seeds give equal pages. ``fill`` defaults to half a page.
        """
        random_bytes = random.Random(seed).randbytes
        half = self._layout.page_bytes
        ixs = self.allocate_pages(pages)
        for ix in ixs:
            self.write_page(ix, PageBytes(random_bytes(half), random_bytes(half)))
        size = self._layout.page_size_tokens
        fill = (size // 2 if fill is None else fill) if pages else 0
        seq = LogicalSeq(sequence_id or f"seq-{seed}", tuple(ixs), fill)
        self.install_logical_seqs([seq])
        return seq

    @property
    def is_paused(self) -> bool:
        """Whether a `pause` is not undone."""
        return self._pool.pauses > 0

    def meta(self) -> Layout:
        """See `CachePager.meta`."""
        return self._layout

    def pause(self) -> None:
        """See `CachePager.pause`."""
        self._pool.lock.acquire()
        self.calls["pause"] += 1
        self._pool.pauses += 1

    def resume(self) -> None:
        """See `CachePager.resume`."""
        self.calls["resume"] += 1
        self._pool.pauses -= 1
        self._pool.lock.release()

    def occupied_pages(self) -> list[int]:
        """See `CachePager.occupied_pages`."""
        with self._pool.lock:
            return sorted(self._pool.pages.keys() - self._pool.pending.keys())

    def logical_seqs(self) -> list[LogicalSeq]:
        """See `CachePager.logical_seqs`."""
        with self._pool.lock:
            return list(self._pool.sequences.values())

    def read_page(self, ix: int) -> PageBytes:
        """See `CachePager.read_page`."""
        self.calls["read_page"] += 1
        with self._pool.lock:
            if ix not in self._pool.pages:
                raise InvalidInput(f"slot {ix} holds no page")
            return self._pool.pages[ix]

    def allocate_pages(self, n: int) -> list[int]:
        """See `CachePager.allocate_pages`."""
        with self._pool.lock:
            used = len(self._pool.pages.keys() | self._pool.pending.keys())
            if self._slots is not None and used + n > self._slots:
                raise PoolExhausted(f"{n} slots are needed, {self._slots - used} of {self._slots} are free")
            ixs = list(range(self._pool.next_ix, self._pool.next_ix + n))
            self._pool.next_ix += n
            self._pool.pending |= dict.fromkeys(ixs, self)
            return ixs

    def write_page(self, ix: int, page: PageBytes) -> None:
        """See `CachePager.write_page`."""
        self.calls["write_page"] += 1
        half = self._layout.page_bytes
        if len(page.k) != half or len(page.v) != half:
            raise InvalidInput(f"slot {ix}: K and V have {len(page.k)} and {len(page.v)} bytes, expected {half} each")
        with self._pool.lock:
            if self._pool.pending.get(ix) is not self:
                raise InvalidInput(f"slot {ix} was not allocated since the last install")
            self._pool.pages[ix] = PageBytes(bytes(page.k), bytes(page.v))

    def install_logical_seqs(self, seqs: Sequence[LogicalSeq]) -> None:
        """See `CachePager.install_logical_seqs`."""
        with self._pool.lock:
            taken = [seq.id for seq in seqs if seq.id in self._pool.sequences]
            if taken:
                raise Conflict(f"the engine already has a sequence {taken[0]!r}")
            twice = [name for name, count in Counter(seq.id for seq in seqs).items() if count > 1]
            if twice:
                raise Conflict(f"two of the sequences are called {twice[0]!r}")
            unknown = {ix for seq in seqs for ix in seq.page_ixs} - self._pool.pages.keys()
            if unknown:
                raise InvalidInput(f"slot {min(unknown)} holds no page")
            self._pool.sequences |= {seq.id: seq for seq in seqs}
            self._sweep(ix for ix, owner in self._pool.pending.items() if owner is self)

    def release_pages(self, ixs: Sequence[int]) -> None:
        """See `CachePager.release_pages`."""
        with self._pool.lock:
            self._sweep(ix for ix in ixs if self._pool.pending.get(ix) is self)

    def _sweep(self, ixs: Iterable[int]) -> None:
        """Free those of ``ixs`` that no sequence names."""
        named = {ix for seq in self._pool.sequences.values() for ix in seq.page_ixs}
        for ix in list(ixs):
            self._pool.pending.pop(ix, None)
            if ix not in named:
                self._pool.pages.pop(ix, None)
