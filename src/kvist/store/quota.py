"""Quota: a store that refuses to grow beyond a number of bytes, or of snapshots. Knows keys and sizes only.

What counts is every object below the store but those of other repositories in it (``tenants/…``). What is refused is
a new object; one that is there may be replaced, which is how records change and damaged ones heal. Deletes, and records
that make room or keep order while it is made (`_FREE`), always pass, and so does everything inside `making_room`.

**How exact.** Use is measured by a listing when an object is begun by `Store.writer` or a snapshot is put, and kept up
between. So one process never exceeds a quota. Several together may, by what the others had begun and not finished when
this one measured, and by the small objects that they put since; the next measurement sees all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Literal

from kvist.errors import InvalidInput, StoreFull
from kvist.hashing import Buffer
from kvist.store.base import ObjectWriter, PutMode, Store
from kvist.store.parallel import in_parallel
from kvist.store.wrap import WrapperStore

TENANTS: Final = "tenants/"
"""Below it lie other repositories, each with its own quota."""
_SNAPSHOTS: Final = "snapshots/"
_FREE: Final = ("damaged/", "leases/", "locks/", "pruned/", TENANTS)

_is_making_room: ContextVar[bool] = ContextVar("kvist_is_making_room", default=False)


@contextmanager
def making_room() -> Iterator[None]:
    """Inside, no write of this thread is refused by a quota; it counts all the same.

    For work that must go on at the limit: healing a page, repacking live pages so that the dead ones can go, repair.
    """
    token = _is_making_room.set(True)
    try:
        yield
    finally:
        _is_making_room.reset(token)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a repository may hold; ``None``: no limit.

    Attributes:
        max_bytes: of all its objects.
        max_snapshots: reachable or not.
    """

    max_bytes: int | None = None
    max_snapshots: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_snapshots"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value < 2**63):
                raise InvalidInput(f"quota: {name} must be a whole number from 0, got {value!r:.80}")

    def __bool__(self) -> bool:
        return self.max_bytes is not None or self.max_snapshots is not None


@dataclass(frozen=True, slots=True)
class Use:
    """What a repository holds.

    Attributes:
        bytes: of all its objects.
        snapshots: how many.
    """

    bytes: int = 0
    snapshots: int = 0


def measure(store: Store) -> Use:
    """What the repository in ``store`` holds now, by a listing."""
    size = snapshots = 0
    for info in store.list():
        if not info.key.startswith(TENANTS):
            size += info.size
            snapshots += info.key.startswith(_SNAPSHOTS)
    return Use(size, snapshots)


