"""A store within a store: the keys below one prefix. Knows nothing of what lies beside it, and cannot reach it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from kvist.hashing import Buffer
from kvist.store.base import ObjectInfo, ObjectWriter, PutMode, Range, Store, check_key, check_prefix


class PrefixStore(Store):
    """The objects of ``store`` whose keys start with ``prefix`` and a slash, under their keys without those.

    In a directory or a bucket it is the store that `open_store` opens at its own `url`, one directory or prefix further
    down; in memory, or in an OCI image layout, nothing else can open it. It does not own ``store``: closing it leaves
    that open for the others who share it.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        """Open, without touching it.

        Args:
            store: where the objects lie.
            prefix: a key, such as ``tenants/a``; with it a key here must be a key there.

        Raises:
            InvalidName: ``prefix`` is not a key.
        """
        self._store = store
        self._prefix = check_key(prefix) + "/"

    @property
    def url(self) -> str:
        """The url of the store below with the prefix at the end of its path."""
        parts = urlsplit(self._store.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{self._prefix[:-1]}"))

    @property
    def window(self) -> int:
        """See `Store.window`."""
        return self._store.window

    @property
    def parallel(self) -> int:
        """See `Store.parallel`."""
        return self._store.parallel

    @property
    def has_views(self) -> bool:
        """See `Store.has_views`."""
        return self._store.has_views

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        return self._store.get(self._full(key), start=start, size=size)

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`."""
        self._store.get_ranges(self._full(key), ranges)

    def view(self, key: str, start: int, size: int) -> memoryview:
        """See `Store.view`."""
        return self._store.view(self._full(key), start, size)

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        return self._store.put(self._full(key), data, mode=mode)

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`."""
        self._store.put_many([(self._full(key), data) for key, data in items], mode=mode)

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        return self._store.writer(self._full(key))

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        found = self._store.head(self._full(key))
        return found and self._within(found)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        return map(self._within, self._store.list(self._prefix + check_prefix(prefix)))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        self._store.delete(self._full(key) for key in keys)

    def clean(self, older_than: float) -> int:
        """See `Store.clean`. Leftovers of dead writers have no keys yet: those of the whole store go."""
        return self._store.clean(older_than)

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _within(self, info: ObjectInfo) -> ObjectInfo:
        return ObjectInfo(info.key.removeprefix(self._prefix), info.size, info.modified, info.etag)
