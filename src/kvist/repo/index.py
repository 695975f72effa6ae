"""The index of a repository's pages: which segments there are, where each page lies, and which copies are damaged.

Knows segments and marks. Must not read or write a page. Lives in memory and is rebuilt from the segments' own indices;
nothing on disk caches it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Container
from concurrent.futures import Executor
from typing import Final

from kvist.errors import IntegrityError, NotFound, StoreError
from kvist.ids import format_digest
from kvist.repo import marks
from kvist.repo import segment as segments
from kvist.repo.segment import Segment
from kvist.store import ObjectInfo, Store

Place = tuple[Segment, int]
"""A segment, and the number of a page in it."""

logger = logging.getLogger(__name__)


class PageIndex:
    """See the module. Pages are named by their raw digests. Thread-safe."""

    def __init__(self, store: Store, algorithm: str, workers: Executor) -> None:
        """Empty, until `refresh`; indices are read by ``workers``."""
        self._store: Final = store
        self._algorithm: Final = algorithm
        self._workers = workers
        self._lock = threading.RLock()
        self._refreshing = threading.Lock()
        self._begun = self._done = 0  # refreshes
        self._segments: dict[str, Segment] = {}
        self._places: dict[bytes, list[Place]] = {}
        self._damaged: set[marks.Mark] = set()
        self._unrecorded: set[marks.Mark] = set()
        self._broken: dict[str, str] = {}

    def refresh(self) -> None:
        """Learn of segments and damage that other processes added or removed since: two listings at once, and a read
        or two for each segment that is new, or was broken.

        One at a time: of two at once the slower would bring back what the other has seen deleted. Who waits shares
        one that began after it asked.
        """
        asked = self._begun
        with self._refreshing:
            if self._done > asked:
                return
            self._begun += 1
            self._update()
            self._done = self._begun

    def _update(self) -> None:
        with self._lock:
            known, broken, marked_before = set(self._segments), set(self._broken), set(self._damaged)
        # Not under the lock: a far store takes its time, and readers need the lock. So only what was known before the
        # listing began can be missing from it for good.
        marked = self._workers.submit(marks.read, self._store)
        listed = {info.key: info for info in self._store.list(segments.PREFIX)}
        found = list(self._workers.map(self._read, [listed[key] for key in listed.keys() - known]))
        damaged = marked.result()
        with self._lock:
            for key in known - listed.keys():
                self.drop(key)
            self._broken = {}
            for each in found:
                if isinstance(each, Segment):
                    self.learn(each)
                elif each is not None:
                    self._broken[each[0]] = each[1]
            for key in self._broken.keys() - broken:
                logger.warning("%s; its pages count as missing until they are put again", self._broken[key])
            since = self._damaged - marked_before
            self._unrecorded = {mark for mark in self._unrecorded if mark[0] in self._segments}
            self._damaged = damaged | since | self._unrecorded

    def _read(self, info: ObjectInfo) -> Segment | tuple[str, str] | None:
        """A segment's index, or its key and what is wrong, or ``None`` if a gc deleted it since the listing."""
        for last in (False, True):  # read wrong once, it may be the way here that is bad, and not the segment
            try:
                return segments.read_index(self._store, info.key, info.size, info.modified, self._algorithm)
            except IntegrityError as error:
                if last:
                    return info.key, str(error)
            except NotFound:
                return None
        raise AssertionError("unreachable")

    def learn(self, segment: Segment) -> None:
        """Take in a segment; one that is known already (two refreshes at once) changes nothing."""
        with self._lock:
            if segment.key in self._segments:
                return
            self._segments[segment.key] = segment
            for entry, raw in enumerate(segment.digests):
                self._places.setdefault(raw, []).append((segment, entry))

    def drop(self, key: str) -> None:
        """Forget a segment that is gone."""
        with self._lock:
            segment = self._segments.pop(key, None)
            for raw in set(segment.digests if segment is not None else ()):
                left = [place for place in self._places[raw] if place[0] is not segment]
                if left:
                    self._places[raw] = left
                else:
                    del self._places[raw]

    # -- asking --------------------------------------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        """The segments known, by key."""
        with self._lock:
            return sorted(self._segments.values(), key=lambda segment: segment.key)

    def broken(self) -> dict[str, str]:
        """Key and reason of every segment whose index cannot be read."""
        with self._lock:
            return dict(self._broken)

    def damaged(self) -> list[marks.Mark]:
        """Page copies that were found damaged and still lie in their segments."""
        with self._lock:
            return [mark for mark in self._damaged if mark[0] in self._segments]

    def place(self, raw: bytes, without: Container[str] = ()) -> Place | None:
        """Where the page lies undamaged: first of the candidates by segment key, so that all processes agree."""
        with self._lock:
            places = self._good(raw)
        if without:
            places = [place for place in places if place[0].key not in without]
        return min(places, key=lambda place: place[0].key) if len(places) > 1 else places[0] if places else None

    def homes(self, raw: bytes) -> list[str]:
        """Keys of the segments that hold the page undamaged."""
        with self._lock:
            return sorted(place[0].key for place in self._good(raw))

    def damaged_homes(self, raw: bytes) -> list[str]:
        """Keys of the segments that hold a copy of a page of which none is undamaged."""
        with self._lock:
            return [] if self._good(raw) else [place[0].key for place in self._places.get(raw, ())]

    def _good(self, raw: bytes) -> list[Place]:
        places = self._places.get(raw, [])
        return [place for place in places if (place[0].key, raw) not in self._damaged] if self._damaged else places

    # -- damage --------------------------------------------------------------------------------------------------

    def mark(self, key: str, raw: bytes) -> None:
        """Remember for all processes that this copy is damaged."""
        with self._lock:
            if (key, raw) in self._damaged:
                return
            self._damaged.add((key, raw))
        page = format_digest(self._algorithm, raw)
        logger.error("page %s is damaged in %s", page, key)
        try:
            marks.record(self._store, (key, raw))
        except StoreError as error:
            with self._lock:
                self._unrecorded.add((key, raw))
            logger.warning("could not record the damage of page %s: %s", page, error)
