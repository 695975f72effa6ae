"""A store whose calls are told to the recorders of `kvist.telemetry`: how long each took, its bytes, its failure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from kvist.hashing import Buffer
from kvist.store.base import ObjectInfo, ObjectWriter, PutMode, Range
from kvist.store.wrap import WrapperStore
from kvist.telemetry import Operation, kind_of, recorders


@contextmanager
def _told(call: str) -> Iterator[Operation]:
    done, error, started = Operation(), None, time.perf_counter()
    try:
        yield done
    except BaseException as failure:
        error = kind_of(failure)
        raise
    finally:
        _tell(call, time.perf_counter() - started, done.nbytes, error)


def _tell(call: str, seconds: float, nbytes: int, error: str | None) -> None:
    for recorder in recorders():
        recorder.store_call(call, seconds, nbytes=nbytes, error=error)


def _listed(found: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
    """The same, timed without what the reader does between two of them."""
    seconds, error = 0.0, None
    try:
        while True:
            started = time.perf_counter()
            try:
                info = next(found, None)
            finally:
                seconds += time.perf_counter() - started
            if info is None:
                return
            yield info
    except GeneratorExit:  # it was left early, which is no failure
        raise
    except BaseException as failure:
        error = kind_of(failure)
        raise
    finally:
        _tell("list", seconds, 0, error)


class RecordedStore(WrapperStore):
    """Passes every call on, and tells of it by the name of the `Store` method.

    A writer is told of when it commits, its bytes with it; a listing when it was read to its end, or left.
    """

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        with _told("get") as done:
            data = self.store.get(key, start=start, size=size)
            done.add(nbytes=len(data))
            return data

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`."""
        with _told("get_ranges") as done:
            self.store.get_ranges(key, ranges)
            done.add(nbytes=sum(len(each.out) for each in ranges))

    def view(self, key: str, start: int, size: int) -> memoryview:
        """See `Store.view`."""
        with _told("view") as done:
            data = self.store.view(key, start, size)
            done.add(nbytes=size)
            return data

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        with _told("put") as done:
            etag = self.store.put(key, data, mode=mode)
            done.add(nbytes=memoryview(data).nbytes)
            return etag

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`. Tells of every byte offered, also of objects that were there already."""
        with _told("put_many") as done:
            self.store.put_many(items, mode=mode)
            done.add(nbytes=sum(memoryview(data).nbytes for _, data in items))

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        return _RecordedWriter(self.store.writer(key))

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        with _told("head"):
            return self.store.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        return _listed(self.store.list(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        with _told("delete"):
            self.store.delete(keys)

    def clean(self, older_than: float) -> int:
        """See `Store.clean`."""
        with _told("clean"):
            return self.store.clean(older_than)


class _RecordedWriter(ObjectWriter):
    """Counts its bytes, and tells of them at the end."""

    def __init__(self, writer: ObjectWriter) -> None:
        self._writer, self._nbytes = writer, 0

    def write(self, data: Buffer) -> None:
        self._writer.write(data)
        self._nbytes += memoryview(data).nbytes

    def commit(self) -> None:
        with _told("writer") as done:
            self._writer.commit()
            done.add(nbytes=self._nbytes)

    def abort(self) -> None:
        self._writer.abort()
