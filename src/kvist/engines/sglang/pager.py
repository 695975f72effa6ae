"""`CachePager` over SGLang's pool and prefix cache, for code in the scheduler's process: `kvist.pager` on any SGLang.

In the scheduler's thread, where SGLang stands between two steps whenever anything but a step runs. Knows slots, pages
and the prefix cache; must not know repositories. The plugin does not go through it: requests that arrive while pages
are still being read need what `arriving` does.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import torch

from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.paged.requests import sequence_id
from kvist.engines.sglang import internals, requests
from kvist.errors import Conflict, InvalidInput, PoolExhausted
from kvist.layout import Layout
from kvist.pager.base import CachePager, PageBytes
from kvist.repo.manifest import LogicalSeq

_LOCK: Final = "kvist_pager_lock"


class SglangPager(CachePager):
    """The paged KV cache of one scheduler.

    Slots are SGLang's pages. What is installed stays until `drop`; its full pages are in the prefix cache, so that a
    request with its tokens hits them, as far as that did not hold these tokens before.
    """

    def __init__(self, scheduler: Any, model: str, revision: str) -> None:
        """
        Args:
            scheduler: SGLang's, with its pools made.
            model, revision: what the layout records; the revision pins the weights.

        Raises:
            UnsupportedModel: the pool is of a kind that was never run, see `internals.check_pool`.
        """
        self._scheduler = scheduler
        self._allocator, self._tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        internals.check_pool(self._allocator)
        self._layout = internals.layout_of(self._allocator, model, revision)
        self._size = self._layout.page_size_tokens
        layers, self._count = internals.layers(self._allocator)
        self._pages = GroupPages(self._layout, layers, self._count)
        self._lock: threading.RLock = vars(scheduler).setdefault(_LOCK, threading.RLock())
        self._pending: set[int] = set()
        self._installed: dict[str, LogicalSeq] = {}
        self._locks: dict[str, Any] = {}
        self._given: set[int] = set()  # pages that the prefix cache owns now

    def meta(self) -> Layout:
        """See `CachePager.meta`."""
        return self._layout

    def pause(self) -> None:
        """See `CachePager.pause`: SGLang stands still while its thread is here, other pagers wait."""
        self._lock.acquire()
        internals.synchronize(self._allocator.device)

    def resume(self) -> None:
        """See `CachePager.resume`."""
        self._lock.release()

    def occupied_pages(self) -> list[int]:
        """See `CachePager.occupied_pages`."""
        cached = self._tree.all_values_flatten() if self._tree.total_size()[0] else torch.empty(0, dtype=torch.int64)
        held = {ix for seq in self.logical_seqs() for ix in seq.page_ixs}
        return sorted(held.union((cached // self._size).tolist()))

    def logical_seqs(self) -> list[LogicalSeq]:
        """See `CachePager.logical_seqs`: what runs or waits, and what was installed."""
        live = filter(internals.is_plain, internals.requests(self._scheduler))
        return [*map(self._logical, live), *self._installed.values()]

    def _logical(self, request: Any) -> LogicalSeq:
        cached = internals.computed(request)
        pages = tuple(internals.pages(self._scheduler, request, cached).tolist()) if cached else ()
        state = requests.state(request, finished=False, deterministic=internals.is_deterministic())
        ids = tuple(internals.token_ids(request))
        return LogicalSeq(sequence_id(requests.name(request.rid)), pages, cached % self._size, ids, state)

    # -- pages -------------------------------------------------------------------------------------------------------

    def read_page(self, ix: int) -> PageBytes:
        """See `CachePager.read_page`."""
        if ix not in self.occupied_pages():
            raise InvalidInput(f"slot {ix} holds no page")
        out = bytearray(self._pages.page_bytes)
        self.read_pages([ix], memoryview(out))
        half = self._layout.page_bytes
        return PageBytes(bytes(out[:half]), bytes(out[half:]))

    def read_pages(self, ixs: Sequence[int], out: memoryview) -> None:
        """See `CachePager.read_pages`."""
        if ixs:
            rows = torch.frombuffer(out, dtype=torch.uint8).view(len(ixs), self._pages.page_bytes)
            self._pages.read(ixs, rows, range(len(ixs))).wait()

    def allocate_pages(self, n: int) -> list[int]:
        """See `CachePager.allocate_pages`."""
        if n == 0:
            return []
        slots = internals.take(self._scheduler, n)
        if slots is None:
            free = self._allocator.available_size() // self._size
            raise PoolExhausted(f"{n} slots are needed, {free} of {self._count - 1} are free")
        pages: list[int] = (slots[:: self._size] // self._size).tolist()
        self._pending.update(pages)
        return pages

    def write_page(self, ix: int, page: PageBytes) -> None:
        """See `CachePager.write_page`."""
        half = self._layout.page_bytes
        if len(page.k) != half or len(page.v) != half:
            raise InvalidInput(f"slot {ix}: K and V have {len(page.k)} and {len(page.v)} bytes, expected {half} each")
        self.write_pages([ix], memoryview(bytearray(page.k) + page.v), [None])

    def write_pages(self, ixs: Sequence[int], data: memoryview, blocks: Sequence[str | None]) -> None:
        """See `CachePager.write_pages`."""
        if strange := [ix for ix in ixs if ix not in self._pending]:
            raise InvalidInput(f"slot {strange[0]} was not allocated since the last install")
        if ixs:
            rows = torch.frombuffer(data, dtype=torch.uint8).view(len(ixs), self._pages.page_bytes)
            self._pages.write(ixs, rows, range(len(ixs)), Done(self._pages.on_device)).wait()

    def release_pages(self, ixs: Sequence[int]) -> None:
        """See `CachePager.release_pages`."""
        self._free([ix for ix in ixs if ix in self._pending])

    def _free(self, pages: Sequence[int]) -> None:
        self._pending.difference_update(pages)
        if pages:
            starts = torch.tensor(pages, dtype=torch.int64, device=self._allocator.device) * self._size
            within = torch.arange(self._size, device=self._allocator.device)
            self._allocator.free((starts[:, None] + within).reshape(-1))

    # -- sequences ---------------------------------------------------------------------------------------------------

    def install_logical_seqs(self, seqs: Sequence[LogicalSeq]) -> None:
        """See `CachePager.install_logical_seqs`."""
        live = {seq.id for seq in self.logical_seqs()}
        for name, count in Counter(seq.id for seq in seqs).items():
            if name in live or count > 1:
                raise Conflict(f"the engine already has a sequence {name!r}, or two of them are called so")
        ours = self._pending | {ix for seq in self._installed.values() for ix in seq.page_ixs}
        if strange := {ix for seq in seqs for ix in seq.page_ixs} - ours:
            raise InvalidInput(f"slot {min(strange)} holds no page that was allocated here")
        for seq in seqs:
            self._installed[seq.id] = seq
            self._offer(seq)
        self._pending -= {ix for seq in seqs for ix in seq.page_ixs}
        self._free(sorted(self._pending))

    def _offer(self, seq: LogicalSeq) -> None:
        """Put the full pages of a sequence into the prefix cache, as far as it lacks them, and lock them there."""
        cached = min(seq.cached_tokens(self._size), len(seq.token_ids))
        ids = seq.token_ids[: cached - cached % self._size]
        known, node = internals.match(self._tree, ids, None, None)
        if known < len(ids):
            mine = seq.page_ixs[known // self._size : len(ids) // self._size]
            starts = torch.tensor(mine, dtype=torch.int64, device=self._allocator.device) * self._size
            slots = (starts[:, None] + torch.arange(self._size, device=self._allocator.device)).reshape(-1)
            if self._given.isdisjoint(mine):
                path = self._tree.path_device_indices(node)[:known]
                node = internals.insert(self._tree, ids, None, None, torch.cat([path, slots]), known)
                self._given.update(mine)
        self._locks[seq.id] = self._tree.lock(node)

    def drop(self, sequence_id: str) -> None:
        """Give a sequence's pages back; those in the prefix cache stay there until SGLang evicts them.

        Raises:
            InvalidInput: it was not installed here.
        """
        seq = self._installed.pop(sequence_id, None)
        if seq is None:
            raise InvalidInput(f"no sequence {sequence_id!r} was installed")
        self._tree.unlock(self._locks.pop(sequence_id))
        held = {ix for other in self._installed.values() for ix in other.page_ixs}
        mine = set(seq.page_ixs) - held
        self._free(sorted(mine - self._given))
        self._given -= mine
