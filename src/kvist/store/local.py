"""A store in a directory: one file an object. Knows the directory's order; knows nothing of what objects mean.

    <root>/<key>         objects; a key's segments are directories
    <root>/.tmp/<name>   unfinished writes, each locked by its writer while that lives
    <directory>/.lock    held for the instant in which an object in that directory is replaced or deleted

Keys never start a segment with a dot, so the last two never meet one. Symbolic links are not objects. The lock lies
beside what it guards, so that a store opened at a directory within this one agrees with it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Literal

from kvist.errors import AlreadyExists, Conflict, NotFound, StoreError
from kvist.hashing import Buffer
from kvist.store.base import (
    Match,
    ObjectInfo,
    ObjectWriter,
    PutMode,
    Range,
    Store,
    check_key,
    check_prefix,
    is_key,
)
from kvist.store.posix import (
    Temporary,
    etag_of,
    exclusive,
    fill_ranges,
    make_directories,
    read_upto,
    readable,
    remove_stale,
    sync_directories,
    translated,
    write_all,
)
from kvist.store.staging import StagedWriter, StagingPool

_BATCH: Final = 128
"""Files that `put_many` holds open at once; the usual limit of a process is 1024."""


class LocalStore(Store):
    """Objects as files below ``root``, safe for any number of threads and processes on one machine.

    A new object appears by a hard link, which the kernel refuses if the name is taken: create-only needs no lock. An
    overwrite, a compare-and-swap and a delete change an existing name, and each holds a lock file while it does:
    were only compare-and-swap to take it, an overwrite could slip between its compare and its swap and be lost. The
    data is written, and made durable, before; the lock is held for microseconds.

    Nothing is created below ``root``, nor ``root`` itself, before the first write. Directories are never removed.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        """Open, without touching it, the store at ``root``.

        Args:
            root: a directory, or where one can be made; on one file system with everything below it.
            durable: whether a write waits for the disk. Without, a crash of the machine (not of the process) may lose
                or empty what was just written.
        """
        self._root = root.resolve()
        self._durable = durable
        self._temporaries = self._root / ".tmp"
        self._pool = StagingPool()

    @property
    def url(self) -> str:
        """``file:///absolute/path``, with ``?durable=0`` if it is not durable."""
        return self._root.as_uri() + ("" if self._durable else "?durable=0")

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        with self._reading(key) as fd:
            left = max(os.fstat(fd).st_size - start, 0)
            return read_upto(fd, start, left if size is None else min(size, left))

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`. Reads straight into the buffers, one system call for a run of adjacent ranges."""
        with self._reading(key) as fd:
            fill_ranges(fd, ranges, key)

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`. For big objects `writer` is faster."""
        path = self._path(key)
        with translated("write", path):
            self._check(key, path, mode)
            file = self._temporary()
            try:
                write_all(file.fd, data)
                etag = file.seal(durable=self._durable)
                self._publish(file, key, path, mode)
            finally:
                file.discard()
            self._sync({path.parent})
        return etag

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`. One barrier for each touched directory."""
        paths = [self._path(key) for key, _ in items]
        with translated("write to", self._root):
            for first in range(0, len(items), _BATCH):
                self._put_batch(items[first : first + _BATCH], paths[first : first + _BATCH], mode)
            # Also where an object was there already: its writer may not have reached its own barrier yet.
            self._sync({path.parent for path in paths})

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        path = self._path(key)

        def publish(file: Temporary) -> None:
            with translated("write", path):
                file.seal(durable=self._durable)
                self._publish(file, key, path, "create")
                self._sync({path.parent})

        with translated("create a file in", self._temporaries):
            return StagedWriter(key, self._temporary, self._pool, publish)

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        path = self._path(key)
        with translated("look up", path):
            found = _stat(path)
        return found and _info(key, found)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        return self._scan(check_prefix(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`. Durable as a put is."""
        paths = [self._path(key) for key in keys]
        touched = set()
        for path in paths:
            with translated("delete", path):
                if _stat(path) is None:
                    continue
                with _replacing(path):
                    path.unlink(missing_ok=True)
                touched.add(path.parent)
        with translated("delete from", self._root):
            self._sync(touched)

    def clean(self, older_than: float) -> int:
        """See `Store.clean`. A writer that still runs keeps its file, however old."""
        with translated("clean", self._temporaries):
            return remove_stale(self._temporaries, older_than)

    def close(self) -> None:
        """Free the staging buffers. The store can be used on."""
        self._pool.clear()

    def _temporary(self, flags: int = 0) -> Temporary:
        return Temporary(self._temporaries, flags, durable=self._durable)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        """The object's open file. Opened anew for each call: it costs microseconds, and a replaced object is seen."""
        path = self._path(key)
        with readable(path):
            fd = -1
            try:
                # NONBLOCK: opening a stray pipe must not hang.
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                if _stat(path) is not None:
                    raise
            try:
                if fd < 0 or not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise NotFound(f"{self.url} has no object {key}")
                yield fd
            finally:
                if fd >= 0:
                    os.close(fd)

    def _check(self, key: str, path: Path, mode: PutMode) -> None:
        """Refuse what ``mode`` forbids, as far as it can be seen now."""
        if mode == "overwrite":
            return
        found = _stat(path)
        if mode == "create" and found is not None:
            raise AlreadyExists(f"{self.url} already has {key}")
        etag = found and etag_of(found)
        if isinstance(mode, Match) and mode.etag != etag:
            raise Conflict(f"{key} changed: expected etag {mode.etag}, found {etag}")

    def _publish(self, file: Temporary, key: str, path: Path, mode: PutMode) -> None:
        """Give a sealed file its final name."""
        try:
            self._name(file, key, path, mode)
        except FileNotFoundError:
            make_directories(path.parent, durable=self._durable)
            self._name(file, key, path, mode)

    def _name(self, file: Temporary, key: str, path: Path, mode: PutMode) -> None:
        if mode == "create":
            try:
                path.hardlink_to(file.path)
            except FileExistsError:
                if path.is_dir():
                    raise StoreError(f"cannot write {path}: it is the directory of other keys") from None
                raise AlreadyExists(f"{self.url} already has {key}") from None
        else:
            with _replacing(path):
                self._check(key, path, mode)
                file.path.rename(path)

    def _put_batch(
        self, items: Sequence[tuple[str, Buffer]], paths: Sequence[Path], mode: Literal["overwrite", "create"]
    ) -> None:
        files: list[tuple[Temporary, str, Path]] = []
        try:
            for (key, data), path in zip(items, paths, strict=True):
                if mode == "create" and _stat(path) is not None:
                    continue
                files.append((self._temporary(), key, path))
                write_all(files[-1][0].fd, data)
                if self._durable:
                    files[-1][0].start_writing_back()
            for file, _, _ in files:
                file.seal(durable=self._durable)
            for file, key, path in files:
                try:
                    self._publish(file, key, path, mode)
                except AlreadyExists:
                    continue
        finally:
            for file, _, _ in files:
                file.discard()

    def _sync(self, directories: Iterable[Path]) -> None:
        if self._durable:
            sync_directories(directories)

    def _scan(self, prefix: str) -> Iterator[ObjectInfo]:
        directory = self._root / prefix
        found: list[tuple[str, os.DirEntry[str]]] = []
        with translated("list", directory):
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if is_key(entry.name):
                            # A directory sorts as its keys do: "a.b" comes before "a/b", and "a/b" before "a0".
                            if entry.is_dir(follow_symlinks=False):
                                found.append((entry.name + "/", entry))
                            elif entry.is_file(follow_symlinks=False):
                                found.append((entry.name, entry))
            except (FileNotFoundError, NotADirectoryError):
                return
        found.sort(key=lambda pair: pair[0])
        for name, entry in found:
            if name.endswith("/"):
                yield from self._scan(prefix + name)
            else:
                with translated("list", directory):
                    try:
                        info = _info(prefix + name, entry.stat(follow_symlinks=False))
                    except FileNotFoundError:
                        continue
                yield info


def _replacing(path: Path) -> AbstractContextManager[None]:
    return exclusive(path.parent / ".lock")


def _stat(path: Path) -> os.stat_result | None:
    """The object's file, if it is one."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, found.st_mtime_ns / 1e9, etag_of(found))
