"""A keeper: one lease on whatever a live engine has, renewed in the background for as long as the engine lives.

Knows leases and a thread. Must not know engines: what is to be held is asked of a function of its owner, which it does
not keep alive.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

from kvist.errors import KvistError
from kvist.repo import lease
from kvist.repo.objects import snapshot_key
from kvist.repo.repository import Repository

_RETRY_S: Final = 10.0
_END_S: Final = 10.0
"""Seconds that `Keeper.close` waits for a call to a store that may be out of reach."""

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Keeper(Generic[_T]):
    """Holds what ``wanted`` says, from the first `nudge` on until `close`, or until its owner is gone. Thread-safe.

    A store that is out of reach, or that takes no writes, is told of once, and tried again: the engine goes on.
    """

    def __init__(
        self,
        repo: Repository,
        owner: _T,
        wanted: Callable[[_T], Iterable[str]],
        *,
        holder: str | None = None,
        ttl: float = lease.TTL,
    ) -> None:
        """
        Args:
            repo: where; must stay open until `close`.
            owner: whose it is.
            wanted: by the owner, the cids of the snapshots to hold; called in the keeper's thread. Those not stored are
                left out.
            holder: who, for people.
            ttl: seconds that the lease outlives a process that dies; it is renewed every third of that.
        """
        self._repo, self._wanted, self._holder, self._ttl = repo, wanted, holder, ttl
        self._changed = changed = threading.Event()
        self._owner = weakref.ref(owner, lambda _: changed.set())
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._lease: lease.Lease | None = None
        self._is_closed = False
        self._is_failing = False

    def nudge(self) -> None:
        """What is wanted has changed: hold it soon. Does not wait."""
        self._changed.set()
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._is_closed:
                    atexit.register(self.close)
                    self._thread = threading.Thread(target=self._run, name="kvist-keeper", daemon=True)
                    self._thread.start()

    def close(self) -> None:
        """Release the lease and end the thread. Idempotent."""
        with self._lock:
            self._is_closed = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._is_closed:
            self._changed.wait(min(self._ttl / 3, _RETRY_S) if self._is_failing else self._ttl / 3)
            self._changed.clear()
            owner = self._owner()
            if owner is None:
                self._is_closed = True
            elif not self._is_closed:
                self._hold(owner)
            del owner
        if self._lease is not None:
            self._lease.release()
        atexit.unregister(self.close)

    def _hold(self, owner: _T) -> None:
        try:
            self._hold_all(set(self._wanted(owner)))
            self._is_failing = False
        except Exception as error:  # whatever it is, the engine goes on, and so does the keeper
            expected = isinstance(error, KvistError)
            if not self._is_failing or not expected:
                logger.warning("what the engine holds is not protected from a gc now: %s", error, exc_info=not expected)
            self._is_failing = True

    def _hold_all(self, wanted: set[str]) -> None:
        stored = {cid for cid in wanted if self._repo.objects.has(snapshot_key(cid))}
        if self._lease is not None:
            for cid in (self._lease.cids & wanted) - stored:
                logger.warning("snapshot %s, which the engine holds, is gone", cid)
        if stored:
            if self._lease is None:
                self._lease = lease.hold(self._repo, holder=self._holder, ttl=self._ttl)
            self._lease.renew(stored)
        elif self._lease is not None:
            self._lease.release()
            self._lease = None
