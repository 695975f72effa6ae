"""Streams one big object to a file at the disk's own speed. Knows buffers and files; knows no keys' meaning.

Bytes are copied into page-aligned staging buffers, which one thread writes with O_DIRECT while the caller fills the
next: the page cache, which is fast for a second and then throttles everyone to a tenth, is left out.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from kvist.hashing import Buffer
from kvist.store.base import ObjectWriter, finished
from kvist.store.posix import Temporary, translated

BUFFER_SIZE: Final = 8 << 20
_BUFFERS: Final = 3
"""Staging buffers a writer: one on its way to the disk, one queued so that the disk never waits for us, one filling."""

_BLOCK: Final = 4096
"""What O_DIRECT may ask offsets and lengths to be multiples of; where it asks more, writing falls back."""


class StagingPool:
    """Staging buffers for a store's writers. Kept for the next writer: touching fresh pages is slower than the disk."""

    def __init__(self, keep: int = 2 * _BUFFERS) -> None:
        self._keep = keep
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    def take(self) -> memoryview:
        """A page-aligned buffer of `BUFFER_SIZE` bytes, of any content."""
        with self._lock:
            if self._free:
                return self._free.pop()
        buffer = mmap.mmap(-1, BUFFER_SIZE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel built without huge pages: only slower
                buffer.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(buffer)

    def give(self, buffer: memoryview) -> None:
        """Return a buffer that nothing writes or reads any more."""
        with self._lock:
            if len(self._free) < self._keep:
                self._free.append(buffer)

    def clear(self) -> None:
        """Free what is not taken."""
        with self._lock:
            self._free.clear()


class StagedWriter(ObjectWriter):
    """An `ObjectWriter` over a temporary file.

    Memory: at most three staging buffers of 8 MiB, fewer while the object is smaller. The thread starts with the
    second buffer, so a small object costs one write.
    """

    def __init__(
        self,
        key: str,
        temporary: Callable[[int], Temporary],
        pool: StagingPool,
        publish: Callable[[Temporary], None],
    ) -> None:
        """Start a file: ``temporary`` makes one with more flags, ``publish`` makes it durable and names it."""
        self._key, self._pool, self._publish = key, pool, publish
        self._file: Temporary | None = _open_direct(temporary)
        self._buffer: memoryview | None = None
        self._fill = 0
        self._submitted = 0
        self._in_flight: deque[tuple[Future[None], memoryview]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def write(self, data: Buffer) -> None:
        """See `ObjectWriter.write`."""
        file = self._opened()
        view = memoryview(data).cast("B")
        try:
            while view:
                if self._buffer is None:
                    self._buffer = self._next_buffer(file)
                size = min(len(view), BUFFER_SIZE - self._fill)
                self._buffer[self._fill : self._fill + size] = view[:size]
                self._fill += size
                view = view[size:]
                if self._fill == BUFFER_SIZE:
                    self._submit(file, self._buffer)
        except BaseException:
            self.abort()
            raise

    def commit(self) -> None:
        """See `ObjectWriter.commit`."""
        file = self._opened()
        try:
            while self._in_flight:
                self._pool.give(self._reap(file))
            if self._buffer is not None:
                self._write_tail(file, self._buffer)
            self._publish(file)
        finally:
            self.abort()

    def abort(self) -> None:
        """See `ObjectWriter.abort`."""
        file, self._file = self._file, None
        if file is None:
            return
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        # Only now does nothing read the buffers.
        for _, buffer in self._in_flight:
            self._pool.give(buffer)
        self._in_flight.clear()
        if self._buffer is not None:
            self._pool.give(self._buffer)
            self._buffer = None
        with translated("remove", file.path):
            file.discard()

    def _opened(self) -> Temporary:
        if self._file is None:
            raise finished(self._key)
        return self._file

    def _next_buffer(self, file: Temporary) -> memoryview:
        may_take = len(self._in_flight) < _BUFFERS and not (self._in_flight and self._in_flight[0][0].done())
        return self._pool.take() if may_take else self._reap(file)

    def _reap(self, file: Temporary) -> memoryview:
        """Wait for the oldest write and hand over its buffer."""
        future, buffer = self._in_flight[0]
        with translated("write", file.path):
            future.result()
        self._in_flight.popleft()
        return buffer

    def _submit(self, file: Temporary, buffer: memoryview) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvist-writer")
        future = self._thread.submit(_write_at, file.fd, buffer, self._submitted)
        self._in_flight.append((future, buffer))
        self._submitted += BUFFER_SIZE
        self._buffer, self._fill = None, 0

    def _write_tail(self, file: Temporary, buffer: memoryview) -> None:
        """Write the last, partly filled buffer: padded to a whole block, then cut to size."""
        padded = -(-self._fill // _BLOCK) * _BLOCK
        buffer[self._fill : padded] = bytes(padded - self._fill)
        with translated("write", file.path):
            _write_at(file.fd, buffer[:padded], self._submitted)
            os.ftruncate(file.fd, self._submitted + self._fill)


def _open_direct(temporary: Callable[[int], Temporary]) -> Temporary:
    try:
        return temporary(os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return temporary(0)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write every byte at ``offset``; through the page cache from where the file system refuses O_DIRECT."""
    while data:
        try:
            written = os.pwrite(fd, data, offset)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        data = data[written:]
        offset += written
