"""Batches: new pages on their way into new segments.

Knows how segments are filled and made visible. Must not know which pages are already stored.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kvist.hashing import Buffer
from kvist.repo import segment as segments
from kvist.repo.segment import Segment
from kvist.store import ObjectWriter, Store

_T = TypeVar("_T")

SEGMENT_BYTES: Final = 1 << 30
"""A batch starts a new segment when the current one holds this many bytes of pages."""


class Batch:
    """New pages on their way into new segments; nothing is visible before `commit`.

    Attributes:
        seen: raw digests of its pages.
        bytes: of those pages.
    """

    def __init__(self, store: Store, algorithm: str) -> None:
        self._store, self._algorithm = store, algorithm
        self._open: list[_Open] = []
        self.seen: set[bytes] = set()
        self.bytes = 0

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._open:
            one.writer.abort()

    def add(self, raw: bytes, page: Buffer) -> None:
        """Append a page whose raw digest is ``raw``."""
        if not self._open or self._open[-1].bytes >= SEGMENT_BYTES:
            key = f"{segments.PREFIX}{uuid.uuid4().hex}"
            self._open.append(_Open(key, self._store.writer(key)))
        one = self._open[-1]
        one.writer.write(page)
        one.digests.append(raw)
        one.lengths.append(len(page))
        one.bytes += len(page)
        self.seen.add(raw)
        self.bytes += len(page)

    def commit(self) -> list[Segment]:
        """Make all pages visible, durably, one segment after the other; the indices of the new segments."""
        for one in self._open:  # before the first commit: here a full store still leaves nothing
            one.writer.write(segments.encode_index(self._algorithm, one.digests, one.lengths))
        for one in self._open:
            one.writer.commit()
        written = []
        for one in self._open:
            info = self._store.head(one.key)
            if info is not None:  # None: a gc took it in this instant, and the commit that needs it will notice
                written.append(segments.index_of(one.key, one.digests, one.lengths, info.modified))
        return written


@dataclass(slots=True)
class _Open:
    """A segment being written."""

    key: str
    writer: ObjectWriter
    digests: list[bytes] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bytes: int = 0


def windows(items: Sequence[_T], sizes: Sequence[int], most: int) -> Iterator[Sequence[_T]]:
    """Runs of items of at most ``most`` bytes together, at least one item each."""
    start = total = 0
    for end, size in enumerate(sizes):
        if total and total + size > most:
            yield items[start:end]
            start, total = end, 0
        total += size
    if start < len(items):
        yield items[start:]
