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
from pathlib import Path
from typing import Any, Final

from kvist.errors import AlreadyExists, Conflict, IntegrityError, InvalidManifest, Locked, NotFound
from kvist.repo.manifest import canonical_json, parse_json
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
    etag: str
    condemned: Condemned = field(default_factory=Condemned)

    @property
    def is_dead(self) -> bool:
        """Whether it surely is: a process of this host, and of the same process numbering, that is gone."""
        if self.host != _host():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _host() -> str:
    """Whose process numbers ours are: containers of one pod share a host name, and each counts from 1."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


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
        return None
    try:
        record = parse_json(store.get(KEY), KEY)
        lists = {name: frozenset(record[name]) for name in _LISTS}
        found = Holder(record["host"], record["pid"], record["started"], info.etag, Condemned(**lists))
        if not (isinstance(found.host, str) and type(found.pid) is int and 0 < found.pid < 2**31):
            raise InvalidManifest(f"{KEY}: expected a host and a process, got {found.host!r:.80} and {found.pid!r:.80}")
        time.ctime(found.started)
        return found
    except NotFound:
        return None
    except (IntegrityError, InvalidManifest, KeyError, TypeError, ValueError, OverflowError) as error:
        raise Locked(f"the gc lock {KEY} is unreadable: {error}", hint="kvist gc --break-lock") from None


def acquire(store: Store, condemned: Condemned, *, break_lock: bool = False) -> str:
    """Announce a gc; returns the record's etag, for `release`.

    A lock whose holder is a dead process of this host is taken over.

    Args:
        store: of the repository.
        condemned: what this gc may delete.
        break_lock: take the lock whoever holds it, even unreadably.

    Raises:
        Locked: another gc runs, or died on another host.
    """
    data = _encode(condemned)
    try:
        return store.put(KEY, data, mode="create")
    except AlreadyExists:
        if break_lock:
            return store.put(KEY, data)
    found = holder(store)
    try:
        if found is not None and found.is_dead:
            return store.put(KEY, data, mode=Match(found.etag))
        if found is None:
            return store.put(KEY, data, mode="create")
    except (Conflict, AlreadyExists):
        found = holder(store)
    who = (
        "another process" if found is None else f"process {found.pid} on {found.host} since {time.ctime(found.started)}"
    )
    raise Locked(f"a gc by {who} holds the lock", hint="if it is surely dead: kvist gc --break-lock")


def release(store: Store, etag: str) -> None:
    """Withdraw the announcement, unless somebody broke the lock and holds it now."""
    info = store.head(KEY)
    if info is not None and info.etag == etag:
        store.delete([KEY])


def _encode(condemned: Condemned) -> bytes:
    record: dict[str, Any] = {name: sorted(getattr(condemned, name)) for name in _LISTS}
    return canonical_json(record | {"host": _host(), "pid": os.getpid(), "started": time.time()})
