"""The writer of a remote store: small objects go in one put, larger ones in parts while they are still written.

Knows buffers and one thread; knows no protocol: how parts travel is what it is given.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from kvist.errors import AlreadyExists, StoreError
from kvist.hashing import Buffer
from kvist.store.base import ObjectWriter, finished

PART: Final = 8 << 20
"""Bytes of one part: S3 takes from 5 MiB, and 10,000 of them an object."""
PARTS_IN_FLIGHT: Final = 8
"""Parts of one object that travel at once: with those it fills and holds ready, a writer has 80 MiB at most."""

SendParts = Callable[[Iterator[Buffer]], None]
"""Stores one object from its parts; returns once it is there. An error of the iterator ends it, and discards them."""


class _AbortedError(Exception):
    """What the sender's iterator raises when the writer is aborted."""


class PartsWriter(ObjectWriter):
    """Collects parts of `PART` bytes; from the second on a thread sends them."""

    def __init__(self, key: str, put: Callable[[Buffer], object], exists: Callable[[], bool], send: SendParts) -> None:
        """A writer for ``key``.

        Args:
            key: its name in errors.
            put: stores an object of one part, and raises `AlreadyExists` if the key is taken.
            exists: whether the key is taken; asked before the last part of several is sent.
            send: stores an object of several parts, whatever is there.
        """
        self._key, self._put, self._exists = key, put, exists
        self._send = send
        self._part: bytearray | None = bytearray(PART)
        self._filled = 0
        self._sending: _Sending | None = None

    def write(self, data: Buffer) -> None:
        """See `ObjectWriter.write`."""
        part, view = self._open(), memoryview(data).cast("B")
        while view:
            taken = view[: PART - self._filled]
            part[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            view = view[len(taken) :]
            if self._filled == PART and view:
                part = self._ship(part)

    def commit(self) -> None:
        """See `ObjectWriter.commit`."""
        last = memoryview(self._open())[: self._filled]
        sending, self._sending, self._part = self._sending, None, None
        if sending is None:
            self._put(last)
            return
        try:
            if self._exists():
                raise AlreadyExists(f"{self._key} was taken meanwhile")
            sending.add(last)
        except BaseException:
            sending.abort()
            raise
        sending.finish()

    def abort(self) -> None:
        """See `ObjectWriter.abort`."""
        sending, self._sending, self._part = self._sending, None, None
        if sending is not None:
            sending.abort()

    def _open(self) -> bytearray:
        if self._part is None:
            raise finished(self._key)
        return self._part

    def _ship(self, part: bytearray) -> bytearray:
        """Let a full part travel; returns the next, empty."""
        if self._sending is None:
            self._sending = _Sending(self._send)
        try:
            self._sending.add(part)
        except BaseException:
            self.abort()
            raise
        self._part, self._filled = bytearray(PART), 0
        return self._part


class _Sending:
    """One object on its way: parts go in at one end, a thread takes them out at the other."""

    def __init__(self, send: SendParts) -> None:
        self._changed = threading.Condition()
        self._ready: deque[Buffer] = deque()
        self._is_complete = self._is_aborted = self._has_ended = False
        self._error: BaseException | None = None
        # A daemon: a writer that is dropped without commit or abort must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(send,), name="kvist-upload", daemon=True)
        self._thread.start()

    def add(self, part: Buffer) -> None:
        """Hand over a part, once the one before was taken. Raises what ended the thread, if it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._ready or self._has_ended)
            if self._error is not None:
                raise self._error
            self._ready.append(part)
            self._changed.notify_all()

    def finish(self) -> None:
        """No part comes any more; wait until the object is there. Raises what ended the thread."""
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Discard the parts, and wait until that is done."""
        with self._changed:
            self._is_aborted = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self, send: SendParts) -> None:
        try:
            send(self._parts())
        except BaseException as error:
            self._error = error if not self._is_aborted else StoreError("the writer was aborted")
        finally:
            with self._changed:
                self._has_ended = True
                self._ready.clear()
                self._changed.notify_all()

    def _parts(self) -> Iterator[Buffer]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._ready) or self._is_complete or self._is_aborted)
                if self._is_aborted:
                    raise _AbortedError
                if not self._ready:
                    return
                part = self._ready.popleft()
                self._changed.notify_all()
            yield part
