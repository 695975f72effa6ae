"""The `PageTier` contract: copies of pages between a `PageStore` and its store.

Knows names and bytes, and what to do when a tier fails. Must not know segments, nor what a page means.

A tier is a cache and no more. It may lose any page at any moment, may hold the wrong bytes under a name, and may be
down: a reader checks every page against its digest and has the store to fall back on. So nothing here is durable,
nothing raises because a tier is not well, and losing a tier costs time only.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self, TypeVar

from kvist.errors import StoreError
from kvist.hashing import Buffer

FIRST_PAUSE_S: Final = 1.0
LAST_PAUSE_S: Final = 60.0
"""How long a tier is left alone after it failed: first so long, then twice as long each time, at most so long."""

Clock = Callable[[], float]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TierStats:
    """What one tier did since it was opened.

    Attributes:
        url: which one.
        hits: pages that it gave.
        misses: pages that it was asked for and did not give, for whatever reason.
        bad: of the hits, those that were not the page. Each was read from further below.
        bytes_read: of the hits.
        pages_written: pages that it took, those that it had already left out.
        bytes_written: of those.
        dropped: pages that it was to get and did not, since it fell behind.
        errors: calls that failed.
        is_down: whether it is being left alone since the last one.
    """

    url: str
    hits: int = 0
    misses: int = 0
    bad: int = 0
    bytes_read: int = 0
    pages_written: int = 0
    bytes_written: int = 0
    dropped: int = 0
    errors: int = 0
    is_down: bool = False


class PageTier(ABC):
    """Pages by name, shared by whoever opens the same place. Thread-safe.

    A backend gives `url`, `_read`, `_write` and `_forget`. These raise `StoreError` when they cannot; what came of that
    is decided here: the call does nothing, one line is logged, and the tier is left alone for a while, during which it
    costs nobody a time-out. A read that fails suspends reading, a write that fails (a full disk) suspends writing.
    """

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        """Touch nothing yet. ``clock``: seconds, by which pauses are measured."""
        self._reading, self._writing = _Outage("read", clock), _Outage("written", clock)
        self._counting = threading.Lock()
        self._stats = TierStats("")

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, in the form that `open_tier` takes, without any secret."""

    def read(self, names: Sequence[str], outs: Sequence[memoryview]) -> list[bool]:
        """Fill the buffers of those pages that are here and of just that length.

        Args:
            names: digests.
            outs: as many writable, contiguous byte views.

        Returns:
            For each whether it was filled; the content of the others is undefined. Nothing vouches for the bytes.
        """
        found = self._try(self._reading, lambda: self._read(names, outs)) if names else []
        found = [False] * len(names) if found is None else found
        hits = sum(found)
        size = sum(len(out) for out, is_here in zip(outs, found, strict=True) if is_here)
        self._tally(hits=hits, misses=len(found) - hits, bytes_read=size)
        return found

    def write(self, items: Sequence[tuple[str, Buffer]]) -> None:
        """Take copies of pages, as many as it can; keeps no reference to the buffers."""
        taken = self._try(self._writing, lambda: self._write(items)) if items else []
        if taken:
            buffers = dict(items)
            size = sum(memoryview(buffers[name]).nbytes for name in taken)
            self._tally(pages_written=len(taken), bytes_written=size)

    def forget(self, names: Sequence[str]) -> None:
        """Drop copies that `read` gave and that were not the pages; those that are gone are no error."""
        if not names:
            return
        self._tally(bad=len(names))
        logger.warning("%s: %d copies are not what their names say, first %s", self.url, len(names), names[0])
        self._try(self._writing, lambda: self._forget(names))  # what stays is found wrong again

    def stats(self) -> TierStats:
        """What it did so far."""
        with self._counting:
            return replace(self._stats, url=self.url, is_down=self._reading.is_on or self._writing.is_on)

    def close(self) -> None:
        """Release connections and handles. Idempotent."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    # -- of a backend --------------------------------------------------------------------------------------------

    @abstractmethod
    def _read(self, names: Sequence[str], outs: Sequence[memoryview]) -> list[bool]:
        """As `read`, of at least one name.

        Raises:
            StoreError: the tier cannot be asked. A page that alone cannot be had is a miss.
        """

    @abstractmethod
    def _write(self, items: Sequence[tuple[str, Buffer]]) -> list[str]:
        """Store pages, of at least one item; the names of those that were not here before.

        Raises:
            StoreError: the tier takes nothing now. Those before may be stored.
        """

    @abstractmethod
    def _forget(self, names: Sequence[str]) -> None:
        """Drop pages.

        Raises:
            StoreError: it cannot be done now.
        """

    # -- failing -------------------------------------------------------------------------------------------------

    def _try(self, outage: _Outage, call: Callable[[], _T]) -> _T | None:
        if not outage.may_try():
            return None
        try:
            done = call()
        except Exception as error:  # whatever it is, the store has the pages
            self._tally(errors=1)
            if outage.begin():
                is_ours = not isinstance(error, StoreError)
                logger.warning("%s is not %s for now: %s", self.url, outage.verb, error, exc_info=is_ours)
            return None
        if outage.end():
            logger.info("%s is %s again", self.url, outage.verb)
        return done

    def _tally(self, **more: int) -> None:
        with self._counting:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})


class _Outage:
    """When something that failed may be tried again. Thread-safe.

    Attributes:
        verb: what is suspended, as a participle.
    """

    def __init__(self, verb: str, clock: Clock) -> None:
        self.verb: Final = verb
        self._clock = clock
        self._lock = threading.Lock()
        self._pause = self._until = 0.0
        self._is_probed = False

    @property
    def is_on(self) -> bool:
        """Whether the last try failed."""
        return self._pause > 0

    def may_try(self) -> bool:
        """Whether to try now; when a pause has passed, one caller finds out for all."""
        with self._lock:
            if self._pause:
                if self._clock() < self._until:
                    return False
                self._until = self._clock() + self._pause
                self._is_probed = True
            return True

    def begin(self) -> bool:
        """It failed; whether it had not before. Those that were under way when it began make no pause longer."""
        with self._lock:
            is_first = not self._pause
            if is_first or self._is_probed:
                self._pause = FIRST_PAUSE_S if is_first else min(2 * self._pause, LAST_PAUSE_S)
                self._until = self._clock() + self._pause
                self._is_probed = False
            return is_first

    def end(self) -> bool:
        """It went well; whether it had not before."""
        with self._lock:
            was_on = self._pause > 0
            self._pause, self._is_probed = 0.0, False
            return was_on
