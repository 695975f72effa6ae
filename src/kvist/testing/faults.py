"""What can go wrong with a store: the faults that `FaultyStore` lets happen, and `CrashingStore`, which dies.

Knows the `Store` contract and how real storage breaks it. Must not know what objects mean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from kvist.errors import StoreError
from kvist.hashing import Buffer
from kvist.store import ObjectWriter, PutMode, Store, WrapperStore

Op = Literal["get", "get_ranges", "head", "list", "put", "write", "commit", "delete", "clean"]
"""A call that can go wrong. Each object of a batch is a put, each key of a deletion a delete."""
OPS: Final[frozenset[Op]] = frozenset(
    {"get", "get_ranges", "head", "list", "put", "write", "commit", "delete", "clean"}
)
Wrong = Literal["flip", "cut", "zero", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that goes wrong, and when. Its matching calls are counted from 1.

    Attributes:
        ops: the calls that it may hit.
        prefix: of the keys that it may hit; for a listing, of the prefix that is listed.
        at: of the matching calls, only those of these numbers; ``None``: any.
        chance: probability that it hits such a call.
        times: it hits at most so often; ``None``: without end.
    """

    ops: Collection[Op] = OPS
    prefix: str = ""
    at: Collection[int] | None = None
    chance: float = 1.0
    times: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse(Fault):
    """The call fails.

    Attributes:
        error: makes the error from a message: what the store below would raise, or what it never should.
        after: whether the call takes effect first: the answer is lost. A listing then breaks off somewhere.
    """

    error: Callable[[str], Exception] = StoreError
    after: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay(Fault):
    """The call takes longer.

    Attributes:
        seconds: by how much.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tear(Fault):
    """An object is left cut short, against the contract: by a disk that lies about its barriers, a broken object store.

    Attributes:
        keep: the part of its bytes that stays.
        silent: whether the write claims to have succeeded; else it raises `StoreError`.
    """

    ops: Collection[Op] = frozenset({"put", "commit"})
    keep: float = 0.5
    silent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(Fault):
    """What would pass the limit is refused with `StoreFull` and leaves nothing. Deleting, and aborting, makes room.

    Attributes:
        room: bytes that can be written.
    """

    ops: Collection[Op] = frozenset({"put", "write"})
    room: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rot(Fault):
    """A read gives wrong bytes. What is stored stays as it is.

    Attributes:
        how: one bit flipped, the end cut off, up to a sector of zeros, or the bytes of another object beside it (where
            there is none, a flipped bit); ``None``: any of these.
    """

    ops: Collection[Op] = frozenset({"get", "get_ranges"})
    how: Wrong | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag(Fault):
    """Reads see what was there before a write, for a while. With ``ops={"list"}`` listings lag and nothing else.

    Attributes:
        calls: how many calls of any kind, after that write, see the past.
    """

    ops: Collection[Op] = frozenset({"get", "get_ranges", "head", "list"})
    calls: int


def shuffled(keys: Iterable[str], chance: random.Random) -> list[str]:
    """The keys in another order, which is the same in every run."""
    found = sorted(keys)
    chance.shuffle(found)
    return found


# -- crashes -----------------------------------------------------------------------------------------------------------


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
        seed: int = 0,
    ) -> None:
        """Wrap ``store``.

        Args:
            store: what is written to.
            at: crash at this write, counted from 1; ``None``: never, until `arm` is called.
            after: once it is done, instead of before.
            crash: called at the crash, for instance to really kill the process; then `SimulatedCrash` is raised.
            seed: of the order in which objects are deleted.
        """
        super().__init__(store)
        self.writes = 0
        self.is_dead = False
        self._at, self._after, self._crash = at, after, crash
        self._chance = random.Random(seed)

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
        """See `Store.delete`. One by one, as `put_many`, and in any order, as object stores do."""
        self._alive()
        for key in shuffled(keys, self._chance):
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
