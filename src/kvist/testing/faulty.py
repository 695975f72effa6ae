"""`FaultyStore`: a store on a bad day, as often and as badly as its faults say.

Knows the `Store` contract and how real storage breaks it. Must not know what objects mean.

    store = FaultyStore(LocalStore(path), Refuse(chance=0.01), Rot(ops={"get_ranges"}, at={3}), seed=7)

Every choice follows from the seed and the number of the call, so that with one thread a run can be repeated. With
several, it is still the same calls that fail, but not always the same thread that makes them.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvist.errors import IntegrityError, NotFound, StoreError, StoreFull
from kvist.hashing import Buffer
from kvist.store import ObjectInfo, ObjectWriter, PutMode, Range, Store, WrapperStore
from kvist.testing.faults import Delay, Fault, Full, Lag, Op, Refuse, Rot, Tear, shuffled

_SECTOR: Final = 4096


@dataclass(frozen=True, slots=True)
class Fired:
    """A fault that hit a call.

    Attributes:
        op: which call.
        key: of what; for a listing, its prefix.
        fault: what went wrong.
    """

    op: Op
    key: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class _Hit:
    """A fault that hits this call: its place among all, and the chance for its details."""

    fault: Fault
    number: int
    chance: random.Random


@dataclass(frozen=True, slots=True)
class _Past:
    """What was under a key before a write, and the last call that may see it."""

    info: ObjectInfo | None
    data: bytes | None
    until: int


class FaultyStore(WrapperStore):
    """Lets faults happen to the calls that pass through it. Faults that hit one call happen all.

    Attributes:
        active: whether faults happen, and calls are counted; switch it off while a test prepares or looks.
        calls: how many were counted.
        fired: what has gone wrong, in order.
    """

    def __init__(
        self, store: Store, *faults: Fault, seed: int = 0, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        """Wrap ``store``.

        Args:
            store: where the calls go.
            faults: what goes wrong.
            seed: of every choice.
            sleep: called with the seconds of a `Delay`; a test passes its own clock's.
        """
        super().__init__(store)
        self.active = True
        self.calls = 0
        self.fired: list[Fired] = []
        self._faults, self._seed, self._sleep = faults, seed, sleep
        self._lock = threading.RLock()
        self._matched: Counter[int] = Counter()
        self._happened: Counter[int] = Counter()
        self._used: Counter[int] = Counter()  # bytes, by the number of the `Full` that limits them
        self._past: dict[str, _Past] = {}

    # -- reads ---------------------------------------------------------------------------------------------------

    @property
    def has_views(self) -> bool:
        """None: what would be a view is read by `get_ranges`, to which faults happen."""
        return False

    view = Store.view

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        hits = self._begin("get", key)
        past = self._seen(hits, key)
        if past is None:
            data = self.store.get(key, start=start, size=size)
        else:
            data = _body(past, key)[start : None if size is None else start + size]
        for hit in hits:
            if isinstance(hit.fault, Rot):
                data = bytes(self._rotten(hit, key, start, bytearray(data)))
        self._end(hits, "get", key)
        return data

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`."""
        hits = self._begin("get_ranges", key)
        past = self._seen(hits, key)
        if past is None:
            self.store.get_ranges(key, ranges)
        else:
            body = _body(past, key)
            for each in ranges:
                _fill(each, body[each.start : each.start + len(each.out)], key)
        for hit in hits:
            if isinstance(hit.fault, Rot) and ranges:
                each = hit.chance.choice(ranges)
                _fill(each, self._rotten(hit, key, each.start, bytearray(each.out)), key)
        self._end(hits, "get_ranges", key)

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        hits = self._begin("head", key)
        past = self._seen(hits, key)
        info = self.store.head(key) if past is None else past.info
        self._end(hits, "head", key)
        return info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        hits = self._begin("list", prefix)
        infos: Iterable[ObjectInfo] = self.store.list(prefix)
        if any(isinstance(hit.fault, Lag) for hit in hits):
            infos = self._listed_before(infos, prefix)
        return self._listing(hits, infos, prefix)

    def _listing(self, hits: Sequence[_Hit], infos: Iterable[ObjectInfo], prefix: str) -> Iterator[ObjectInfo]:
        late = next((hit for hit in hits if isinstance(hit.fault, Refuse) and hit.fault.after), None)
        if late is None:
            yield from infos
            return
        whole = [*infos]
        yield from whole[: late.chance.randint(0, len(whole))]
        self._end(hits, "list", prefix)

    # -- writes --------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        hits = self._begin("put", key)
        body = memoryview(data).cast("B")
        self._remember(key)
        torn = _tear(hits)
        if torn is not None:
            body = body[: int(len(body) * torn.keep)]
        self._take_room(hits, "put", key, len(body))
        try:
            etag = self.store.put(key, body, mode=mode)
        except BaseException:
            self._give_room(key, len(body))
            raise
        if torn is not None and not torn.silent:
            raise StoreError(f"put {key}: cut short after {len(body)} bytes, as was wished")
        self._end(hits, "put", key)
        return etag

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`. One by one, so that a fault may come between any two."""
        super(WrapperStore, self).put_many(items, mode=mode)

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        return _FaultyWriter(self, key, self.store.writer(key))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`. One by one, as `put_many`, and in any order, as object stores do."""
        for key in shuffled(keys, random.Random(f"{self._seed}/{self.calls}")):
            hits = self._begin("delete", key)
            self._remember(key)
            info = self.store.head(key)
            self.store.delete([key])
            self._give_room(key, 0 if info is None else info.size)
            self._end(hits, "delete", key)

    def clean(self, older_than: float) -> int:
        """See `Store.clean`."""
        hits = self._begin("clean", "")
        freed = self.store.clean(older_than)
        self._end(hits, "clean", "")
        return freed

    # -- what happens --------------------------------------------------------------------------------------------

    def _begin(self, op: Op, key: str) -> Sequence[_Hit]:
        """Count a call, choose what happens to it, and let happen what comes before its effect."""
        with self._lock:
            if not self.active:
                return ()
            self.calls += 1
            hits = [hit for number, fault in enumerate(self._faults) if (hit := self._hit(number, fault, op, key))]
            self.fired += [Fired(op, key, hit.fault) for hit in hits if not isinstance(hit.fault, Full | Lag)]
        for hit in hits:
            if isinstance(hit.fault, Delay):
                self._sleep(hit.fault.seconds)
        for hit in hits:
            if isinstance(hit.fault, Refuse) and not hit.fault.after:
                raise hit.fault.error(f"{op} {key}: refused, as was wished")
        return hits

    def _hit(self, number: int, fault: Fault, op: Op, key: str) -> _Hit | None:
        if op not in fault.ops or not key.startswith(fault.prefix):
            return None
        self._matched[number] += 1
        count = self._matched[number]
        if fault.at is not None and count not in fault.at:
            return None
        if fault.times is not None and self._happened[number] >= fault.times:
            return None
        chance = random.Random(f"{self._seed}/{number}/{count}")
        if chance.random() >= fault.chance:
            return None
        self._happened[number] += 1
        return _Hit(fault, number, chance)

    def _end(self, hits: Sequence[_Hit], op: Op, key: str) -> None:
        """The effect is there; the answer may be lost."""
        for hit in hits:
            if isinstance(hit.fault, Refuse) and hit.fault.after:
                raise hit.fault.error(f"{op} {key}: done, but the answer was lost, as was wished")

    def _rotten(self, hit: _Hit, key: str, start: int, data: bytearray) -> bytearray:
        """``data``, read from offset ``start`` of the object, as a bad disk or wire would give it."""
        assert isinstance(hit.fault, Rot)
        how, chance = hit.fault.how or hit.chance.choice(("flip", "cut", "zero", "other")), hit.chance
        if not data:
            return data
        if how == "other":
            beside = [info.key for info in self.store.list(key[: key.rfind("/") + 1]) if info.key != key]
            if beside:
                other = self.store.get(chance.choice(beside), start=start, size=len(data))
                return bytearray(other) + bytes(len(data) - len(other))
        at = chance.randrange(len(data))
        if how == "cut":
            return data[:at]
        if how == "zero":
            end = min(len(data), at + chance.randint(1, _SECTOR))
            data[at:end] = bytes(end - at)
        else:
            data[at] ^= 1 << chance.randrange(8)
        return data

    def _take_room(self, hits: Sequence[_Hit], op: Op, key: str, size: int) -> None:
        with self._lock:
            for hit in hits:
                used = self._used[hit.number]
                if isinstance(hit.fault, Full) and used + size > hit.fault.room:
                    self.fired.append(Fired(op, key, hit.fault))
                    raise StoreFull(
                        f"{self.url} is full: {used} of {hit.fault.room} bytes are used, wanted {size} more"
                    )
            self._used.update({hit.number: size for hit in hits if isinstance(hit.fault, Full)})

    def _give_room(self, key: str, size: int) -> None:
        with self._lock:
            for number, fault in enumerate(self._faults):
                if isinstance(fault, Full) and key.startswith(fault.prefix):
                    self._used[number] = max(0, self._used[number] - size)

    # -- the past ------------------------------------------------------------------------------------------------

    def _remember(self, key: str) -> None:
        """Keep, before a write, what some `Lag` will go on showing."""
        if not self.active:
            return
        lags = [fault.calls for fault in self._faults if isinstance(fault, Lag) and key.startswith(fault.prefix)]
        if lags:
            info = self.store.head(key)
            data = None if info is None else self.store.get(key)
            with self._lock:
                self._past[key] = _Past(info, data, self.calls + max(lags))

    def _seen(self, hits: Sequence[_Hit], key: str) -> _Past | None:
        if not any(isinstance(hit.fault, Lag) for hit in hits):
            return None
        with self._lock:
            past = self._past.get(key)
            return past if past is not None and past.until >= self.calls else None

    def _listed_before(self, infos: Iterable[ObjectInfo], prefix: str) -> Iterable[ObjectInfo]:
        found = {info.key: info for info in infos}
        with self._lock:
            past = {key: past.info for key, past in self._past.items() if past.until >= self.calls}
        for key, info in past.items():
            if info is None:
                found.pop(key, None)
            elif key.startswith(prefix):
                found[key] = info
        return [found[key] for key in sorted(found)]


class _FaultyWriter(ObjectWriter):
    """Writes through; torn, the object is cut down once it is there."""

    def __init__(self, store: FaultyStore, key: str, writer: ObjectWriter) -> None:
        self._store, self._key, self._writer = store, key, writer
        self._size = 0
        self._is_done = False

    def write(self, data: Buffer) -> None:
        with self._failing():
            hits = self._store._begin("write", self._key)
            size = memoryview(data).nbytes
            self._store._take_room(hits, "write", self._key, size)
            self._size += size
            self._writer.write(data)
            self._store._end(hits, "write", self._key)

    def commit(self) -> None:
        with self._failing():
            hits = self._store._begin("commit", self._key)
            self._store._remember(self._key)
            self._writer.commit()
            self._is_done = True
            torn = _tear(hits)
            if torn is not None:
                whole = self._store.store.get(self._key)
                self._store.store.put(self._key, whole[: int(len(whole) * torn.keep)])
                if not torn.silent:
                    raise StoreError(f"commit {self._key}: cut short, as was wished")
            self._store._end(hits, "commit", self._key)

    def abort(self) -> None:
        self._writer.abort()
        if not self._is_done:
            self._is_done = True
            self._store._give_room(self._key, self._size)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails discards the object, unless it is there already."""
        try:
            yield
        except BaseException:
            self.abort()
            raise


def _tear(hits: Sequence[_Hit]) -> Tear | None:
    return next((hit.fault for hit in hits if isinstance(hit.fault, Tear)), None)


def _body(past: _Past, key: str) -> bytes:
    if past.data is None:
        raise NotFound(f"there is no object {key} yet, as was wished")
    return past.data


def _fill(each: Range, data: Buffer, key: str) -> None:
    view = memoryview(data)
    if len(view) < len(each.out):
        raise IntegrityError(f"{key} ends early: wanted {len(each.out)} bytes at {each.start}, got {len(view)}")
    each.out[:] = view
