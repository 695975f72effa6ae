"""Stores that fail on purpose: a crash before or after any chosen write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NoReturn

from kvist.hashing import Buffer
from kvist.store import ObjectWriter, PutMode, Store, WrapperStore


class SimulatedCrash(BaseException):
    """The process dies here. Not an `Exception`: no handler that goes on after errors may catch it."""


class CrashingStore(WrapperStore):
    """Dies before or after one chosen write, and leaves the store below as ``kill -9`` would at that moment.

    One write is one object changed for all to see: a put, each object of a batch or of a deletion, the commit of a
    writer. After the crash every write raises again, so that no ``finally`` or ``except`` of the dying code can tidy
    up; open the store below anew, as the next process would. A writer that was open keeps what it had, unseen (on a
    `LocalStore`: a temporary file, held open).

    Attributes:
        writes: how many were done or begun.
        is_dead: whether it has crashed.
    """

    def __init__(
        self,
        store: Store,
        at: int | None = None,
        *,
        after: bool = False,
        crash: Callable[[], object] | None = None,
    ) -> None:
        """Wrap ``store``.

        Args:
            store: what is written to.
            at: crash at this write, counted from 1; ``None``: never, until `arm` is called.
            after: once it is done, instead of before.
            crash: called at the crash, for instance to really kill the process; then `SimulatedCrash` is raised.
        """
        super().__init__(store)
        self.writes = 0
        self.is_dead = False
        self._at, self._after, self._crash = at, after, crash

    def arm(self, writes: int | None, *, after: bool = False) -> None:
        """Crash at the ``writes``-th write from now, or never."""
        self._at = None if writes is None else self.writes + writes
        self._after = after

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        self._before()
        etag = self.store.put(key, data, mode=mode)
        self._done()
        return etag

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`. One by one: a crash may come between any two."""
        self._alive()
        for item in items:
            self._before()
            self.store.put_many([item], mode=mode)
            self._done()

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        self._alive()
        return _CrashingWriter(self, self.store.writer(key))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`. One by one, as `put_many`."""
        self._alive()
        for key in keys:
            self._before()
            self.store.delete([key])
            self._done()

    def clean(self, older_than: float) -> int:
        """See `Store.clean`."""
        self._alive()
        return self.store.clean(older_than)

    def close(self) -> None:
        """Do nothing: the store below outlives this process."""

    def _alive(self) -> None:
        if self.is_dead:
            raise SimulatedCrash("this store's process is dead")

    def _before(self) -> None:
        self._alive()
        self.writes += 1
        if self.writes == self._at and not self._after:
            self._die()

    def _done(self) -> None:
        if self.writes == self._at and self._after:
            self._die()

    def _die(self) -> NoReturn:
        self.is_dead = True
        if self._crash is not None:
            self._crash()
        raise SimulatedCrash(f"crashed {'after' if self._after else 'before'} write {self.writes}")


class _CrashingWriter(ObjectWriter):
    def __init__(self, store: CrashingStore, writer: ObjectWriter) -> None:
        self._store, self._writer = store, writer

    def write(self, data: Buffer) -> None:
        self._store._alive()
        self._writer.write(data)

    def commit(self) -> None:
        self._store._before()
        self._writer.commit()
        self._store._done()

    def abort(self) -> None:
        if not self._store.is_dead:
            self._writer.abort()
