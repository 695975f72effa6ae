"""Stores around stores: read only, metered, delayed. Each changes one thing and passes on the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from kvist.errors import StoreError
from kvist.hashing import Buffer
from kvist.store.base import ObjectInfo, ObjectWriter, PutMode, Range, Store


class WrapperStore(Store):
    """Passes every call to ``store``, fast paths too: the base of the others. Closing it closes ``store``.

    One that changes what `get_ranges` reads does so to `view` too, or says that it has no views.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        """The url of the store below: it is the same data."""
        return self.store.url

    @property
    def window(self) -> int:
        """See `Store.window`."""
        return self.store.window

    @property
    def parallel(self) -> int:
        """See `Store.parallel`."""
        return self.store.parallel

    @property
    def has_views(self) -> bool:
        """See `Store.has_views`."""
        return self.store.has_views

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        return self.store.get(key, start=start, size=size)

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`."""
        self.store.get_ranges(key, ranges)

    def view(self, key: str, start: int, size: int) -> memoryview:
        """See `Store.view`."""
        return self.store.view(key, start, size)

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        return self.store.put(key, data, mode=mode)

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`."""
        self.store.put_many(items, mode=mode)

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        return self.store.writer(key)

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        return self.store.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        return self.store.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        self.store.delete(keys)

    def clean(self, older_than: float) -> int:
        """See `Store.clean`."""
        return self.store.clean(older_than)

    def close(self) -> None:
        """See `Store.close`."""
        self.store.close()


class ReadOnlyStore(WrapperStore):
    """Refuses every write with `StoreError`, before it reaches the store below."""

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """Refuse."""
        self._refuse("put", key)

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """Refuse."""
        self._refuse("put", f"{len(items)} objects")

    def writer(self, key: str) -> ObjectWriter:
        """Refuse."""
        self._refuse("write", key)

    def delete(self, keys: Iterable[str]) -> None:
        """Refuse."""
        self._refuse("delete", "objects")

    def clean(self, older_than: float) -> int:
        """Refuse."""
        self._refuse("clean", "leftovers")

    def _refuse(self, act: str, what: str) -> NoReturn:
        raise StoreError(f"cannot {act} {what}: {self.url} was opened read only")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one kind of operation did.

    Attributes:
        calls: how often it was called, failures included.
        objects: objects it was asked for; for ``list``, 0.
        bytes: payload bytes that it moved, failures excluded.
    """

    calls: int = 0
    objects: int = 0
    bytes: int = 0


READS = frozenset({"get", "get_ranges", "view"})
WRITES = frozenset({"put", "put_many", "writer"})


class MeteredStore(WrapperStore):
    """Counts operations, objects and bytes by kind: the name of the `Store` method. Safe from several threads.

    A writer counts as a call when it is made, its bytes as they are written.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._lock = threading.Lock()
        self._traffic: dict[str, Traffic] = {}

    def traffic(self) -> dict[str, Traffic]:
        """A copy of the counts so far; kinds that did not occur are absent."""
        with self._lock:
            return dict(self._traffic)

    @property
    def bytes_read(self) -> int:
        """Payload bytes that came out of the store."""
        return sum(traffic.bytes for kind, traffic in self.traffic().items() if kind in READS)

    @property
    def bytes_written(self) -> int:
        """Payload bytes that went into the store."""
        return sum(traffic.bytes for kind, traffic in self.traffic().items() if kind in WRITES)

    def reset(self) -> None:
        """Forget the counts."""
        with self._lock:
            self._traffic.clear()

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        self._count("get", calls=1, objects=1)
        data = self.store.get(key, start=start, size=size)
        self._count("get", size=len(data))
        return data

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`."""
        self._count("get_ranges", calls=1, objects=1)
        self.store.get_ranges(key, ranges)
        self._count("get_ranges", size=sum(len(r.out) for r in ranges))

    def view(self, key: str, start: int, size: int) -> memoryview:
        """See `Store.view`."""
        self._count("view", calls=1, objects=1)
        data = self.store.view(key, start, size)
        self._count("view", size=size)
        return data

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        self._count("put", calls=1, objects=1)
        etag = self.store.put(key, data, mode=mode)
        self._count("put", size=_size(data))
        return etag

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`. Counts every byte offered, also of objects that were there already."""
        self._count("put_many", calls=1, objects=len(items))
        self.store.put_many(items, mode=mode)
        self._count("put_many", size=sum(_size(data) for _, data in items))

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        self._count("writer", calls=1, objects=1)
        return _ObservedWriter(self.store.writer(key), lambda size: self._count("writer", size=size))

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        self._count("head", calls=1, objects=1)
        return self.store.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        self._count("list", calls=1)
        return self.store.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        wanted = [*keys]
        self._count("delete", calls=1, objects=len(wanted))
        self.store.delete(wanted)

    def _count(self, kind: str, *, calls: int = 0, objects: int = 0, size: int = 0) -> None:
        with self._lock:
            old = self._traffic.get(kind, Traffic())
            self._traffic[kind] = Traffic(old.calls + calls, old.objects + objects, old.bytes + size)


class DelayedStore(WrapperStore):
    """Makes every call as slow as a far store would: ``latency`` once a call, and its bytes at ``bandwidth``."""

    def __init__(
        self,
        store: Store,
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """A slow ``store``.

        Args:
            store: where the calls go.
            latency: seconds a call.
            bandwidth: bytes a second, for each call by itself; ``None`` is boundless.
            sleep: called with seconds, once or more a call; a test passes its own clock's.
        """
        super().__init__(store)
        self._latency, self._bandwidth, self._sleep = latency, bandwidth, sleep

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        self._sleep(self._latency)
        data = self.store.get(key, start=start, size=size)
        self._transfer(len(data))
        return data

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`."""
        self._sleep(self._latency)
        self.store.get_ranges(key, ranges)
        self._transfer(sum(len(r.out) for r in ranges))

    def view(self, key: str, start: int, size: int) -> memoryview:
        """See `Store.view`."""
        self._sleep(self._latency)
        data = self.store.view(key, start, size)
        self._transfer(size)
        return data

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        self._sleep(self._latency)
        self._transfer(_size(data))
        return self.store.put(key, data, mode=mode)

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`."""
        self._sleep(self._latency)
        self._transfer(sum(_size(data) for _, data in items))
        self.store.put_many(items, mode=mode)

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`. The latency comes once, here."""
        self._sleep(self._latency)
        return _ObservedWriter(self.store.writer(key), self._transfer)

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        self._sleep(self._latency)
        return self.store.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        self._sleep(self._latency)
        return self.store.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        self._sleep(self._latency)
        self.store.delete(keys)

    def _transfer(self, size: int) -> None:
        if self._bandwidth is not None and size:
            self._sleep(size / self._bandwidth)


class _ObservedWriter(ObjectWriter):
    """Tells ``observe`` how many bytes each write added."""

    def __init__(self, writer: ObjectWriter, observe: Callable[[int], None]) -> None:
        self._writer, self._observe = writer, observe

    def write(self, data: Buffer) -> None:
        self._writer.write(data)
        self._observe(_size(data))

    def commit(self) -> None:
        self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()


def _size(data: Buffer) -> int:
    return memoryview(data).nbytes
