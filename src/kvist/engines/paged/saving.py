"""Write-through: finished blocks go to the durable prefix cache, in the background and never in the engine's way.

Knows host memory and a `PrefixCache`. Must not know requests. What cannot be stored is dropped: a cache may forget.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvist.blocks.policy import Lru
from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.paged.plans import Place
from kvist.engines.paged.staging import HostPool, unbind
from kvist.errors import KvistError
from kvist.layout import Layout
from kvist.pager.prefix import PrefixCache
from kvist.repo.repository import Repository

log = logging.getLogger("kvist.paged")

_WAIT_S: Final = 0.5
"""How long a block may wait for others to be stored with."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """Pages in pinned slots, once ``done`` has passed."""

    group: GroupPages
    names: list[str]
    slots: list[int]
    done: Done


class Saver:
    """Stores blocks from a thread of its own.

    Attributes:
        saved, dropped: blocks that were stored, and that were not: no room in host memory, or a store that fails.
        nbytes: of those that were stored.
    """

    def __init__(
        self, repo: Callable[[], Repository], layouts: Sequence[Layout], pool: HostPool, max_bytes: int | None
    ) -> None:
        self.saved = self.dropped = self.nbytes = 0
        self._repo, self._layouts, self._pool, self._max_bytes = repo, layouts, pool, max_bytes
        self._cache: PrefixCache | None = None
        self._opening, self._lock = threading.Lock(), threading.Lock()
        self._held = 0
        self._queue: queue.SimpleQueue[_Copied | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvist-save", daemon=True)
        self._thread.start()

    @property
    def cache(self) -> PrefixCache:
        """What is stored; read when it is first needed."""
        with self._opening:
            if self._cache is None:
                cache = PrefixCache(self._repo(), self._layouts, max_bytes=self._max_bytes, policy=Lru())
                cache.refresh()
                self._cache = cache
            return self._cache

    def save(self, group: GroupPages, places: Sequence[Place]) -> None:
        """Copy pages of one group out of the cache, to be stored. In the engine's thread."""
        room = len(self._pool) // 2 - self._held
        slots = self._pool.take(min(len(places), room), wait=False) if room > 0 else []
        self.dropped += len(places) - len(slots)
        if slots:
            with self._lock:
                self._held += len(slots)
            kept = places[: len(slots)]
            done = group.read([place.block for place in kept], self._pool.rows, slots)
            self._queue.put(_Copied(group, [place.name or "" for place in kept], slots, done))

    def touch(self, blocks: Sequence[tuple[int, str]]) -> None:
        """Note that a request used these stored blocks, its root first. Not in the engine's thread."""
        try:
            self.cache.touch(blocks)
        except KvistError as error:
            log.debug("the durable prefix cache cannot be read: %s", error)

    def close(self) -> None:
        """Store what waits, and stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        unbind()
        is_open = True
        while is_open:
            first = self._queue.get()
            is_open = first is not None
            waiting, until = ([first] if first is not None else []), time.monotonic() + _WAIT_S
            while is_open and (left := until - time.monotonic()) > 0 and self._has_room(waiting):
                try:
                    more = self._queue.get(timeout=left)
                except queue.Empty:
                    break
                is_open = more is not None
                if more is not None:
                    waiting.append(more)
            if waiting:
                self._store(waiting)

    def _has_room(self, waiting: Sequence[_Copied]) -> bool:
        return sum(len(copied.slots) for copied in waiting) < len(self._pool) // 4

    def _store(self, waiting: Sequence[_Copied]) -> None:
        count = sum(len(copied.slots) for copied in waiting)
        try:
            for copied in waiting:
                copied.done.wait()
                half = copied.group.layout.page_bytes
                halves = self._pool.halves(copied.slots, half)
                entries = list(zip(copied.names, halves[::2], halves[1::2], strict=True))
                self.cache.add(copied.group.layout.group, entries)
            self.cache.flush()
            self.saved += count
            self.nbytes += sum(len(copied.slots) * copied.group.page_bytes for copied in waiting)
        except Exception as error:  # whatever it is, the slots must come back and the thread go on
            log.warning("%d blocks are not stored: %s", count, error, exc_info=not isinstance(error, KvistError))
            self.dropped += count
            if self._cache is not None:
                self._cache.discard()
        finally:
            for copied in waiting:
                self._pool.release(copied.slots)
            with self._lock:
                self._held -= count
