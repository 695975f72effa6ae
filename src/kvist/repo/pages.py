"""Pages: content-addressed page halves, packed into segments; every read verified, every content stored once.

Knows digests, segments and tiers. Must not know manifests, snapshots or refs: which pages are needed is not its
business. Where a page lies is `kvist.repo.index`'s.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Final

from kvist.errors import DamagedPage, IntegrityError, InvalidInput, MissingPage, NotFound
from kvist.hashing import DIGESTS, Buffer
from kvist.ids import format_digest, parse_digest
from kvist.repo.batch import Batch, windows
from kvist.repo.index import PageIndex
from kvist.repo.near import Read, Wanted, read_near
from kvist.repo.segment import Segment
from kvist.repo.tier import PageTier, Tiers, TierStats
from kvist.store import Store
from kvist.store.quota import making_room

_SMALLEST: Final = 1 << 20
"""Bytes below which a read is not split to be done in parallel."""
_HASHED: Final = 2 << 20
"""Bytes that a worker hashes at a time."""
_SCRATCH: Final = 32 << 20
"""Bytes that upkeep reads at a time."""
_LOOKED_UP: Final = 64 << 20
"""Bytes of pages that are looked up at a time, while workers read those before."""

_Doomed = Callable[[str, Iterable[str]], bool]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PutPages:
    """Result of a batch put.

    Attributes:
        digests: of each page, in the order given.
        new_pages: how many of them were not yet stored (a content that occurs twice in the batch counts once).
        new_bytes: bytes of those.
    """

    digests: list[str]
    new_pages: int
    new_bytes: int


class PageStore:
    """Page halves of one repository.

    Thread-safe: several threads, and several processes with their own instance, may put and get at once.

    Attributes:
        algorithm: how digests are spelled.
        digest: names a page: its raw digest.
        bytes_read: bytes of pages that the store gave.
    """

    def __init__(
        self,
        store: Store,
        algorithm: str,
        *,
        digest: Callable[[Buffer], bytes] | None = None,
        tiers: Sequence[PageTier] = (),
    ) -> None:
        """Read the index of ``store``.

        Args:
            store: where the segments lie.
            algorithm: of the digests.
            digest: another function than the algorithm's own, such as a keyed one.
            tiers: asked before the store, first to last; closed with this.
        """
        self.algorithm: Final = algorithm
        self.digest: Final[Callable[[Buffer], bytes]] = digest or DIGESTS[algorithm]
        self.bytes_read = 0
        self._store = store
        self._counting = threading.Lock()
        self._tiers = Tiers(tiers, algorithm, self.digest)
        self._workers = ThreadPoolExecutor(store.parallel, thread_name_prefix="kvist-pages")
        self._index = PageIndex(store, algorithm, self._workers)
        self.refresh()

    # -- the index -----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Learn of segments and damage that other processes added or removed since."""
        self._index.refresh()

    def segments(self) -> list[Segment]:
        """The segments known since the last refresh, by key."""
        return self._index.segments()

    def broken_segments(self) -> dict[str, str]:
        """Key and reason of every segment whose index cannot be read."""
        return self._index.broken()

    def damaged_places(self) -> list[tuple[str, str]]:
        """Segment key and digest of every page copy that was found damaged and still lies in its segment."""
        return sorted((key, self._name(raw)) for key, raw in self._index.damaged())

    def size(self, digest: str) -> int | None:
        """Bytes of the page, or ``None`` if no undamaged copy is known."""
        place = self._index.place(self._raw(digest))
        return None if place is None else place[0].span(place[1])[1]

    def homes(self, digest: str) -> list[str]:
        """Keys of the segments that hold the page undamaged; a read uses the first."""
        return self._index.homes(self._raw(digest))

    def names(self, segment: Segment) -> list[str]:
        """Digests of a segment's pages, in order."""
        return [self._name(raw) for raw in segment.digests]

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, pages: Sequence[Buffer], doomed: _Doomed | None = None) -> PutPages:
        """Store pages; durable when it returns. Tiers get the new ones too, in the background.

        A page already stored is only hashed. A batch that fails leaves nothing, or whole segments of it, which serve
        the next put or go with the next gc.

        Args:
            pages: contiguous buffers, each at least one byte; not changed, and not kept after the return.
            doomed: says of a digest and the segments that hold it whether it counts as not stored.

        Raises:
            StoreFull: no space.
        """
        views = [memoryview(page).cast("B") for page in pages]
        if not all(views):
            raise InvalidInput("a page has at least one byte, got an empty buffer")
        self.refresh()
        digests: list[bytes] = []
        heals = False
        with Batch(self._store, self.algorithm) as batch:
            for window, hashed in self._hash_windows(views):
                new = []
                for page, raw in zip(window, hashed, strict=True):
                    if raw not in batch.seen and not self._is_stored(raw, doomed):
                        heals_this = bool(self._index.damaged_homes(raw))
                        heals |= heals_this
                        with _room(heals_this):
                            batch.add(raw, page)
                        new.append((raw, page))
                digests += hashed
                self._tiers.offer(new)
            with _room(heals):
                written = batch.commit()
        for segment in written:
            self._index.learn(segment)
        return PutPages([self._name(raw) for raw in digests], len(batch.seen), batch.bytes)

    def _is_stored(self, raw: bytes, doomed: _Doomed | None) -> bool:
        if self._index.place(raw) is None:
            return False
        return doomed is None or not doomed(self._name(raw), self._index.homes(raw))

    def _hash_windows(self, pages: Sequence[memoryview]) -> Iterator[tuple[Sequence[memoryview], list[bytes]]]:
        """Windows of pages with their digests, in order; workers hash ahead of the consumer."""

        def hash_all(window: Sequence[memoryview]) -> list[bytes]:
            return [self.digest(page) for page in window]

        parts = list(windows(pages, [len(page) for page in pages], _HASHED))
        return zip(parts, self._workers.map(hash_all, parts), strict=True)

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def ahead(self) -> int:
        """Bytes worth asking for in one `get_into`: as many as the store's parallel reads fetch at once."""
        return self._store.window * self._store.parallel

    def get(self, digest: str) -> bytes:
        """One page's bytes, verified. Raises as `get_into`."""
        size = self.size(digest)
        if size is None:
            self.refresh()
            size = self.size(digest)
        if size is None:
            raise self.absent(digest)
        out = bytearray(size)
        self.get_into([digest], [memoryview(out)])
        return bytes(out)

    def get_into(self, digests: Sequence[str], outs: Sequence[memoryview]) -> None:
        """Read pages into ready buffers and verify every one: from the tiers, and what they lack from the store.

        Args:
            digests: what to read.
            outs: as many writable, contiguous byte views; each exactly as long as its page.

        Raises:
            MissingPage: neither a tier nor a segment holds a page.
            DamagedPage: every copy of a page is damaged; the place is marked, so that the next put writes it anew.
            InvalidInput: a buffer has not the length of its page.

        After an error the buffers' content is undefined.
        """
        wanted = list(zip(map(self._raw, digests), outs, strict=True))
        if self._tiers:
            near = windows(wanted, [len(out) for out in outs], self._window(wanted))
            wanted = self._finish([self._workers.submit(self._tiers.read, window) for window in near])
        self._require(wanted, fills=True)

    def verify(
        self,
        digests: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
        *,
        without: Container[str] = (),
    ) -> list[str]:
        """Read pages from the store, not from tiers, and hash them; the digests of those missing or damaged. Marks
        damaged places.

        Args:
            digests: what to verify.
            progress: called with pages done and pages in all.
            without: keys of segments that do not count.
        """
        found = [(digest, self.size(digest)) for digest in digests]
        bad = [digest for digest, size in found if size is None]
        known = [(digest, size) for digest, size in found if size is not None]
        done = len(bad)
        scratch = memoryview(bytearray(max(_SCRATCH, self.ahead)))
        for window in windows(known, [size for _, size in known], len(scratch)):
            wanted, start = [], 0
            for digest, size in window:
                if size > len(scratch):
                    scratch = memoryview(bytearray(size))
                wanted.append((self._raw(digest), scratch[start : start + size]))
                start += size
            bad += [self._name(raw) for raw, _ in self._read(wanted, without)]
            done += len(window)
            if progress is not None:
                progress(done, len(digests))
        return bad

    def _window(self, wanted: Sequence[Wanted]) -> int:
        """Bytes to ask for at a time: what the store likes, or less, so that all its parallel reads have some."""
        size = sum(len(out) for _, out in wanted)
        return min(self._store.window, max(_SMALLEST, size // self._store.parallel))

    def _require(self, wanted: Sequence[Wanted], *, fills: bool = False) -> None:
        """Read all of it from the store. Raises as `get_into`."""
        failed = self._read(wanted, fills=fills)
        if failed:  # another process may have written, or repacked, these pages since the last refresh
            self.refresh()
            failed = self._read(failed, fills=fills)
        if failed:
            raise self.absent(self._name(failed[0][0]))

    def _read(self, wanted: Sequence[Wanted], without: Container[str] = (), *, fills: bool = False) -> list[Wanted]:
        """Read from the store what can be read, and offer it to the tiers if it ``fills`` them; return the rest: pages
        that are missing, or damaged in every copy."""
        failed: list[Wanted] = []
        tasks: list[Future[list[Wanted]]] = []
        most = self._window(wanted)
        try:
            for part in windows(wanted, [len(out) for _, out in wanted], _LOOKED_UP):
                for key, reads in self._locate(part, without, failed).items():
                    reads.sort(key=lambda read: read[0])
                    near = windows(reads, [len(out) for _, (_, out) in reads], most)
                    tasks += [self._workers.submit(self._read_window, key, window, fills) for window in near]
        finally:
            damaged = self._finish(tasks)
        if damaged:  # try another copy; each round marks one more place of each, so this ends
            failed += self._read(damaged, without, fills=fills)
        return failed

    @staticmethod
    def _finish(tasks: Sequence[Future[list[Wanted]]]) -> list[Wanted]:
        """What the tasks left undone. Waits for all, also when one raises: then the buffers are the caller's again."""
        wait(tasks)
        return [read for task in tasks for read in task.result()]

    def _locate(self, wanted: Iterable[Wanted], without: Container[str], failed: list[Wanted]) -> dict[str, list[Read]]:
        """Offsets by segment; what lies nowhere goes to ``failed``."""
        found: dict[str, list[Read]] = {}
        for raw, out in wanted:
            place = self._index.place(raw, without)
            if place is None:
                failed.append((raw, out))
                continue
            segment, entry = place
            start, size = segment.span(entry)
            if len(out) != size:
                raise InvalidInput(f"page {self._name(raw)} has {size} bytes, its buffer {len(out)}")
            found.setdefault(segment.key, []).append((start, (raw, out)))
        return found

    def _read_window(self, key: str, reads: Sequence[Read], fills: bool) -> list[Wanted]:
        """Read and verify neighbours in one segment; those that are damaged there.

        What comes wrong is read once more, alone: a neighbour may be at fault, or the way here, and a mark is for ever.
        """
        try:
            bad = [read for read in self._read_near(key, reads) if self._read_near(key, [read])]
        except NotFound:  # a gc deleted it: look the pages up again
            self._index.drop(key)
            return [wanted for _, wanted in reads]
        for _, (raw, _) in bad:
            self._index.mark(key, raw)
        with self._counting:
            self.bytes_read += sum(len(out) for _, (_, out) in reads)
        if fills and self._tiers:
            wrong = {id(out) for _, (_, out) in bad}
            self._tiers.offer([wanted for _, wanted in reads if id(wanted[1]) not in wrong])
        return [wanted for _, wanted in bad]

    def _read_near(self, key: str, reads: Sequence[Read]) -> list[Read]:
        """Read neighbours in one segment; those that are not what they should be."""
        try:
            return read_near(self._store, self.digest, key, reads)
        except IntegrityError as error:
            logger.warning("%s", error)
            return list(reads)

    def absent(self, digest: str) -> MissingPage | DamagedPage:
        """The error for a page of which no undamaged copy is known."""
        damaged = self._index.damaged_homes(self._raw(digest))
        if damaged:
            return DamagedPage(
                f"page {digest} is damaged in {', '.join(damaged)}: its bytes do not hash to its digest",
                hint="snapshot the session again: the next put of the same content heals it",
            )
        return MissingPage(f"page {digest} is in no segment", hint="run `kvist fsck`")

    # -- upkeep --------------------------------------------------------------------------------------------------

    def tier_stats(self) -> tuple[TierStats, ...]:
        """What each tier did since this was opened, first to last."""
        return self._tiers.stats()

    def rewrite(self, digests: Sequence[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Copy stored pages into new segments, so that the old ones can go. Verified; durable when it returns.

        Raises:
            DamagedPage, MissingPage: a page cannot be copied; nothing new is visible.
        """
        done = 0
        with making_room(), Batch(self._store, self.algorithm) as batch:
            for window in windows(digests, [self.size(digest) or 0 for digest in digests], max(_SCRATCH, self.ahead)):
                wanted = [(self._raw(digest), memoryview(bytearray(self.size(digest) or 0))) for digest in window]
                self._require(wanted)
                for raw, out in wanted:
                    if raw not in batch.seen:
                        batch.add(raw, out)
                done += len(window)
                if progress is not None:
                    progress(done, len(digests))
            written = batch.commit()
        for segment in written:
            self._index.learn(segment)

    def close(self) -> None:
        """Stop the worker threads and close the tiers, once what they were offered is written. Idempotent."""
        self._workers.shutdown()
        self._tiers.close()

    def _raw(self, digest: str) -> bytes:
        with suppress(ValueError):
            raw = bytes.fromhex(digest.partition(":")[2])
            if len(raw) == 32 and self._name(raw) == digest:  # faster than to match it, and as strict
                return raw
        parse_digest(digest)
        raise InvalidInput(f"this repository names pages by {self.algorithm}, got {digest}")

    def _name(self, raw: bytes) -> str:
        return format_digest(self.algorithm, raw)


def _room(heals: bool) -> AbstractContextManager[None]:
    """What heals a page is written also at the limit of a quota."""
    return making_room() if heals else nullcontext()
