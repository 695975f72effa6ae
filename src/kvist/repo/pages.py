"""Pages: content-addressed page halves, packed into segments; every read verified, every content stored once.

Knows digests and segments. Must not know manifests, snapshots or refs: which pages are needed is not its business.

The index (digest to place) lives in memory and is rebuilt from the segments' own; nothing on disk caches it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

from kvist.errors import DamagedPage, IntegrityError, InvalidInput, MissingPage, NotFound, StoreError
from kvist.hashing import DIGESTS, Buffer
from kvist.ids import digest_hex, format_digest, parse_digest
from kvist.repo import marks
from kvist.repo import segment as segments
from kvist.repo.batch import Batch, windows
from kvist.repo.segment import Segment
from kvist.store import ObjectInfo, Range, Store

_WINDOW: Final = 2 << 20
"""Bytes a worker reads or hashes at a time: small enough that the second pass finds them in the cache."""
_PART: Final = 64 << 20
"""Bytes that are looked up at a time, while workers read those before."""
_THREADS: Final = min(8, os.cpu_count() or 1)

_Wanted = tuple[bytes, memoryview]
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
    """

    def __init__(self, store: Store, algorithm: str) -> None:
        self.algorithm: Final = algorithm
        self._store = store
        self._digest: Callable[[Buffer], bytes] = DIGESTS[algorithm]
        self._lock = threading.RLock()
        self._segments: dict[str, Segment] = {}
        self._places: dict[bytes, list[tuple[Segment, int]]] = {}
        self._damaged: set[marks.Mark] = set()
        self._broken: dict[str, str] = {}
        self._workers = ThreadPoolExecutor(_THREADS, thread_name_prefix="kvist-pages")
        self.refresh()

    # -- the index -----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Learn of segments and damage that other processes added or removed since."""
        with self._lock:
            known, broken = set(self._segments), set(self._broken)
        # Not under the lock: a far store takes its time, and readers need the lock. So only what was known before the
        # listing began can be missing from it for good.
        listed = {info.key: info for info in self._store.list(segments.PREFIX)}
        found = list(self._workers.map(self._read_index, [listed[key] for key in listed.keys() - known - broken]))
        damaged = marks.read(self._store)
        with self._lock:
            for key in known - listed.keys():
                self._drop(key)
            for key in broken - listed.keys():
                self._broken.pop(key, None)
            for each in found:
                if isinstance(each, Segment):
                    self._learn(each)
                elif each is not None:
                    self._broken[each[0]] = each[1]
            # One that could not be recorded is kept: a segment's bytes never get better.
            self._damaged = damaged | {mark for mark in self._damaged if mark[0] in self._segments}

    def _read_index(self, info: ObjectInfo) -> Segment | tuple[str, str] | None:
        """A segment's index, or its key and what is wrong, or ``None`` if a gc deleted it since the listing."""
        try:
            return segments.read_index(self._store, info.key, info.size, info.modified, self.algorithm)
        except IntegrityError as error:
            logger.warning("%s; its pages count as missing until they are put again", error)
            return info.key, str(error)
        except NotFound:
            return None

    def segments(self) -> list[Segment]:
        """The segments known since the last refresh, by key."""
        with self._lock:
            return sorted(self._segments.values(), key=lambda segment: segment.key)

    def broken_segments(self) -> dict[str, str]:
        """Key and reason of every segment whose index cannot be read."""
        with self._lock:
            return dict(self._broken)

    def damaged_places(self) -> list[tuple[str, str]]:
        """Segment key and digest of every page copy that was found damaged and still lies in its segment."""
        with self._lock:
            return sorted((key, self._name(raw)) for key, raw in self._damaged if key in self._segments)

    def size(self, digest: str) -> int | None:
        """Bytes of the page, or ``None`` if no undamaged copy is known."""
        place = self._place(self._raw(digest))
        return None if place is None else place[0].span(place[1])[1]

    def homes(self, digest: str) -> list[str]:
        """Keys of the segments that hold the page undamaged; a read uses the first."""
        raw = self._raw(digest)
        with self._lock:
            return sorted(place[0].key for place in self._good_places(raw))

    def names(self, segment: Segment) -> list[str]:
        """Digests of a segment's pages, in order."""
        return [self._name(raw) for raw in segment.digests]

    def _learn(self, segment: Segment) -> None:
        if segment.key in self._segments:
            return  # two refreshes at once
        self._segments[segment.key] = segment
        for entry, raw in enumerate(segment.digests):
            self._places.setdefault(raw, []).append((segment, entry))

    def _drop(self, key: str) -> None:
        segment = self._segments.pop(key, None)
        for raw in set(segment.digests if segment is not None else ()):
            left = [place for place in self._places[raw] if place[0] is not segment]
            if left:
                self._places[raw] = left
            else:
                del self._places[raw]

    def _place(self, raw: bytes, without: Container[str] = ()) -> tuple[Segment, int] | None:
        """Where the page lies undamaged: first of the candidates by segment key, so that all processes agree."""
        with self._lock:
            places = self._good_places(raw)
        if without:
            places = [place for place in places if place[0].key not in without]
        return min(places, key=lambda place: place[0].key) if len(places) > 1 else places[0] if places else None

    def _good_places(self, raw: bytes) -> list[tuple[Segment, int]]:
        places = self._places.get(raw, [])
        return [place for place in places if (place[0].key, raw) not in self._damaged] if self._damaged else places

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, pages: Sequence[Buffer], doomed: _Doomed | None = None) -> PutPages:
        """Store pages; durable when it returns.

        A page already stored is only hashed. A batch that fails leaves nothing, or whole segments of it, which serve
        the next put or go with the next gc.

        Args:
            pages: contiguous buffers, each at least one byte; not changed, and not kept after the return.
            doomed: says of a digest and the segments that hold it whether it counts as not stored.

        Raises:
            StoreFull: no space.
        """
        pages = [memoryview(page).cast("B") for page in pages]
        if not all(pages):
            raise InvalidInput("a page has at least one byte, got an empty buffer")
        self.refresh()
        digests: list[bytes] = []
        batch = Batch(self._store, self.algorithm)
        with batch:
            for window, hashed in self._hash_windows(pages):
                for page, raw in zip(window, hashed, strict=True):
                    if raw not in batch.seen and not self._is_stored(raw, doomed):
                        batch.add(raw, page)
                digests += hashed
            written = batch.commit()
        with self._lock:
            for segment in written:
                self._learn(segment)
        return PutPages([self._name(raw) for raw in digests], len(batch.seen), batch.bytes)

    def _is_stored(self, raw: bytes, doomed: _Doomed | None) -> bool:
        if self._place(raw) is None:
            return False
        return doomed is None or not doomed(self._name(raw), self.homes(self._name(raw)))

    def _hash_windows(self, pages: Sequence[Buffer]) -> Iterator[tuple[Sequence[Buffer], list[bytes]]]:
        """Windows of pages with their digests, in order; workers hash ahead of the consumer."""

        def hash_all(window: Sequence[Buffer]) -> list[bytes]:
            return [self._digest(page) for page in window]

        parts = list(windows(pages, [len(page) for page in pages], _WINDOW))
        return zip(parts, self._workers.map(hash_all, parts), strict=True)

    # -- reading -------------------------------------------------------------------------------------------------

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
        """Read pages into ready buffers and verify every one.

        Args:
            digests: what to read.
            outs: as many writable, contiguous byte views; each exactly as long as its page.

        Raises:
            MissingPage: no segment holds a page.
            DamagedPage: every copy of a page is damaged; the place is marked, so that the next put writes it anew.
            InvalidInput: a buffer has not the length of its page.

        After an error the buffers' content is undefined.
        """
        wanted = list(zip(map(self._raw, digests), outs, strict=True))
        failed = self._read(wanted)
        if failed:  # another process may have written, or repacked, these pages since the last refresh
            self.refresh()
            failed = self._read(failed)
        if failed:
            raise self.absent(self._name(failed[0][0]))

    def verify(
        self,
        digests: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
        *,
        without: Container[str] = (),
    ) -> list[str]:
        """Read and hash pages; the digests of those missing or damaged. Marks damaged places.

        Args:
            digests: what to verify.
            progress: called with pages done and pages in all.
            without: keys of segments that do not count.
        """
        found = [(digest, self.size(digest)) for digest in digests]
        bad = [digest for digest, size in found if size is None]
        known = [(digest, size) for digest, size in found if size is not None]
        done = len(bad)
        scratch = memoryview(bytearray(16 * _WINDOW))
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

    def _read(self, wanted: Sequence[_Wanted], without: Container[str] = ()) -> list[_Wanted]:
        """Read what can be read and return the rest: pages that are missing, or damaged in every copy."""
        failed: list[_Wanted] = []
        tasks: list[Future[list[_Wanted]]] = []
        try:
            for part in windows(wanted, [len(out) for _, out in wanted], _PART):  # workers read while we look up
                for key, reads in self._locate(part, without, failed).items():
                    reads.sort(key=lambda read: read[0])
                    near = windows(reads, [len(out) for _, (_, out) in reads], _WINDOW)
                    tasks += [self._workers.submit(self._read_window, key, window) for window in near]
        finally:
            wait(tasks)  # all of them, also when one raises: the buffers are the caller's again on return
        damaged = [read for task in tasks for read in task.result()]
        if damaged:  # try another copy; each round marks one more place of each, so this ends
            failed += self._read(damaged, without)
        return failed

    def _locate(
        self, wanted: Iterable[_Wanted], without: Container[str], failed: list[_Wanted]
    ) -> dict[str, list[tuple[int, _Wanted]]]:
        """Offsets by segment; what lies nowhere goes to ``failed``."""
        found: dict[str, list[tuple[int, _Wanted]]] = {}
        for raw, out in wanted:
            place = self._place(raw, without)
            if place is None:
                failed.append((raw, out))
                continue
            segment, entry = place
            start, size = segment.span(entry)
            if len(out) != size:
                raise InvalidInput(f"page {self._name(raw)} has {size} bytes, its buffer {len(out)}")
            found.setdefault(segment.key, []).append((start, (raw, out)))
        return found

    def _read_window(self, key: str, reads: Sequence[tuple[int, _Wanted]]) -> list[_Wanted]:
        """Read and verify neighbours in one segment; those that are damaged there."""
        first = {start: out for start, (_, out) in reversed(reads)}
        try:
            self._store.get_ranges(key, [Range(start, first[start]) for start in sorted(first)])
        except NotFound:  # a gc deleted it: look the pages up again
            with self._lock:
                self._drop(key)
            return [wanted for _, wanted in reads]
        except IntegrityError as error:
            if len(reads) > 1:  # find those that cannot be read
                return [wanted for read in reads for wanted in self._read_window(key, [read])]
            logger.error("%s", error)
            self._mark(key, reads[0][1][0])
            return [reads[0][1]]
        damaged = []
        for start, (raw, out) in reads:
            if out is not first[start]:
                out[:] = first[start]  # the page was asked for twice and read once
            if self._digest(out) != raw:
                self._mark(key, raw)
                damaged.append((raw, out))
        return damaged

    def _mark(self, key: str, raw: bytes) -> None:
        """Remember for all processes that this copy is damaged."""
        with self._lock:
            if (key, raw) in self._damaged:
                return
            self._damaged.add((key, raw))
        logger.error("page %s is damaged in %s", self._name(raw), key)
        try:
            marks.record(self._store, (key, raw))
        except StoreError as error:
            logger.warning("could not record the damage of page %s: %s", self._name(raw), error)

    def absent(self, digest: str) -> MissingPage | DamagedPage:
        """The error for a page of which no undamaged copy is known."""
        with self._lock:
            damaged = [place[0].key for place in self._places.get(self._raw(digest), ())]
        if damaged:
            return DamagedPage(
                f"page {digest} is damaged in {', '.join(damaged)}: its bytes do not hash to its digest",
                hint="snapshot the session again: the next put of the same content heals it",
            )
        return MissingPage(f"page {digest} is in no segment", hint="run `kvist fsck`")

    # -- upkeep --------------------------------------------------------------------------------------------------

    def rewrite(self, digests: Sequence[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Copy stored pages into new segments, so that the old ones can go. Verified; durable when it returns.

        Raises:
            DamagedPage, MissingPage: a page cannot be copied; nothing new is visible.
        """
        done = 0
        with Batch(self._store, self.algorithm) as batch:
            for window in windows(digests, [self.size(digest) or 0 for digest in digests], 16 * _WINDOW):
                outs = [memoryview(bytearray(self.size(digest) or 0)) for digest in window]
                self.get_into(window, outs)
                for digest, out in zip(window, outs, strict=True):
                    raw = self._raw(digest)
                    if raw not in batch.seen:
                        batch.add(raw, out)
                done += len(window)
                if progress is not None:
                    progress(done, len(digests))
            written = batch.commit()
        with self._lock:
            for segment in written:
                self._learn(segment)

    def close(self) -> None:
        """Stop the worker threads. Idempotent."""
        self._workers.shutdown()

    def _raw(self, digest: str) -> bytes:
        if parse_digest(digest).startswith(self.algorithm):
            return bytes.fromhex(digest_hex(digest))
        raise InvalidInput(f"this repository names pages by {self.algorithm}, got {digest}")

    def _name(self, raw: bytes) -> str:
        return format_digest(self.algorithm, raw)
