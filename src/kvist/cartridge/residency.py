"""Residency: which cartridges are in memory, in what order they go, and who uses them.

Knows keys, sizes and a way to load. Must not know what is loaded: no tensor, no file, no engine.

A key is absent, loading or resident. Room is reserved before a load begins, and what goes counts until it has been
released, so that memory never holds more than the capacity. No lock is held over a check, a load or a release.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from typing import Any, Generic, TypeVar, cast

from kvist.cartridge.lease import Entry, Lease, choose
from kvist.cartridge.room import ResidencyMetrics, Room
from kvist.errors import CartridgeTooLarge, EngineError, InvalidInput, ResidencyFull

T = TypeVar("T")


class Residency(Generic[T]):
    """A bounded set of loaded things, the least recently used of which go first. Thread-safe.

    Concurrent acquires of one key load it once. What is leased or pinned does not go. One that fails changes nothing,
    but for one case: a load that fails after others had to go for it leaves their room free (so verify in ``check``).
    """

    def __init__(
        self,
        capacity_bytes: int,
        load: Callable[[Any], T],
        size_of: Callable[[Any], int],
        release: Callable[[T], None] | None = None,
        *,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            capacity_bytes: at least 1, else `InvalidInput`.
            load: makes the value of a key; runs in the thread that acquires first, and holds no more than ``size_of``.
            size_of: bytes that ``load`` will hold; cheap, asked once a load. What it raises, so does the acquire.
            release: gives up a value's memory, called once a value. Without it the value is only forgotten.
            check: raises if the key cannot be loaded; runs before anything is evicted for it.
        """
        if capacity_bytes < 1:
            raise InvalidInput(f"expected a capacity of at least 1 byte, got {capacity_bytes}")
        self._room = Room(capacity_bytes)
        self._load, self._size_of, self._release, self._check = load, size_of, release, check
        self._changed = threading.Condition()
        self._entries: OrderedDict[Hashable, Entry[T]] = OrderedDict()  # least recently used first
        self._is_closed = False

    # -- using -------------------------------------------------------------------------------------------------------

    def acquire(self, key: Hashable, *, wait: bool = False) -> Lease[T]:
        """Lease what is at ``key``, loading it if need be; it becomes the most recently used.

        Args:
            key: what ``load`` understands.
            wait: where leases of others leave no room, wait for them. A caller that holds one itself must not.

        Raises:
            CartridgeTooLarge: it is larger than the capacity.
            ResidencyFull: it is larger than pins leave, or there is no room now.
            EngineError: the residency is closed, or the thread that loaded it was interrupted.
            Exception: whatever ``size_of``, ``check`` or ``load`` raised: one failed load fails all who waited for it.
        """
        return self._obtain(key, wait=wait, is_asked=True)

    def lease(self, key: Hashable) -> Lease[T] | None:
        """As `acquire`, of what is resident; ``None`` if it would have to be loaded. Never waits."""
        with self._changed:
            entry = self._entries.get(key)
            if entry is None or not entry.is_resident:
                return None
            entry.refs += 1
            self._entries.move_to_end(key)
            self._room.hits += 1
            return Lease(entry, self._give_back)

    def prefetch(self, key: Hashable) -> bool:
        """Load what will be acquired soon; it is neither leased nor pinned then, and counts as no hit or miss.

        Returns:
            Whether it is resident; ``False`` if there is no room for it.

        Raises:
            Exception: as `acquire`, but for `ResidencyFull`.
        """
        if self.contains(key):
            return True
        try:
            self._obtain(key, wait=False, is_asked=False).close()
        except ResidencyFull:
            return False
        return True

    def pin(self, key: Hashable) -> bool:
        """Keep it although nobody uses it; ``False`` if it is not resident."""
        return self._set_pinned(key, True)

    def unpin(self, key: Hashable) -> bool:
        """Let it go again; ``False`` if it is not resident."""
        return self._set_pinned(key, False)

    def evict(self, key: Hashable, *, force: bool = False) -> bool:
        """Let it go now.

        Args:
            key: any.
            force: although it is pinned, used, or being loaded. Who uses it keeps it, and its bytes count until they
                end; who acquires it from now on loads it anew.

        Returns:
            ``False`` if it is absent, or is not let go.
        """
        with self._changed:
            entry = self._entries.get(key)
            if entry is None or not (entry.may_go or force):
                return False
            del self._entries[key]
            gone = [entry] if entry.is_resident and not entry.refs else []
            self._move_out(gone)
        self._let_go(gone)
        return True

    def close(self) -> None:
        """Let everything go; what is leased when its lease is closed."""
        with self._changed:
            self._is_closed = True
            gone = [entry for entry in self._entries.values() if entry.is_resident and not entry.refs]
            self._entries.clear()
            self._move_out(gone)
        self._let_go(gone)

    # -- looking -----------------------------------------------------------------------------------------------------

    def contains(self, key: Hashable) -> bool:
        """Whether it could be acquired without a load."""
        with self._changed:
            return (entry := self._entries.get(key)) is not None and entry.is_resident

    def refs(self, key: Hashable) -> int:
        """How many lease it or wait for it."""
        with self._changed:
            return entry.refs if (entry := self._entries.get(key)) else 0

    def lru_order(self) -> list[Hashable]:
        """Keys of the resident, the first to go first."""
        with self._changed:
            return [key for key, entry in self._entries.items() if entry.is_resident]

    @property
    def resident_bytes(self) -> int:
        """See `ResidencyMetrics`."""
        with self._changed:
            return self._room.resident

    def metrics(self) -> ResidencyMetrics:
        """All at one moment."""
        with self._changed:
            there = [entry for entry in self._entries.values() if entry.is_resident]
            in_use, pinned = sum(entry.refs > 0 for entry in there), sum(entry.is_pinned for entry in there)
            return self._room.metrics(resident=len(there), in_use=in_use, pinned=pinned)

    # -- loading -----------------------------------------------------------------------------------------------------

    def _obtain(self, key: Hashable, *, wait: bool, is_asked: bool) -> Lease[T]:
        while True:
            entry, leads = self._join(key, is_asked)
            try:
                if leads:
                    self._bring_in(entry, wait)
                else:
                    self._await(entry, wait)
                return Lease(entry, self._give_back)
            except ResidencyFull:
                if leads or not wait:
                    raise
                is_asked = False  # counted already; who led would not wait for room, and this one does

    def _join(self, key: Hashable, is_asked: bool) -> tuple[Entry[T], bool]:
        """Take a reference to the key's entry; whether it was made for this, so that the caller is to bring it in."""
        with self._changed:
            self._require_open()
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry(key)
                self._room.misses += is_asked
                return entry, True
            entry.refs += 1
            if entry.is_resident:
                self._entries.move_to_end(key)
                self._room.hits += is_asked
            else:
                self._room.waits += is_asked
            return entry, False

    def _await(self, entry: Entry[T], wait: bool) -> None:
        try:
            with self._changed:
                while not entry.is_resident and entry.error is None:
                    if entry.is_stuck and not wait:  # the caller's own leases may be what it waits for
                        raise self._full(entry.size)
                    self._changed.wait()
        except BaseException:
            Lease(entry, self._give_back).close()
            raise
        if isinstance(entry.error, Exception):
            raise entry.error
        if entry.error is not None:  # the end of the thread that loaded is not the end of this one
            raise EngineError("the load was interrupted") from entry.error

    def _bring_in(self, entry: Entry[T], wait: bool) -> None:
        try:
            size = self._size_of(entry.key)
            if size < 0:
                raise InvalidInput(f"expected a size of at least 0 bytes, got {size}")
            if self._check is not None:
                with self._changed:
                    self._require_room(size, wait)  # or it is not worth a check
                self._check(entry.key)
            self._let_go(self._reserve(entry, size, wait))
            value = self._load(entry.key)
        except BaseException as error:
            self._fail(entry, error)
            raise
        with self._changed:
            entry.value, entry.is_resident = value, True
            self._room.load(entry.size)
            if self._entries.get(entry.key) is entry:
                self._entries.move_to_end(entry.key)
            self._changed.notify_all()

    def _fail(self, entry: Entry[T], error: BaseException) -> None:
        with self._changed:
            entry.error = error
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
            self._room.reserved -= entry.size if entry.is_reserved else 0
            if isinstance(error, ResidencyFull):
                self._room.refusals += 1
            else:
                self._room.failures += 1
            self._changed.notify_all()

    def _reserve(self, entry: Entry[T], size: int, wait: bool) -> list[Entry[T]]:
        """Make room: all that has to go is taken off in one step, or nothing is. Returns what is to be let go."""
        with self._changed:
            entry.size = size
            while (surplus := self._available - size) < 0:
                self._require_room(size, wait)
                if entry.is_stuck != (surplus + self._room.leaving < 0):
                    entry.is_stuck = not entry.is_stuck
                    self._changed.notify_all()
                self._changed.wait()
                self._require_open()
            entry.is_stuck = False
            victims = choose(self._idle(), surplus)
            for victim in victims:
                del self._entries[victim.key]
            self._move_out(victims)
            self._room.reserved += size
            entry.is_reserved = True
            return victims

    def _idle(self) -> list[Entry[T]]:
        return [entry for entry in self._entries.values() if entry.may_go]

    @property
    def _available(self) -> int:
        return self._room.free + sum(entry.size for entry in self._idle())

    def _require_room(self, size: int, wait: bool) -> None:
        """Refuse what pins leave no room for; and what has no room now, but for who waits."""
        room = self._room
        if size > room.capacity:
            raise CartridgeTooLarge(
                f"expected at most the capacity of {room.capacity} bytes, got {size}",
                hint=f"host_bytes of at least {size} would hold it",
            )
        pinned = sum(entry.size for entry in self._entries.values() if entry.is_pinned)
        if size > room.capacity - pinned:
            raise ResidencyFull(
                f"expected at most the capacity of {room.capacity} bytes of which {pinned} are pinned, got {size}"
            )
        if not wait and self._available + room.leaving < size:
            raise self._full(size)

    def _full(self, size: int) -> ResidencyFull:
        return ResidencyFull(
            f"expected {size} bytes of {self._room.capacity} to be free or unused, got {max(self._available, 0)}: "
            "the rest is in use, being loaded, or pinned",
            hint="retry when requests have ended, or raise host_bytes",
        )

    def _move_out(self, gone: Iterable[Entry[T]]) -> None:
        for entry in gone:
            self._room.evict(entry.size)
        self._changed.notify_all()

    def _let_go(self, gone: Iterable[Entry[T]]) -> None:
        """Release what was moved out. Its bytes count until then, beside the reservation that it makes room for."""
        with ExitStack() as acts:
            for entry in gone:
                acts.callback(self._release_one, entry)

    def _release_one(self, entry: Entry[T]) -> None:
        value, entry.value = entry.value, None
        try:
            if self._release is not None:
                self._release(cast(T, value))
        finally:
            del value
            with self._changed:
                self._room.leaving -= entry.size
                self._changed.notify_all()

    # -- ends --------------------------------------------------------------------------------------------------------

    def _give_back(self, lease: Lease[T]) -> None:
        with self._changed:
            entry = lease.take()
            if entry is None:
                return
            entry.refs -= 1
            is_evicted = self._entries.get(entry.key) is not entry
            gone = [entry] if is_evicted and entry.is_resident and not entry.refs else []
            self._move_out(gone)
        self._let_go(gone)

    def _set_pinned(self, key: Hashable, is_pinned: bool) -> bool:
        with self._changed:
            entry = self._entries.get(key)
            if entry is None or not entry.is_resident:
                return False
            entry.is_pinned = is_pinned
            self._changed.notify_all()
        return True

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError("the residency is closed")
