"""A tier in a directory: a cache on a local disk for a store that is far, bounded in bytes, for many processes.

    <root>/<2 hex digits>/<algorithm>-<64 hex digits>    a page; its modification time is that of its last use
    <root>/.tmp/<name>                                   pages being written, each locked by its writer
    <root>/.bytes                                        bytes of all pages, and when they were last counted
    <root>/.lock                                         held while pages are named or deleted and .bytes is kept right

Readers take no lock. Writers fill a temporary file without it, and hold it for the moment in which they make room and
give the file its name; so the pages never exceed the bound, and what is being written comes on top of it. A process
that is killed leaves temporary files, which the next writer that opens the tier removes, and perhaps an empty count,
which the next writer makes anew. Nothing waits for the disk: what a crash of the machine tears is found by its digest.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Final, NamedTuple

from kvist.errors import IntegrityError
from kvist.hashing import Buffer
from kvist.ids import digest_hex
from kvist.repo.tier.base import Clock, PageTier
from kvist.store.base import Range
from kvist.store.posix import (
    Temporary,
    exclusive,
    fill_ranges,
    make_directories,
    readable,
    remove_stale,
    translated,
    write_all,
)

_SHARDS: Final = 256
_SAMPLE: Final = 4096
"""Pages looked at to find the ones that were used longest ago. A directory with no more is an exact LRU cache."""
_OLDEST: Final = 8
"""Of a sample that is not all, at most the oldest eighth goes before another is taken."""
_SLACK: Final = 64
"""Room is made for a 64th of the bound more than is needed, so that not every write has to."""
_OPEN: Final = 128
"""Temporary files held open at once."""
_COUNT_EVERY_S: Final = 3600.0
_COUNT: Final = struct.Struct("<Qd")


class _Used(NamedTuple):
    """A page's file, in the order of use."""

    ns: int
    path: str
    size: int


@dataclass(slots=True)
class _Count:
    """Bytes of all pages, and when they were last counted: seconds since the epoch."""

    bytes: int
    counted: float


