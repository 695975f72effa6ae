"""The gc lock: which objects a running gc is about to delete. Knows its record, not how a gc chooses.

Writers take no lock. A writer *publishes, then looks*: it makes its snapshot reachable, then reads this record. A gc
*announces, then looks*: it writes this record, then asks again what is reachable, and deletes only what still is not.
Whichever came second sees the other, so no page that a published snapshot needs is deleted unseen; no clock is
involved (docs/adr/0006).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from kvist.errors import AlreadyExists, Conflict, InvalidManifest, Locked, NotFound
from kvist.repo.manifest import canonical_json, parse_json
from kvist.store import Match, Store

KEY: Final = "locks/gc"


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
        """Whether it surely is: a process of this host that is gone."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


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
        lists = {name: frozenset(record[name]) for name in ("objects", "segments", "repacked", "pages")}
        return Holder(record["host"], record["pid"], record["started"], info.etag, Condemned(**lists))
    except NotFound:
        return None
    except (InvalidManifest, KeyError, TypeError) as error:
        raise Locked(f"the gc lock {KEY} is unreadable: {error}", hint="kvist gc --break-lock") from None


def acquire(store: Store, condemned: Condemned, *, break_lock: bool = False) -> None:
    """Announce a gc.

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
        store.put(KEY, data, mode="create")
        return
    except AlreadyExists:
        if break_lock:
            store.put(KEY, data)
            return
    found = holder(store)
    try:
        if found is not None and found.is_dead:
            store.put(KEY, data, mode=Match(found.etag))
            return
        if found is None:
            store.put(KEY, data, mode="create")
            return
    except (Conflict, AlreadyExists):
        found = holder(store)
    who = (
        "another process" if found is None else f"process {found.pid} on {found.host} since {time.ctime(found.started)}"
    )
    raise Locked(f"a gc by {who} holds the lock", hint="if it is surely dead: kvist gc --break-lock")


def release(store: Store) -> None:
    """Withdraw the announcement."""
    store.delete([KEY])


def _encode(condemned: Condemned) -> bytes:
    record: dict[str, Any] = {
        name: sorted(getattr(condemned, name)) for name in ("objects", "segments", "repacked", "pages")
    }
    return canonical_json(record | {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()})
