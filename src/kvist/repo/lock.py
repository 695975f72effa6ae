"""The gc lock: which objects a running gc is about to delete. Knows its record, not how a gc chooses.

Writers take no lock. A writer *publishes, then looks*: it makes its snapshot reachable, then reads this record. A gc
*announces, then looks*: it writes this record, then asks again what is reachable, and deletes only what still is not.
Whichever came second sees the other, so no page that a published snapshot needs is deleted unseen; no clock is
involved (docs/adr/0006). A writer that looks before it publishes as well gains no safety while it lives; but then only
the rarest meeting makes it take back what it published, and only that meeting matters if it dies in between.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

from kvist.errors import AlreadyExists, Conflict, IntegrityError, InvalidManifest, Locked, NotFound, StoreError
from kvist.repo import record, witness
from kvist.repo.witness import Witness
from kvist.store import Match, Store

KEY: Final = "locks/gc"
_LISTS: Final = ("objects", "segments", "repacked", "pages")


@dataclass(frozen=True)
class Condemned:
    """What a gc has announced to delete.

    Attributes:
        objects: keys of snapshots and manifests.
        segments: keys of segments, deleted with every page in them.
        repacked: keys of segments that are deleted once their other pages are copied out.
        pages: digests that are not copied out of ``repacked``.
    """

    objects: frozenset[str] = frozenset()
    segments: frozenset[str] = frozenset()
    repacked: frozenset[str] = frozenset()
    pages: frozenset[str] = frozenset()

    def loses(self, digest: str, homes: Iterable[str]) -> bool:
        """Whether no copy of a page, which lies in the segments ``homes``, survives."""
        return all(home in self.segments or (home in self.repacked and digest in self.pages) for home in homes)


@dataclass(frozen=True)
class Holder:
    """Who holds the lock, and what for."""

    host: str
    pid: int
    started: float
    token: str
    etag: str
    condemned: Condemned = field(default_factory=Condemned)

    @property
    def is_dead(self) -> bool:
        """Whether its process has surely ended, or its gc has, which could not withdraw what it announced."""
        return witness.is_dead(self.token)


_known: Final[WeakKeyDictionary[Store, Holder]] = WeakKeyDictionary()
"""The record that was last read of each store. It names every page that goes, and every writer asks again and again."""


def condemned(store: Store) -> Condemned:
    """What a running gc has announced; nothing if none runs, or if it died and can delete no more.

    Raises:
        Locked: as `holder`.
    """
    found = holder(store)
    return Condemned() if found is None or found.is_dead else found.condemned


def holder(store: Store) -> Holder | None:
    """Who holds the lock now, or ``None``.

    Raises:
        Locked: the record is there and unreadable: nobody can tell what is being deleted.
    """
    info = store.head(KEY)
    if info is None:
        _known.pop(store, None)
        return None
    known = _known.get(store)
    if known is not None and known.etag == info.etag:
        return known
    try:
        said = record.decode(KEY, store.get(KEY))
        lists = {name: frozenset(said[name]) for name in _LISTS}
        found = Holder(said["host"], said["pid"], said["started"], said["token"], info.etag, Condemned(**lists))
        if not (isinstance(found.host, str) and type(found.pid) is int and isinstance(found.token, str)):
            who = (found.host, found.pid, found.token)
            raise InvalidManifest(f"{KEY}: expected a host, a process and a token, got {who!r:.200}")
        time.ctime(found.started)
    except NotFound:
        return None
    except (IntegrityError, InvalidManifest, KeyError, TypeError, ValueError, OverflowError) as error:
        raise Locked(f"the gc lock {KEY} is unreadable: {error}", hint="kvist gc --break-lock") from None
    _known[store] = found
    return found


def acquire(store: Store, condemned: Condemned, *, break_lock: bool = False) -> Witness:
    """Announce a gc; returns what `release` takes.

    A lock whose holder is dead is taken over.

    Args:
        store: of the repository.
        condemned: what this gc may delete.
        break_lock: take the lock whoever holds it, even unreadably.

    Raises:
        Locked: another gc runs, or died where nobody here can tell.
    """
    held = Witness()
    try:
        _announce(store, _encode(condemned, held.token), held.token, break_lock)
    except BaseException:
        with contextlib.suppress(StoreError):
            release(store, held)  # it may lie there: perhaps only the answer was lost
        raise
    return held


def _announce(store: Store, data: bytes, token: str, break_lock: bool) -> None:
    try:
        store.put(KEY, data, mode="create")
        return
    except AlreadyExists:
        if break_lock:
            store.put(KEY, data)
            return
    found = holder(store)
    try:
        if found is None:
            store.put(KEY, data, mode="create")
            return
        if found.is_dead:
            store.put(KEY, data, mode=Match(found.etag))
            witness.remove(found.token)
            return
    except (Conflict, AlreadyExists):
        found = holder(store)
    if found is not None and found.token == token:
        return  # the answer to our put was lost, the store tried again by itself and met its own
    who = (
        "another process" if found is None else f"process {found.pid} on {found.host} since {time.ctime(found.started)}"
    )
    raise Locked(f"a gc by {who} holds the lock", hint="if it is surely dead: kvist gc --break-lock")


def release(store: Store, held: Witness) -> None:
    """Withdraw the announcement, unless somebody broke the lock and holds it now."""
    try:
        with contextlib.suppress(Locked):
            found = holder(store)
            if found is not None and found.token == held.token:
                store.delete([KEY])
        witness.remove(held.token)
    finally:
        held.close()


def _encode(condemned: Condemned, token: str) -> bytes:
    document: dict[str, Any] = {name: sorted(getattr(condemned, name)) for name in _LISTS}
    us = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "token": token}
    return record.encode(KEY, document | us)