class DirectoryTier(PageTier):
    """See the module."""

    def __init__(self, root: Path, *, max_bytes: int, clock: Clock = time.monotonic) -> None:
        """Open, without touching it, the tier at ``root``, on a local file system.

        Args:
            root: a directory of its own, or where one can be made.
            max_bytes: bound of the pages in it, the same for all that open it.
            clock: see `PageTier`.
        """
        super().__init__(clock=clock)
        self._root = root.resolve()
        self._max_bytes = max_bytes
        self._temporaries = self._root / ".tmp"
        self._is_tidy = False

    @property
    def url(self) -> str:
        """``file:///absolute/path?max_bytes=<bytes>``."""
        return f"{self._root.as_uri()}?max_bytes={self._max_bytes}"

    def _read(self, names: Sequence[str], outs: Sequence[memoryview]) -> list[bool]:
        return [self._read_page(self._path(name), out) for name, out in zip(names, outs, strict=True)]

    def _read_page(self, path: Path, out: memoryview) -> bool:
        try:
            with readable(path):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                except FileNotFoundError:
                    return False
                try:
                    if os.fstat(fd).st_size != len(out):
                        return False
                    fill_ranges(fd, [Range(0, out)], path.name)
                    _use(fd)
                finally:
                    os.close(fd)
        except IntegrityError:  # cut short since, or a bad block
            return False
        return True

    def _write(self, items: Sequence[tuple[str, Buffer]]) -> list[str]:
        with translated("write to", self._root):
            if not self._is_tidy:
                remove_stale(self._temporaries, 0.0)
                self._is_tidy = True
            written: list[str] = []
            for first in range(0, len(items), _OPEN):
                written += self._write_some(items[first : first + _OPEN])
            return written

    def _write_some(self, items: Sequence[tuple[str, Buffer]]) -> list[str]:
        """Write pages that fit the bound together with others, each to its own file, then name them all."""
        files: dict[str, tuple[Temporary, int]] = {}
        try:
            for name, data in items:
                size = memoryview(data).nbytes
                if size <= self._max_bytes and name not in files and not self._has(name, size):
                    files[name] = Temporary(self._temporaries), size
                    write_all(files[name][0].fd, data)
                    _use(files[name][0].fd)
            return self._admit(files) if files else []
        finally:
            for file, _ in files.values():
                file.discard()

    def _has(self, name: str, size: int) -> bool:
        """Whether the page is here; if so, it counts as used."""
        path = self._path(name)
        try:
            if path.stat().st_size != size:
                return False
            _use(path)
        except FileNotFoundError:
            return False
        return True

    def _forget(self, names: Sequence[str]) -> None:
        nothing_yet = suppress(FileNotFoundError)  # nobody has written, so there is no directory
        with translated("delete from", self._root), nothing_yet, self._counting_bytes() as count:
            count.bytes -= sum(_unlink(self._path(name)) for name in names)

    def _path(self, name: str) -> Path:
        digits = digest_hex(name)
        return self._root / digits[:2] / name.replace(":", "-")

    def _admit(self, files: dict[str, tuple[Temporary, int]]) -> list[str]:
        """Name written pages, once there is room for them; the names of those that nobody else was first with."""
        admitted = []
        with self._counting_bytes() as count:
            for name, (file, size) in files.items():
                if self._has(name, size):
                    continue
                path = self._path(name)
                count.bytes -= _unlink(path)  # one of another size
                if count.bytes + size > self._max_bytes:
                    self._make_room(count, size)
                _rename(file.path, path)
                count.bytes += size
                admitted.append(name)
        return admitted

    # -- under the lock ------------------------------------------------------------------------------------------

    @contextmanager
    def _counting_bytes(self) -> Iterator[_Count]:
        """Hold the lock, to name and delete pages and keep the count right. The record is empty meanwhile: whoever
        finds it so knows that somebody did not come to the end, and counts."""
        with exclusive(self._root / ".lock"):
            fd = os.open(self._root / ".bytes", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                count = self._count(os.read(fd, _COUNT.size + 1))
                os.ftruncate(fd, 0)
                yield count
                os.pwrite(fd, _COUNT.pack(max(count.bytes, 0), count.counted), 0)
            finally:
                os.close(fd)

    def _count(self, record: bytes) -> _Count:
        """As it was kept, or made anew."""
        now = time.time()
        if len(record) == _COUNT.size:
            kept = _Count(*_COUNT.unpack(record))
            if 0 <= now - kept.counted < _COUNT_EVERY_S:
                return kept
        return _Count(sum(page.size for number in range(_SHARDS) for page in self._shard(number)), now)

    def _make_room(self, count: _Count, size: int) -> None:
        """Delete pages used longest ago, until ``size`` more bytes fit, and somewhat more."""
        while True:
            pages, is_all = self._sample()
            pages.sort()
            if is_all:
                count.bytes = sum(page.size for page in pages)  # whatever somebody has deleted by hand
            for page in pages if is_all else pages[: len(pages) // _OLDEST]:
                free = self._max_bytes - count.bytes
                if free >= size and free + page.size > size + self._max_bytes // _SLACK:
                    return
                count.bytes -= _unlink(Path(page.path))
            if is_all:
                return

    def _sample(self) -> tuple[list[_Used], bool]:
        """Pages of as many shards, chosen at random, as have enough; whether that is all of them. Digests are spread
        evenly, so that a shard is as good a sample as any."""
        pages: list[_Used] = []
        shards = random.sample(range(_SHARDS), _SHARDS)
        while shards and len(pages) < _SAMPLE:
            pages += self._shard(shards.pop())
        return pages, not shards

    def _shard(self, number: int) -> Iterable[_Used]:
        with suppress(FileNotFoundError), os.scandir(self._root / f"{number:02x}") as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    if not S_ISREG(stat.st_mode):
                        continue
                    yield _Used(stat.st_mtime_ns, entry.path, stat.st_size)


def _use(file: int | Path) -> None:
    """Note that a page is used now, at the clock's full resolution; the kernel's own stamps are milliseconds apart."""
    now = time.time_ns()
    with suppress(OSError):  # another user's file, or a file system that is read only
        os.utime(file, ns=(now, now))


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except FileNotFoundError:
        make_directories(target.parent)
        source.rename(target)


def _unlink(path: Path) -> int:
    """Delete a page; its bytes, 0 if there is none."""
    try:
        size = path.lstat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
