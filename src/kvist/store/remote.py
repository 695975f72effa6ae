"""A store in a bucket (S3, Google Cloud Storage, Azure) or on a web server. Here and in `client` obstore is used."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock
from typing import Any, Final, Literal, TypeVar
from urllib.parse import unquote

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PreconditionError,
)

from kvist.errors import AlreadyExists, Conflict, IntegrityError, InvalidInput, NotFound, StoreError
from kvist.hashing import Buffer
from kvist.store.base import Match, ObjectInfo, ObjectWriter, PutMode, Range, Store, check_key, check_prefix, is_key
from kvist.store.client import FAILURES, MISSING, Client, open_client
from kvist.store.location import Location
from kvist.store.ranges import Run, runs
from kvist.store.refusal import Refusal
from kvist.store.upload import PART, PARTS_IN_FLIGHT, PartsWriter

_WINDOW: Final = 8 << 20
_PARALLEL: Final = 16
_BULK: Final = 1000
_MARK: Final = "writer"
"""Name of the metadata that tells a conditional put's own object from another writer's."""
_SMALL: Final = 1 << 20
"""Bytes of a body that any line sends within the idle limit."""
_PROCESS: Final = os.getpid()

_T = TypeVar("_T")


class RemoteStore(Store):
    """Objects behind HTTP, safe for any number of threads, processes and machines.

    Create-only and compare-and-swap are the server's own conditional writes; a server that ignores the conditions
    cannot keep refs. A conditional put carries a mark: if its answer was lost and a retry is refused, the object's
    mark tells whether the refused object is our own. An object written in several parts is the exception: no API that
    we have takes a condition there, so the key is looked up just before the last part, and of two writers that finish
    one key in the same moment the later wins. Small objects, and `put`, have no such gap.

    ``etag`` is the server's: for S3 equal bytes have equal etags. ``modified`` is the server's clock, in whole seconds
    rounded down. What a writer that died had sent is invisible, and no API here lists it: let the bucket's lifecycle
    rules remove unfinished uploads after some days.

    Requests that fail in ways that may pass (no connection, a cut body, 5xx, 429) are tried again, after pauses that
    grow and vary, for a bounded time. Not to be used in a forked child of a process that has loaded this module.
    """

    def __init__(
        self, location: Location, *, retry_for: float = 30.0, idle: float = 60.0, timeout: float = 600.0
    ) -> None:
        """Open, without touching it.

        Args:
            location: where it is.
            retry_for: seconds for which a request that keeps failing, or that has stalled, is tried again.
            idle: seconds after which an attempt has stalled of which no byte comes.
            timeout: seconds that one attempt may take, and after which one that sends a big body has stalled; each
                moves at most some 8 MiB, but for a big `put` or `get`.

        Raises:
            InvalidInput: one of the times is not above 0.
        """
        if not all(seconds > 0 for seconds in (retry_for, idle, timeout)):
            raise InvalidInput(f"expected times above 0 s, got retry_for={retry_for}, idle={idle}, timeout={timeout}")
        self._location = location
        self._retry_for, self._idle, self._timeout = retry_for, idle, timeout
        self._client = open_client(location, retry_for, idle, timeout)
        self._sender = open_client(location, retry_for, timeout, timeout)
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def url(self) -> str:
        """``s3://bucket/prefix`` and the like, with the endpoint where that is not the provider's own."""
        return self._location.url

    @property
    def window(self) -> int:
        """8 MiB: at 100 MB/s a connection the wait for the first byte is then a fraction."""
        return _WINDOW

    @property
    def parallel(self) -> int:
        """16: one connection alone gets a fraction of what the network gives."""
        return _PARALLEL

    @property
    def has_views(self) -> bool:
        """They are what the client has received."""
        return True

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        check_key(key)
        if size == 0:
            self._require(key)
            return b""
        span: Any = {"offset": start} if size is None else (start, start + size)
        with self._translated(f"read {key}"):
            try:
                got = obstore.get(self._client, key, options=None if (start, size) == (0, None) else {"range": span})
                return bytes(got.bytes())
            except MISSING:
                raise self._no_object(key) from None
            except BaseError as error:
                if Refusal.read(error).is_past_end:
                    return b""
                raise

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`. Near ranges share a request; requests of one call run in parallel."""
        check_key(key)
        wanted = runs(ranges, _WINDOW)
        if not wanted:
            self._require(key)
        self._each(lambda run: self._fill(key, run), wanted)

    def view(self, key: str, start: int, size: int) -> memoryview:
        """See `Store.view`. One request."""
        check_key(key)
        if not size:
            self._require(key)
            return memoryview(b"")
        with self._translated(f"read {key}"):
            try:
                data = memoryview(obstore.get_range(self._client, key, start=start, length=size))
            except MISSING:
                raise self._no_object(key) from None
            except BaseError as error:
                if not Refusal.read(error).is_past_end:
                    raise
                data = memoryview(b"")
        if len(data) != size:
            raise IntegrityError(f"{key} ends early: wanted {size} bytes at {start}, got {len(data)}")
        return data

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        check_key(key)
        with self._translated(f"look up {key}"):
            try:
                return _info(obstore.head(self._client, key), key)
            except MISSING:
                return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`. Asked for as a whole: not every server of these protocols lists in the order of keys."""
        check_prefix(prefix)
        return self._list(prefix)

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._translated(f"list {prefix or 'everything'}"):
            found = obstore.list(self._client, prefix or None, chunk_size=_BULK).collect()
        # A web server's listing tells whole paths, a bucket's only what follows the prefix.
        above = f"{unquote(self._location.prefix)}/" if self._location.scheme in ("http", "https") else ""
        infos = [_info(meta, meta["path"].removeprefix(above)) for meta in found]
        yield from sorted((info for info in infos if is_key(info.key)), key=lambda info: info.key)

    def _fill(self, key: str, run: Run) -> None:
        data = self.view(key, run.start, run.end - run.start)
        for r in run.ranges:
            r.out[:] = data[r.start - run.start :][: len(r.out)]

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        check_key(key)
        body = data if isinstance(data, bytes) else bytes(data)  # a request that was given up may live on a while
        if mode != "overwrite":
            return self._put_conditionally(key, body, mode)
        with self._translated(f"write {key}"):
            put = obstore.put(
                self._for(len(body)),
                key,
                body,
                use_multipart=len(body) > PART,
                chunk_size=PART,
                max_concurrency=PARTS_IN_FLIGHT,
            )
        return self._etag(key, put)

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`. In parallel."""
        for key, _ in items:
            check_key(key)

        def put(item: tuple[str, Buffer]) -> None:
            try:
                self.put(*item, mode=mode)
            except AlreadyExists:
                return

        self._each(put, list(dict(items if mode == "overwrite" else reversed(items)).items()))

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`. What it holds in memory is bounded; its parts travel while more is written."""
        check_key(key)
        return PartsWriter(
            key,
            put=lambda data: self.put(key, data, mode="create"),
            exists=lambda: self.head(key) is not None,
            send=lambda parts: self._put_parts(key, parts),
        )

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`. S3 takes a thousand keys a request; the others are asked one by one, in parallel."""
        doomed = [*dict.fromkeys(check_key(key) for key in keys)]
        if self._location.scheme == "s3":
            batches = [doomed[first : first + _BULK] for first in range(0, len(doomed), _BULK)]
        else:
            batches = [[key] for key in doomed]
        self._each(self._delete, batches)

    def close(self) -> None:
        """Stop the threads. The store can be used on."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _delete(self, keys: Sequence[str]) -> None:
        with self._translated(f"delete {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")):
            for is_last in (False, True):  # the client repeats no POST that nobody answered; this one it could
                try:
                    obstore.delete(self._client, keys)
                    return
                except MISSING:
                    return
                except BaseError as error:
                    if is_last or Refusal.read(error).status is not None:
                        raise

    def _put_conditionally(self, key: str, body: bytes, mode: PutMode) -> str:
        """Put if ``mode`` allows; an answer that was lost is asked for again, until it is known who wrote."""
        mark = secrets.token_hex(16)
        condition = self._condition(key, mode)
        give_up = time.monotonic() + self._retry_for + (self._idle if len(body) <= _SMALL else self._timeout)
        pause = 0.05
        with self._translated(f"write {key}"):
            while True:
                try:
                    put = obstore.put(
                        self._for(len(body)), key, body, mode=condition, attributes={_MARK: mark}, use_multipart=False
                    )
                    return self._etag(key, put)
                except (AlreadyExistsError, PreconditionError):
                    found = self._marked(key)
                    if found is not None and found[0] == mark:
                        return found[1]
                    is_gone = found is None and mode == "create"  # taken and freed in between: it may be ours yet
                    if not is_gone or time.monotonic() > give_up:
                        raise self._refused(key, mode) from None
                except (BaseError, *MISSING) as error:
                    found = self._marked(key)
                    if found is not None and found[0] == mark:
                        return found[1]
                    if (
                        isinstance(error, MISSING)
                        or Refusal.read(error).status is not None
                        or time.monotonic() > give_up
                    ):
                        raise
                time.sleep(random.uniform(pause / 2, pause))
                pause = min(2 * pause, 2.0)

    def _put_parts(self, key: str, parts: Iterator[Buffer]) -> None:
        mark = secrets.token_hex(16)
        with self._translated(f"write {key}"):
            try:
                obstore.put(
                    self._sender,
                    key,
                    parts,
                    use_multipart=True,
                    chunk_size=PART,
                    max_concurrency=PARTS_IN_FLIGHT,
                    attributes={_MARK: mark},
                )
            except FAILURES:
                found = self._marked(key)
                if found is None or found[0] != mark:
                    raise

    def _for(self, size: int) -> Client:
        """What sends a body of ``size`` bytes: a big one on a slow line takes longer than an answer may."""
        return self._client if size <= _SMALL else self._sender

    def _condition(self, key: str, mode: PutMode) -> Any:
        if not isinstance(mode, Match):
            return "create"
        if self._location.scheme != "gs":
            return {"e_tag": f'"{mode.etag}"'}
        with self._translated(f"look up {key}"):  # Google compares generations, which only a look-up tells
            try:
                meta = obstore.head(self._client, key)
            except MISSING:
                raise self._refused(key, mode) from None
        if _info(meta, key).etag != mode.etag:
            raise self._refused(key, mode)
        return {"e_tag": meta["e_tag"], "version": meta["version"]}

    def _marked(self, key: str) -> tuple[str, str] | None:
        """Mark and etag of the object that is there."""
        try:
            found = obstore.get(self._client, key, options={"head": True})
        except MISSING:
            return None
        return str(found.attributes.get(_MARK, "")), _info(found.meta, key).etag

    def _etag(self, key: str, put: Any) -> str:
        if put["e_tag"] is not None:
            return str(put["e_tag"]).strip('"')
        found = self.head(key)
        return "" if found is None else found.etag

    # -- errors and threads --------------------------------------------------------------------------------------

    def _require(self, key: str) -> None:
        if self.head(key) is None:
            raise self._no_object(key)

    def _no_object(self, key: str) -> NotFound:
        return NotFound(f"{self.url} has no object {key}")

    def _refused(self, key: str, mode: PutMode) -> AlreadyExists | Conflict:
        if isinstance(mode, Match):
            return Conflict(f"{key} changed: expected etag {mode.etag}, and {self.url} has another, or none")
        return AlreadyExists(f"{self.url} already has {key}")

    @contextmanager
    def _translated(self, act: str) -> Iterator[None]:
        """Turn obstore's errors into ours, without what may be secret in them, and without them as a cause."""
        if os.getpid() != _PROCESS:
            raise StoreError(
                f"cannot {act} in {self.url}: this process was forked from one that had loaded the client",
                hint="start processes with spawn or forkserver",
            )
        try:
            yield
        except NotSupportedError:
            raise StoreError(f"cannot {act} in {self.url}: the server does not support that request") from None
        except FAILURES as error:
            raise Refusal.read(error).error(act, self._location) from None

    def _each(self, act: Callable[[_T], object], items: Sequence[_T]) -> None:
        """Do all, in parallel; when it returns, or raises the first error, none still runs."""
        if len(items) < 2:
            for item in items:
                act(item)
            return
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="kvist-remote")
            tasks = [self._pool.submit(act, item) for item in items]
        wait(tasks)
        for task in tasks:
            task.result()


def _info(meta: Any, key: str) -> ObjectInfo:
    modified = float(int(meta["last_modified"].timestamp()))  # a listing may tell milliseconds, a look-up never does
    etag = meta["e_tag"]
    return ObjectInfo(key, meta["size"], modified, etag.strip('"') if etag else f"{meta['size']:x}-{int(modified):x}")
