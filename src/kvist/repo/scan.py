"""The scan: reads every page copy of every segment and hashes it. Changes nothing, not even a mark.

Knows segments, and how far a scan came that was stopped. Must not know which pages anybody needs.

It reads the store itself, not through the page tiers: what is to be known is what the store has. A copy is called
damaged only when it was so twice: one wrong byte on the way is no damage.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvist.errors import IntegrityError, NotFound
from kvist.repo.batch import windows
from kvist.repo.repository import Repository
from kvist.repo.segment import Segment
from kvist.store import Range

_SAVE_S: Final = 5.0
"""Seconds after which a scan that goes on notes how far it came."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One copy of a page.

    Attributes:
        segment: key of the segment that holds it.
        entry: its number there.
        digest: the page's.
    """

    segment: str
    entry: int
    digest: str


@dataclass(slots=True)
class Cursor:
    """How far a scan came, so that the next goes on there. A file of this machine, not part of the repository.

    Attributes:
        path: of the file; ``None``: nothing is remembered.
        done: entries that were read, by segment, counted from the first.
        bad: segment and entry of those that were damaged.
    """

    path: Path | None = None
    done: dict[str, int] = field(default_factory=dict)
    bad: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def load(cls, path: Path) -> Cursor:
        """Read the file; one that is not there or unreadable is a scan that has not begun."""
        found = cls(path)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads(path.read_bytes())
            if document["version"] == 1:
                found.done = {str(key): int(count) for key, count in document["done"].items()}
                found.bad = {(str(key), int(entry)) for key, entry in document["bad"]}
        return found

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            document = {"version": 1, "done": self.done, "bad": sorted(self.bad)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
            new.write_text(json.dumps(document))
            new.replace(self.path)

    def reset(self) -> None:
        """The scan is through: the next begins anew, but for what was damaged."""
        self.done = {}
        if self.bad:
            self.save()
        elif self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Scanned:
    """Result of a scan.

    Attributes:
        damaged: copies whose bytes do not hash to their digest, or that cannot be read; also those that earlier
            scans, which this one goes on from, have found.
        read_bytes: bytes that this scan read.
        done_bytes: bytes of the pages read, by this scan and those before it.
        all_bytes: bytes of all pages.
    """

    damaged: tuple[Copy, ...]
    read_bytes: int
    done_bytes: int
    all_bytes: int

    @property
    def is_complete(self) -> bool:
        """Whether every copy was read."""
        return self.done_bytes >= self.all_bytes


def mark_known(repo: Repository, cursor: Cursor) -> None:
    """Read again what scans have found damaged, and mark what still is: now all know of it."""
    names = {segment.key: repo.pages.names(segment) for segment in repo.pages.segments()}
    known = [names[key][entry] for key, entry in sorted(cursor.bad) if entry < len(names.get(key, ()))]
    repo.pages.verify(known)


def scan(
    repo: Repository,
    *,
    cursor: Cursor | None = None,
    max_duration: float | None = None,
    progress: Progress | None = None,
) -> Scanned:
    """Read and hash every page copy that the repository's index knows, segment by segment.

    Args:
        repo: whose; refresh its pages first.
        cursor: where to go on; what is read is noted there. A scan that comes to its end resets it.
        max_duration: seconds after which no further page is begun; ``None``: go on to the end.
        progress: told now and then.
    """
    return _Scan(repo, cursor if cursor is not None else Cursor(), max_duration, progress).run()


class _Scan:
    def __init__(self, repo: Repository, cursor: Cursor, max_duration: float | None, progress: Progress | None) -> None:
        self.repo, self.cursor, self.progress = repo, cursor, progress
        self.digest = repo.config.digest
        self.end = time.monotonic() + max_duration if max_duration is not None else None
        self.segments = {segment.key: segment for segment in repo.pages.segments()}
        self.all_bytes = sum(segment.data_bytes for segment in self.segments.values())
        self.read_bytes = self.done_bytes = 0
        self.saved = time.monotonic()

    def run(self) -> Scanned:
        self._trim()
        self.done_bytes = sum(self.segments[key].offsets[count] for key, count in self.cursor.done.items())
        with ThreadPoolExecutor(self.repo.store.parallel, thread_name_prefix="kvist-scan") as workers:
            self._read_all(workers)
        damaged = tuple(
            sorted(Copy(key, entry, self._name(self.segments[key], entry)) for key, entry in self.cursor.bad)
        )
        found = Scanned(damaged, self.read_bytes, self.done_bytes, self.all_bytes)
        if found.is_complete:
            self.cursor.reset()
        else:
            self.cursor.save()
        return found

    def _trim(self) -> None:
        """Forget segments that are gone, and read again what was damaged: it may have been put back."""
        done = self.cursor.done
        self.cursor.done = {
            key: min(count, len(self.segments[key].digests)) for key, count in done.items() if key in self.segments
        }
        again = [
            (key, entry)
            for key, entry in sorted(self.cursor.bad)
            if key in self.segments and entry < len(self.segments[key].digests)
        ]
        self.cursor.bad = {(key, entry) for key, entry in again if not self._is_good(self.segments[key], entry)}

    def _read_all(self, workers: ThreadPoolExecutor) -> None:
        """Windows in order, some of them in flight; the cursor moves only over what is done."""
        waiting: deque[tuple[Segment, range, Future[list[int]]]] = deque()
        for segment, entries in self._windows():
            waiting.append((segment, entries, workers.submit(self._check, segment, entries)))
            if len(waiting) > 2 * self.repo.store.parallel:
                self._take(*waiting.popleft())
            if self.end is not None and time.monotonic() >= self.end:
                break
        while waiting:
            self._take(*waiting.popleft())

    def _windows(self) -> Iterator[tuple[Segment, range]]:
        for key in sorted(self.segments):
            segment = self.segments[key]
            entries = range(self.cursor.done.get(key, 0), len(segment.digests))
            sizes = [segment.span(entry)[1] for entry in entries]
            for window in windows(entries, sizes, self.repo.store.window):
                yield segment, range(window[0], window[-1] + 1)

    def _take(self, segment: Segment, entries: range, found: Future[list[int]]) -> None:
        self.cursor.bad.update((segment.key, entry) for entry in found.result())
        self.cursor.done[segment.key] = entries.stop
        size = segment.offsets[entries.stop] - segment.offsets[entries.start]
        self.read_bytes += size
        self.done_bytes += size
        if self.progress is not None:
            self.progress(self.done_bytes, self.all_bytes)
        if time.monotonic() - self.saved > _SAVE_S:
            self.cursor.save()
            self.saved = time.monotonic()

    def _check(self, segment: Segment, entries: Sequence[int]) -> list[int]:
        """The damaged ones of neighbouring entries. A segment that a gc has deleted has none."""
        first = segment.offsets[entries[0]]
        data = memoryview(bytearray(segment.offsets[entries[-1] + 1] - first))
        try:
            self.repo.store.get_ranges(segment.key, [Range(first, data)])
        except NotFound:
            return []
        except IntegrityError:  # which of them cannot be read?
            return [entry for entry in entries if not self._is_good(segment, entry)]
        suspects = []
        for entry in entries:
            start, size = segment.span(entry)
            page = data[start - first : start - first + size]
            if self.digest(page) != segment.digests[entry]:
                suspects.append(entry)
        return [entry for entry in suspects if not self._is_good(segment, entry)]

    def _is_good(self, segment: Segment, entry: int) -> bool:
        start, size = segment.span(entry)
        try:
            data = self.repo.store.get(segment.key, start=start, size=size)
        except NotFound:
            return True
        except IntegrityError:
            return False
        return self.digest(data) == segment.digests[entry]

    def _name(self, segment: Segment, entry: int) -> str:
        return self.repo.pages.names(segment)[entry]
