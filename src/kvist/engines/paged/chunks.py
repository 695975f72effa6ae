"""Chunks on their way to a repository and back: durable, bounded, verified on every read, safe from any thread.

What a cache tier of an engine hands over to be kept (LMCache a chunk, SGLang's HiCache a page of its host pool). Knows
block hashes, page halves and a `PrefixCache`. Must not know the engine, nor what a page half is made of.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from kvist.blocks.policy import make_policy
from kvist.engines.paged.pins import Pinning, Pins
from kvist.errors import DamagedPage, InvalidInput, KvistError, MissingPage
from kvist.hashing import Buffer
from kvist.layout import Layout
from kvist.pager.chain import Halves, Key
from kvist.pager.prefix import PrefixCache
from kvist.repo.repository import Repository

_ATTEMPTS: Final = 4
"""How often a removal is written again because another server's commit brought the chunk back."""


@dataclass(slots=True)
class ChunkMetrics:
    """What a `Chunks` has done since it was made.

    Attributes:
        stored, dropped: chunks that were put and are durable, and that were not: no room, or a store that fails.
        read, missed: chunks that were read, and that were asked for and not there.
        damaged: of those missed, found damaged or missing in the store.
        evicted: chunks that the bound cost.
        bytes_stored, bytes_read: of page halves; what was stored before is not stored again.
    """

    stored: int = 0
    dropped: int = 0
    read: int = 0
    missed: int = 0
    damaged: int = 0
    evicted: int = 0
    bytes_stored: int = 0
    bytes_read: int = 0


@dataclass(slots=True)
class _Put:
    entries: list[tuple[str, Buffer, Buffer]]
    done: Callable[[str], object]
    future: Future[int] = field(default_factory=Future)


