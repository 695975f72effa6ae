"""What is expensive to know, known a while ago: read again in the background, at a bounded rate.

Knows ages and threads; must not know what is read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from kvist.errors import KvistError

log = logging.getLogger("kvist.server")

_T = TypeVar("_T")
_SHARE: Final = 20.0
"""Reading takes at most one part in so many of the time, however long it takes."""


@dataclass(frozen=True, slots=True)
class Reading(Generic[_T]):
    """What was read.

    Attributes:
        value: ``None``: it could not be read, not even once.
        at: when that reading began, by the monotonic clock; 0.0 where there is no value.
        error: why the last try failed; ``None``: it did not.
    """

    value: _T | None
    at: float
    error: KvistError | None

    @property
    def age_s(self) -> float:
        """Seconds since ``at``."""
        return time.monotonic() - self.at


class Aged(Generic[_T]):
    """A value that is read when somebody asks for it and the last reading is too old. Thread-safe.

    Whoever asks gets what is known, and never waits for another reading, but for the first.
    """

    def __init__(self, read: Callable[[], _T], *, least_s: float) -> None:
        """
        Args:
            read: may take long, and may raise `KvistError`; runs in a thread, one at a time.
            least_s: seconds from one reading to the next; more where reading takes long.
        """
        self._read, self._least_s = read, least_s
        self._changed = threading.Condition()
        self._reading: Reading[_T] | None = None
        self._began = self._needed = self._due = 0.0  # by the monotonic clock
        self._is_running = False

    def get(self) -> Reading[_T]:
        """What is known; begins to read anew if that is due."""
        with self._changed:
            return self._wait(self._needed)

    def fresh(self) -> Reading[_T]:
        """As `get`, but what is due is waited for: for values that are quickly read."""
        with self._changed:
            now = time.monotonic()
            return self._wait(now if now >= self._due and not self._is_running else self._needed)

    def peek(self) -> Reading[_T] | None:
        """As `get`, but waits for nothing: ``None`` until the first reading has ended."""
        with self._changed:
            self._begin_if_due()
            return self._reading

    def expire(self) -> None:
        """What is known is known to be wrong: the next that asks waits for another reading."""
        with self._changed:
            self._needed, self._due = time.monotonic(), 0.0

    def _wait(self, needed: float) -> Reading[_T]:
        """The first reading that began then or later, or the one that there is."""
        self._begin_if_due()
        while self._reading is None or self._began < needed:
            self._changed.wait()
            self._begin_if_due()
        return self._reading

    def _begin_if_due(self) -> None:
        if not self._is_running and time.monotonic() >= self._due:
            self._is_running = True
            threading.Thread(target=self._run, name="kvist-reading", daemon=True).start()

    def _run(self) -> None:
        began, value, error = time.monotonic(), None, None
        try:
            value = self._read()
        except KvistError as failure:
            error = failure
        except Exception as failure:
            log.exception("something cannot be shown")
            error = KvistError(f"{type(failure).__name__}: the server's log has the traceback")
        ended = time.monotonic()
        with self._changed:
            known = self._reading
            if error is None:
                self._reading = Reading(value, began, None)
            else:
                self._reading = Reading(None, 0.0, error) if known is None else Reading(known.value, known.at, error)
            self._began, self._is_running = began, False
            is_enough = began >= self._needed
            self._due = ended + max(self._least_s, _SHARE * (ended - began)) if is_enough else 0.0
            self._changed.notify_all()
