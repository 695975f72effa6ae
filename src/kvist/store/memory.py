"""A store in this process's memory: for tests and for repositories that need not outlive it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Final

from kvist.errors import AlreadyExists, Conflict, NotFound
from kvist.hashing import Buffer
from kvist.store.base import Match, ObjectInfo, PutMode, Store, check_key, check_prefix

_numbers: Final = itertools.count(1)


class MemoryStore(Store):
    """Objects in a dict. Nothing is durable; two instances never share data."""

    def __init__(self) -> None:
        self._url = f"memory:{next(_numbers)}"
        self._objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """``memory:<number>``; opening ``memory:`` always makes a new one."""
        return self._url

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        found = self._objects.get(check_key(key))
        if found is None:
            raise NotFound(f"{self.url} has no object {key}")
        return found[0][start : None if size is None else start + size]

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        check_key(key)
        body = bytes(data)
        with self._lock:
            found = self._objects.get(key)
            if mode == "create" and found is not None:
                raise AlreadyExists(f"{self.url} already has {key}")
            if isinstance(mode, Match) and (found is None or found[1].etag != mode.etag):
                raise Conflict(f"{key} changed: expected etag {mode.etag}, found {found and found[1].etag}")
            info = ObjectInfo(key, len(body), time.time(), str(next(_numbers)))
            self._objects[key] = body, info
            return info.etag

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        found = self._objects.get(check_key(key))
        return found and found[1]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        check_prefix(prefix)
        with self._lock:
            infos = [info for key, (_, info) in self._objects.items() if key.startswith(prefix)]
        return iter(sorted(infos, key=lambda info: info.key))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        checked = [check_key(key) for key in keys]
        with self._lock:
            for key in checked:
                self._objects.pop(key, None)