class Chunks:
    """The chunks of one worker, in a repository.

    A chunk is a page: a K half and a V half in the order of a kvist page, with as many tokens as a chunk has. So it is
    stored as page halves and not as one object: equal halves are stored once, and the branch that names them reads like
    that of any engine's prefix cache.

    What is put is committed by a thread of its own, and can be found once it is durable. What cannot be stored is
    dropped: a cache may forget. A chunk that is read is verified; a damaged page is a miss, and forgotten.
    """

    def __init__(
        self,
        repo: Repository,
        layout: Layout,
        *,
        max_bytes: int,
        policy: str = "lru",
        staging_bytes: int = 1 << 30,
        refresh_s: float = 5.0,
        waits_for_refresh: bool = False,
        pin_timeout_s: float = 300.0,
        name: str = "chunks",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the chunks of ``layout``; one read of the repository.

        Args:
            repo: where they lie; closed by `close`.
            layout: of a page.
            max_bytes: see `PrefixCache`.
            policy: a name of `kvist.blocks.policy.POLICIES`.
            staging_bytes: of all buffers that wait.
            refresh_s: how often, at most, a miss makes the repository be asked anew.
            waits_for_refresh: the miss that does so waits for the answer.
            pin_timeout_s: see `Pins`.
            name: of the logger and the thread, after ``kvist.`` and ``kvist-``.
            clock: seconds.

        Raises:
            InvalidInput: a bound that no chunk fits.
            KvistError: the repository cannot be read.
        """
        self.pins: Final = Pins[Key](pin_timeout_s, clock)
        self.metrics: Final = ChunkMetrics()
        self._repo, self._clock = repo, clock
        self._staging_bytes, self._refresh_s, self._waits = staging_bytes, refresh_s, waits_for_refresh
        self._log: Final = logging.getLogger(f"kvist.{name}")
        self._page_bytes: Final = 2 * layout.page_bytes
        if max_bytes < self._page_bytes:
            raise InvalidInput(f"a chunk has {self._page_bytes} bytes, so max_bytes cannot be {max_bytes}")
        inner = make_policy(policy, capacity=max_bytes // self._page_bytes, parents=dict[Key, Key | None]())
        self._cache: Final = PrefixCache(repo, [layout], max_bytes=max_bytes, policy=Pinning(inner, self.pins))
        self._cache.refresh()
        self._refreshed = clock()
        self._lock: Final = threading.Lock()  # of what follows, and of the metrics
        self._waiting: set[str] = set()
        self._unwanted: set[str] = set()
        self._is_closed = False
        self._queue: queue.SimpleQueue[_Put | None] = queue.SimpleQueue()
        self._thread: Final = threading.Thread(target=self._run, name=f"kvist-{name}", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct page halves that can be found."""
        return self._cache.nbytes

    def __len__(self) -> int:
        """How many chunks can be found."""
        return len(self._cache)

    def __contains__(self, block: str) -> bool:
        """Whether the chunk is stored. A miss may make others' chunks known, now or a moment later."""
        if (0, block) not in self._cache and not (self._refresh() and (0, block) in self._cache):
            return False
        return block not in self._unwanted

    def _refresh(self) -> bool:
        """Ask the repository anew, unless it was asked lately; whether it has answered."""
        if self._clock() - self._refreshed < self._refresh_s or self._is_closed:
            return False
        self._refreshed = self._clock()
        if not self._waits:
            self._wake()
            return False
        try:
            self._cache.refresh()
        except KvistError as error:
            self._log.warning("what other servers have stored is not known: %s", error)
            return False
        return True

    def is_waiting(self, block: str) -> bool:
        """Whether the chunk was put and is not durable yet."""
        return block in self._waiting

    # -- writing -------------------------------------------------------------------------------------------------

    def put(
        self,
        blocks: Sequence[str],
        copy: Callable[[int], tuple[Buffer, Buffer]],
        done: Callable[[str], object] = lambda block: None,
    ) -> Future[int]:
        """Take chunks in; those that are there, or on their way, are passed over.

        Args:
            blocks: of the chunks, a request's root first.
            copy: gives the K and V half of the chunk of that index, buffers that must not change before the future is
                done.
            done: called with the block of each chunk once it is durable, in another thread.

        Returns:
            How many of them were stored, once that is known; or the error for which none was.
        """
        put = _Put([], done)
        for index, block in enumerate(blocks):
            with self._lock:
                if block in self._waiting or block in self._unwanted or (0, block) in self._cache:
                    continue
                if self._is_closed or (len(self._waiting) + 1) * self._page_bytes > self._staging_bytes:
                    self.metrics.dropped += 1
                    continue
                self._waiting.add(block)
            try:
                put.entries.append((block, *copy(index)))
            except BaseException:
                with self._lock:
                    self._waiting.difference_update([block, *(entry[0] for entry in put.entries)])
                raise
        if not put.entries:
            put.future.set_result(0)
        elif not self._submit(put):
            with self._lock:
                self._waiting.difference_update(entry[0] for entry in put.entries)
                self.metrics.dropped += len(put.entries)
            put.future.set_result(0)
        return put.future

    def _submit(self, put: _Put) -> bool:
        """Hand it to the thread; ``False``: that takes no more."""
        with self._lock:
            if not self._is_closed:
                self._queue.put(put)
            return not self._is_closed

    def remove(self, block: str, *, force: bool = True) -> bool:
        """Forget a chunk; whether there was one. Who reads it now reads on: its pages do not change.

        Args:
            block: of the chunk.
            force: also if it is pinned.
        """
        with self._lock:
            is_there = (0, block) in self._cache or block in self._waiting
            if not is_there or block in self._unwanted or (not force and (0, block) in self.pins):
                return False
            self._unwanted.add(block)
        self.pins.forget((0, block))
        self._cache.drop(0, block)
        self._wake()
        return True

    def clear(self) -> int:
        """Forget all chunks that are not pinned; how many."""
        return sum(self.remove(block, force=False) for _, block in self._cache)

    def flush(self) -> bool:
        """Wait until all that was put or removed before is dealt with; whether the store has taken the last of it."""
        put = _Put([], lambda block: None)
        return self._submit(put) and put.future.exception() is None

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, blocks: Sequence[str], outs: Sequence[tuple[memoryview, memoryview]]) -> list[bool]:
        """Read chunks into ready buffers, verified.

        Args:
            blocks: of the chunks, a request's root first.
            outs: the K and V half of each; undefined afterwards where it was not read.

        Returns:
            Which of them were read. One that is not there, or damaged, was not; nor was any if the store fails.
        """
        wanted = [
            (block, out, halves) for block, out in zip(blocks, outs, strict=True) if (halves := self._find(block))
        ]
        read: set[str] = set()
        try:
            try:
                self._load([(out, halves) for _, out, halves in wanted])
                read.update(block for block, _, _ in wanted)
            except (DamagedPage, MissingPage):  # of one of them: find which
                read.update(block for block, out, halves in wanted if self._load_one(block, out, halves))
        except KvistError as error:
            self._log.warning("chunks cannot be read: %s", error)
            read.clear()
        self._cache.touch([(0, block) for block in blocks if block in read])
        with self._lock:
            self.metrics.read += len(read)
            self.metrics.missed += len(blocks) - len(read)
            self.metrics.bytes_read += len(read) * self._page_bytes
        return [block in read for block in blocks]

    def _find(self, block: str) -> Halves | None:
        return None if block in self._unwanted else self._cache.find(0, block)

    def _load(self, wanted: Sequence[tuple[tuple[memoryview, memoryview], Halves]]) -> None:
        digests = [digest for _, halves in wanted for digest in halves]
        self._repo.get_pages(digests, [out for outs, _ in wanted for out in outs])

    def _load_one(self, block: str, outs: tuple[memoryview, memoryview], halves: Halves) -> bool:
        try:
            self._load([(outs, halves)])
        except (DamagedPage, MissingPage) as error:
            self._log.warning("a chunk is lost: %s", error)
            with self._lock:
                self.metrics.damaged += 1
            self._cache.drop(0, block)
            self._wake()  # write that the branch names it no more
            return False
        return True

    def close(self) -> None:
        """Store what waits, stop, and close the repository. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()
        self._repo.close()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._submit(_Put([], lambda block: None))

    def _run(self) -> None:
        is_open = True
        while is_open:
            puts: list[_Put] = []
            job = self._queue.get()
            while True:  # all that waits is one commit
                is_open &= job is not None
                puts += [job] if job is not None else []
                try:
                    job = self._queue.get_nowait()
                except queue.Empty:
                    break
            self._commit(puts)

    def _commit(self, puts: Sequence[_Put]) -> None:
        with self._lock:
            unwanted = set(self._unwanted)
        failed: Exception | None = None
        try:
            for put in puts:
                self._cache.add(0, [entry for entry in put.entries if entry[0] not in unwanted])
            self._flush(unwanted)
        except Exception as error:  # whatever it is, the buffers must come back and the thread go on
            self._cache.discard()
            failed = error
        blocks = [entry[0] for put in puts for entry in put.entries]
        stored = [] if failed else [block for block in blocks if (0, block) in self._cache]
        with self._lock:
            self._waiting.difference_update(blocks)
            self._unwanted -= unwanted
            self.metrics.stored += len(stored)
            self.metrics.dropped += len(blocks) - len(stored)
        if failed is not None and (blocks or unwanted):
            self._log.warning(
                "%d chunks are not stored: %s", len(blocks), failed, exc_info=not isinstance(failed, KvistError)
            )
        for put in puts:
            self._tell(put, set(stored), failed)

    def _flush(self, unwanted: set[str]) -> None:
        for _ in range(_ATTEMPTS):
            for block in unwanted:
                self._cache.drop(0, block)
            flushed = self._cache.flush()
            self._refreshed = self._clock()
            with self._lock:
                self.metrics.evicted += flushed.evicted
                self.metrics.bytes_stored += flushed.new_bytes
            if not any((0, block) in self._cache for block in unwanted):
                return

    def _tell(self, put: _Put, stored: set[str], failed: Exception | None) -> None:
        mine = [entry[0] for entry in put.entries if entry[0] in stored]
        for block in mine:
            try:
                put.done(block)
            except Exception:  # the caller's; the others want to hear too
                self._log.exception("a callback for chunk %s failed", block)
        if failed is not None:
            put.future.set_exception(failed)
        else:
            put.future.set_result(len(mine))
