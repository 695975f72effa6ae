"""Leases: what must stay though no ref reaches it, for as long as its holder lives and says so.

Knows their records and the holders' half of the protocol in `kvist.repo.lock`: a holder publishes its lease, then
looks whether a gc is deleting what it asked for; a gc announces, then reads the leases. So clocks decide nothing but
when a lease of a holder that is gone may be forgotten, and that generously. Must not know who holds leases, or why.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from kvist.errors import Conflict, IntegrityError, InvalidInput, InvalidManifest, Locked, NotFound, StoreError
from kvist.ids import parse_cid
from kvist.repo import lock, record
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.repo.repository import Repository
from kvist.store import Store

PREFIX: Final = "leases/"
TTL: Final = 900.0
"""Seconds for which a lease holds unless it is renewed."""
TTL_MAX: Final = 86400.0
"""Longest such time. A lease that nobody can read counts for so long."""
CLOCK_SLACK: Final = 300.0
"""Seconds by which two machines' clocks may differ: a lease holds for so much longer than it says."""
_KIND: Final = "kvist-lease"
_HOLDER_MAX: Final = 200

logger = logging.getLogger(__name__)


# -- records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A lease as it lies in the store.

    Attributes:
        key: where.
        etag: of the record, which a renewal changes.
        cids: snapshots that stay, with all they descend from, ascending.
        since: seconds since the epoch by the store's clock: what was written then or later stays; ``None``: nothing
            stays for its age.
        expires: seconds since the epoch by the holder's clock.
        holder: who, for people.
    """

    key: str
    etag: str
    cids: tuple[str, ...]
    since: float | None
    expires: float
    holder: str

    def encode(self) -> bytes:
        """The canonical bytes."""
        return record.encode(
            self.key,
            {
                "kind": _KIND,
                "version": 1,
                "cids": self.cids,
                "since": self.since,
                "expires": self.expires,
                "holder": self.holder,
            },
        )

    @classmethod
    def decode(cls, key: str, etag: str, data: bytes) -> Self:
        """Read a record.

        Raises:
            InvalidManifest: anything but the canonical bytes of a valid one.
        """
        document = record.decode(key, data)
        try:
            cids = tuple(parse_cid(cid) for cid in document["cids"])
            found = cls(key, etag, cids, document["since"], document["expires"], document["holder"])
            times = [found.expires] if found.since is None else [found.expires, found.since]
            if not all(type(seconds) is float and math.isfinite(seconds) for seconds in times):
                raise InvalidManifest(f"{key}: expected times in seconds, got {times!r:.200}")
            if not isinstance(found.holder, str) or data != found.encode():
                raise InvalidManifest(f"{key}: expected a version 1 lease, got {document!r:.200}")
        except (InvalidInput, KeyError, TypeError, ValueError) as error:
            raise InvalidManifest(f"{key} is no lease: {error}") from None
        return found


@dataclass(frozen=True, slots=True)
class Leases:
    """All leases of a repository at one moment.

    Attributes:
        live: those that hold.
        expired: those that do not any more.
        unreadable: key and reason of those that may hold anything: their record is damaged.
    """

    live: tuple[LeaseRecord, ...] = ()
    expired: tuple[LeaseRecord, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def cids(self) -> frozenset[str]:
        """Snapshots that live leases hold."""
        return frozenset(cid for lease in self.live for cid in lease.cids)

    @property
    def since(self) -> float:
        """What was written then or later stays; infinity: nothing stays for a lease."""
        return min((lease.since for lease in self.live if lease.since is not None), default=math.inf)

    def require_readable(self) -> None:
        """Raise `Locked` if one is not: nobody knows what it holds."""
        for key, why in self.unreadable:
            raise Locked(f"{key} is unreadable, and so nobody knows what it holds: {why}", hint="kvist repair")


def read(store: Store) -> Leases:
    """The leases as they are now. One that is unreadable and older than any lease may be counts as expired."""
    now = time.time()
    live: list[LeaseRecord] = []
    expired: list[LeaseRecord] = []
    unreadable: list[tuple[str, str]] = []
    for info in store.list(PREFIX):
        try:
            found = LeaseRecord.decode(info.key, info.etag, store.get(info.key))
        except NotFound:
            continue
        except (IntegrityError, InvalidManifest) as error:
            if now < info.modified + TTL_MAX + CLOCK_SLACK:
                unreadable.append((info.key, str(error)))
            else:
                expired.append(LeaseRecord(info.key, info.etag, (), None, info.modified, ""))
            continue
        (live if now < found.expires + CLOCK_SLACK else expired).append(found)
    return Leases(tuple(live), tuple(expired), tuple(unreadable))


def sweep(store: Store, expired: Iterable[LeaseRecord]) -> None:
    """Delete leases that have expired, unless they were renewed since they were read."""
    for lease in expired:
        info = store.head(lease.key)
        if info is not None and info.etag == lease.etag:
            store.delete([lease.key])


# -- holding -----------------------------------------------------------------------------------------------------


class Lease:
    """A lease that this process holds; a context manager releases it. Thread-safe. Made by `hold`."""

    def __init__(self, repo: Repository, ttl: float, holder: str) -> None:
        self._repo, self._ttl = repo, ttl
        self._record = LeaseRecord(_new_key(), "", (), None, 0.0, holder)
        self._held: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """Where its record lies."""
        return self._record.key

    @property
    def cids(self) -> frozenset[str]:
        """Snapshots that it holds."""
        return self._held

    def renew(self, cids: Iterable[str] | None = None) -> None:
        """Hold on for another ttl; with ``cids``, these instead of those before.

        One that has run out, or is gone, is taken anew under another key, if it holds no more than snapshots.

        Raises:
            Conflict: some of the snapshots are not there, or a gc is taking them: the others are held. Or the lease
                has run out, or is gone, and was to keep what was written since: that may be gone too.
        """
        with self._lock:
            wanted = self._held if cids is None else frozenset(cids)
            self._held &= wanted
            if not self._go_on(wanted):
                self._begin_anew(wanted)
            self._confirm(wanted)

    def release(self) -> None:
        """Give it up. Idempotent. If the store cannot be reached, it runs out by itself."""
        try:
            self._repo.store.delete([self.key])
        except StoreError as error:
            logger.warning("could not release %s, which will run out: %s", self.key, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self, cids: frozenset[str], since: bool) -> None:
        """Publish, then look."""
        self._write(cids)
        if since:
            info = self._repo.store.head(self.key)
            if info is None:
                raise Conflict(f"{self.key} was deleted as soon as it was written", hint="retry")
            self._record = replace(self._record, since=info.modified - CLOCK_SLACK)
            self._write(cids)
        self._confirm(cids)

    def _go_on(self, cids: frozenset[str]) -> bool:
        """Write the record anew where it lies; false: there was a time in which a gc could see no lease."""
        until = self._record.expires
        if time.time() >= until or not self._repo.objects.has(self.key):
            return False
        self._write(cids)
        return time.time() < until

    def _begin_anew(self, cids: frozenset[str]) -> None:
        """Under another key: a gc may be about to delete the old record, with all that it held."""
        self._held = frozenset()
        if self._record.since is not None:
            raise Conflict(
                f"{self.key} ran out or was deleted: what was written under it may be gone",
                hint="begin again; renew a lease before it runs out",
            )
        old, self._record = self.key, replace(self._record, key=_new_key())
        self._write(cids)
        self._repo.store.delete([old])

    def _write(self, cids: Iterable[str]) -> None:
        """Nobody else writes under our key: to do so again after an answer that was lost harms nothing."""
        new = replace(self._record, cids=tuple(sorted(cids)), expires=time.time() + self._ttl)
        self._repo.store.put(new.key, new.encode())
        self._record = new

    def _confirm(self, cids: frozenset[str]) -> None:
        """Look which of these a gc deletes, or deleted; the others are held. Raises `Conflict` if there are any."""
        new = cids - self._held
        lost = self._lost(new)
        self._held = cids.difference(lost)
        if lost:
            self._repo.objects.forget()
            raise Conflict(f"{', '.join(lost)}: a gc took or is taking it; it is not held", hint="retry")

    def _lost(self, cids: Collection[str]) -> list[str]:
        """Those that a gc deletes, or deleted, wholly or in part."""
        objects = self._repo.objects
        condemned = lock.condemned(self._repo.store).objects if cids else frozenset()
        return [
            cid
            for cid in sorted(cids)
            if (key := snapshot_key(parse_cid(cid))) in condemned
            or not objects.has(key)
            or not condemned.isdisjoint(map(manifest_key, objects.snapshot(cid).manifests))
        ]


def _new_key() -> str:
    return f"{PREFIX}{uuid.uuid4().hex}"


def hold(
    repo: Repository,
    *,
    cids: Iterable[str] = (),
    since: bool = False,
    ttl: float = TTL,
    holder: str | None = None,
) -> Lease:
    """Keep a gc from deleting, until the lease is released or runs out.

    Args:
        repo: where.
        cids: stored snapshots that stay, with all they descend from.
        since: whether all that is written from now on stays too: for whoever writes what only later gets a name.
        ttl: seconds that it holds; `Lease.renew` before.
        holder: who, for people; default this process and host.

    Raises:
        Conflict: one of the snapshots is not there, or a gc is taking it; nothing is held.
        Locked: a gc's announcement is unreadable.
        InvalidInput: a ttl that is not in (0, `TTL_MAX`], or what is no cid.
    """
    if not 0 < ttl <= TTL_MAX:
        raise InvalidInput(f"a lease holds for more than 0 and at most {TTL_MAX:g} seconds, got {ttl!r}")
    wanted = frozenset(parse_cid(cid) for cid in cids)
    who = holder if holder is not None else f"process {os.getpid()} on {socket.gethostname()}"
    lease = Lease(repo, ttl, who[:_HOLDER_MAX])
    try:
        lease._take(wanted, since)
    except BaseException:
        lease.release()
        raise
    return lease


def to_json(lease: LeaseRecord) -> dict[str, Any]:
    """A lease as a JSON-serialisable mapping."""
    return {
        "key": lease.key,
        "holder": lease.holder,
        "cids": lease.cids,
        "since": lease.since,
        "expires": lease.expires,
    }