class QuotaStore(WrapperStore):
    """Refuses what would exceed ``quota`` with `StoreFull`, before it reaches the store below. Thread-safe."""

    def __init__(self, store: Store, quota: Quota) -> None:
        super().__init__(store)
        self.quota: Final = quota
        self._lock = threading.Lock()
        self._found: Use | None = None  # by the last measurement, less what was stored before it began
        self._stored = Use()  # by us since the start
        self._begun = 0  # bytes of writers that are neither committed nor given up
        self._is_stale = False  # it may be less by now

    def use(self) -> Use:
        """What is held now, by a new measurement."""
        with self._lock:
            before, self._is_stale = self._stored, False
        found = measure(self.store)
        with self._lock:  # what was stored while it listed counts twice until the next one, rather than not at all
            self._found = Use(found.bytes - before.bytes, found.snapshots - before.snapshots)
        return found

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        self._charge([(key, data)], replaces=mode != "create")
        with self._uncertain():
            return self.store.put(key, data, mode=mode)

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`."""
        self._charge(items, replaces=mode == "overwrite")
        with self._uncertain():
            self.store.put_many(items, mode=mode)

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        if _is_limited(key):
            self.use()
        return _ChargedWriter(self, key, self.store.writer(key))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        self._is_stale = True
        self.store.delete(keys)

    # -- counting ------------------------------------------------------------------------------------------------

    def begin(self, key: str, size: int) -> None:
        """Count ``size`` more bytes of an object that is being written.

        Raises:
            StoreFull: there is no room for them.
        """

        def count() -> None:
            self._begun += size

        if _is_limited(key):
            self._require(size, 0, count)
        else:
            with self._lock:
                count()

    def end(self, size: int, *, is_stored: bool) -> None:
        """Say what has become of an object of ``size`` bytes that was begun."""
        with self._lock:
            self._begun -= size
            if is_stored:
                self._stored = Use(self._stored.bytes + size, self._stored.snapshots)

    def _charge(self, items: Sequence[tuple[str, Buffer]], *, replaces: bool) -> None:
        """Count what objects that are about to be put add; those that are there too, if they are replaced.

        Raises:
            StoreFull: there is no room for the new ones.
        """
        size = snapshots = 0
        limited = []
        heads = in_parallel(self.store.head, [key for key, _ in items], self.store)
        for (key, data), old in zip(items, heads, strict=True):
            new = memoryview(data).nbytes
            if old is None:
                size += new
                limited += [new] if _is_limited(key) else []
                snapshots += key.startswith(_SNAPSHOTS)
            elif replaces:
                size += new - old.size

        def count() -> None:
            self._stored = Use(self._stored.bytes + size, self._stored.snapshots + snapshots)

        if limited:
            if snapshots:
                self.use()
            self._require(sum(limited), snapshots, count)
        else:
            with self._lock:
                count()

    def _require(self, size: int, snapshots: int, count: Callable[[], None]) -> None:
        """Call ``count`` if there is room; measure anew before saying that there is none."""
        if self._found is None:
            self.use()
        may_ask_again = True
        while True:
            with self._lock:
                refusal = self._refusal(size, snapshots)
                if refusal is None:
                    return count()
                if not (self._is_stale and may_ask_again):
                    raise refusal
            self.use()
            may_ask_again = False

    def _refusal(self, size: int, snapshots: int) -> StoreFull | None:
        assert self._found is not None
        quota, used = self.quota, self._found.bytes + self._stored.bytes + self._begun
        if quota.max_bytes is not None and used + size > quota.max_bytes:
            return self._full(f"{used} bytes are used, {size} more were asked for, the limit is {quota.max_bytes}")
        there = self._found.snapshots + self._stored.snapshots
        if quota.max_snapshots is not None and snapshots and there + snapshots > quota.max_snapshots:
            return self._full(
                f"it has {there} snapshots, {snapshots} more were asked for, the limit is {quota.max_snapshots}"
            )
        return None

    def _full(self, what: str) -> StoreFull:
        return StoreFull(f"the quota of {self.url} is reached: {what}", hint="delete branches, then run kvist gc")

    @contextmanager
    def _uncertain(self) -> Iterator[None]:
        """What fails was counted, and may not be there."""
        try:
            yield
        except BaseException:
            self._is_stale = True
            raise


class _ChargedWriter(ObjectWriter):
    """Counts as it is written; gives back what it counted if nothing comes of it."""

    def __init__(self, store: QuotaStore, key: str, writer: ObjectWriter) -> None:
        self._store, self._key, self._writer = store, key, writer
        self._size: int | None = 0  # counted so far; None: settled

    def write(self, data: Buffer) -> None:
        size = memoryview(data).nbytes
        try:
            if self._size is not None:
                self._store.begin(self._key, size)
                self._size += size
            self._writer.write(data)
        except BaseException:
            self.abort()
            raise

    def commit(self) -> None:
        try:
            self._writer.commit()
        except BaseException:
            self._settle(is_stored=False)
            raise
        self._settle(is_stored=True)

    def abort(self) -> None:
        self._writer.abort()
        self._settle(is_stored=False)

    def _settle(self, *, is_stored: bool) -> None:
        size, self._size = self._size, None
        if size is not None:
            self._store.end(size, is_stored=is_stored)


def _is_limited(key: str) -> bool:
    return not _is_making_room.get() and not key.startswith(_FREE)
