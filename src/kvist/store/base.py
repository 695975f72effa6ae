"""The `Store` contract: keys to bytes. Knows nothing of KV, pages or snapshots.

A store is synchronous and may be used from several threads, and its data from several processes, at once.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from kvist.errors import AlreadyExists, IntegrityError, InvalidInput, InvalidName, NotFound
from kvist.hashing import Buffer

_KEY_SEGMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,254}")
_KEY_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store knows of one object without reading it.

    Attributes:
        key: its full key.
        size: bytes.
        modified: seconds since the epoch, by the clock of whoever stores it.
        etag: changes whenever the bytes may have changed; opaque. Some stores give equal bytes equal etags.
    """

    key: str
    size: int
    modified: float
    etag: str


@dataclass(frozen=True, slots=True)
class Match:
    """Put mode: replace the object only if its etag is still this one (compare-and-swap)."""

    etag: str


PutMode = Literal["overwrite", "create"] | Match
"""How a put treats an existing object: replace it, refuse (`AlreadyExists`), or compare-and-swap (`Conflict`)."""


@dataclass(frozen=True, slots=True)
class Range:
    """A read of ``len(out)`` bytes from offset ``start``, into ``out`` (writable, contiguous bytes)."""

    start: int
    out: memoryview


def is_key(key: str) -> bool:
    """Whether `check_key` accepts ``key``."""
    return len(key) <= _KEY_MAX and all(_KEY_SEGMENT.fullmatch(segment) for segment in key.split("/"))


def check_key(key: str) -> str:
    """Return ``key`` if it is one: segments of letters, digits and ``._+@-`` joined by ``/``, each starting with a
    letter or digit, so that a key below a directory never leaves it and temporary files never look like keys.
    A segment has at most 255 characters, a key at most 1000: what every file system and object store takes.

    Raises:
        InvalidName: otherwise.
    """
    if not is_key(key):
        raise InvalidName(
            f"{key!r:.200} is not a store key: expected at most {_KEY_MAX} characters, segments joined by '/', each "
            "of a letter or digit and at most 254 more letters, digits and '._+@-'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if it may limit a listing: ``""``, or a key and a ``/``.

    Raises:
        InvalidName: otherwise. A bare ``"a"`` is refused: it would match ``"ab"``, and a directory cannot list so.
    """
    if prefix:
        if not prefix.endswith("/"):
            raise InvalidName(f"{prefix!r:.200} is not a prefix: expected '' or a key and a '/'")
        check_key(prefix[:-1])
    return prefix


class ObjectWriter(ABC):
    """Writes one new object piece by piece. Invisible until `commit`; as a context manager, aborts if not committed.

    For one thread at a time. A failed `write` or `commit` discards the object. After `commit`, `abort` or a failure
    the writer is finished: `write` and `commit` then raise `InvalidInput`.
    """

    @abstractmethod
    def write(self, data: Buffer) -> None:
        """Append. Keeps no reference to ``data`` after returning."""

    @abstractmethod
    def commit(self) -> None:
        """Make the object visible, durably, under its key.

        Raises:
            AlreadyExists: the key was taken meanwhile; the object is discarded. A remote store can tell for certain
                only of small objects: of two large ones that are committed to one key in the same moment the later
                may win. Write large objects under keys that no other writer has.
        """

    @abstractmethod
    def abort(self) -> None:
        """Discard what was written. Idempotent; does nothing after `commit`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class _CollectingWriter(ObjectWriter):
    """The slow default: collect, then put."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._data: bytearray | None = bytearray()

    def write(self, data: Buffer) -> None:
        self._open().extend(data)

    def commit(self) -> None:
        data, self._data = self._open(), None
        self._store.put(self._key, data, mode="create")

    def abort(self) -> None:
        self._data = None

    def _open(self) -> bytearray:
        if self._data is None:
            raise finished(self._key)
        return self._data


def finished(key: str) -> InvalidInput:
    """The error for using a writer after its end."""
    return InvalidInput(f"the writer of {key} is finished: expected no write or commit after commit, abort or failure")


class Store(ABC):
    """Maps keys to immutable-by-default byte strings.

    Consistency that every store must give: a read or listing that starts after a write has returned sees that write,
    from any process. A put is atomic: other readers see the old object or the new one, never a mixture, also after a
    crash. A put, a batch of puts and a writer's commit are durable when they return (if the store is durable at all).

    Every method that takes a key, keys or a prefix raises `InvalidName` for a bad one, and `StoreError` where the
    storage below refuses. Offsets and sizes are never negative. A key must not be another key's directory (``a`` and
    ``a/b``, in one store, ever): a store on a file system refuses the second with `StoreError`, others need not.
    """

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, in the form that `open_store` takes. Two stores with one url are one store."""

    @property
    def window(self) -> int:
        """Bytes that one read should fetch: few enough to stay in a processor's cache, enough to pay for the call."""
        return 2 << 20

    @property
    def parallel(self) -> int:
        """Calls worth having in flight at once, from as many threads."""
        return min(8, os.cpu_count() or 1)

    @property
    def has_views(self) -> bool:
        """Whether bytes come in memory of their own, so that `view` spares a copy that `get_ranges` makes."""
        return False

    @abstractmethod
    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """The object's bytes from ``start``, at most ``size`` of them (default: to its end); none from past its end.

        Raises:
            NotFound: there is no such object.
            IntegrityError: the storage below cannot give back bytes that it holds; so for `get_ranges`.
        """

    @abstractmethod
    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """Store ``data`` and return its etag. Keeps no reference to ``data`` after returning.

        Raises:
            AlreadyExists: mode ``"create"`` and the key is taken.
            Conflict: mode `Match` and the object has another etag, or is gone.
            StoreFull: no space; what was there is unchanged.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """What is known of the object, or ``None`` if there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with ``prefix`` (``""`` or a path ending in ``/``), by ascending key.

        Unfinished writes are not listed. An object deleted while the listing runs may be left out.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete each object that exists; keys that do not are no error."""

    # -- slow defaults, fast overrides ---------------------------------------------------------------------------

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """Fill every range of one object; ``ranges`` ascend by start and do not overlap.

        Raises:
            NotFound: there is no such object.
            IntegrityError: the object ends inside a range; buffers are then undefined.
        """
        if not ranges and self.head(key) is None:
            raise NotFound(f"{self.url} has no object {key}")
        for r in ranges:
            data = self.get(key, start=r.start, size=len(r.out))
            if len(data) != len(r.out):
                raise IntegrityError(f"{key} ends early: wanted {len(r.out)} bytes at {r.start}, got {len(data)}")
            r.out[:] = data

    def view(self, key: str, start: int, size: int) -> memoryview:
        """``size`` bytes from ``start``, read only: for whoever looks at each part as soon as it is in its place.

        Raises as `get_ranges` with one range.
        """
        out = memoryview(bytearray(size))
        self.get_ranges(key, [Range(start, out)])
        return out

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """Put several objects with, if the store can, one durability barrier for all.

        Each put is atomic, the batch is not: after a crash any subset may be there. With ``"create"``, objects that
        exist are left alone and do not raise: for content-addressed keys they are the same bytes.
        """
        for key, data in items:
            try:
                self.put(key, data, mode=mode)
            except AlreadyExists:
                continue

    def writer(self, key: str) -> ObjectWriter:
        """A writer for one new object."""
        check_key(key)
        return _CollectingWriter(self, key)

    def clean(self, older_than: float) -> int:
        """Remove leftovers of writers that died, last touched more than ``older_than`` seconds ago; their bytes."""
        return 0

    def close(self) -> None:
        """Release file handles and connections. Idempotent."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Store) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)
