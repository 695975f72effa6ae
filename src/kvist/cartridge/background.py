"""Work in threads of its own, for those who must not wait. Knows functions only."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Ticker:
    """Calls a function again and again in a thread of its own, from `nudge` on until `close`."""

    def __init__(self, work: Callable[[], object], every_s: float, name: str) -> None:
        """
        Args:
            work: must not raise; never called twice at a time.
            every_s: pause between two calls.
            name: of the thread.
        """
        self._work, self._every_s, self._name = work, every_s, name
        self._wanted = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def nudge(self) -> None:
        """Have one call begin soon that begins after this. Does not wait."""
        self._wanted.set()
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._is_closed:
                    self._thread = start(self._run, self._name)

    def close(self) -> None:
        """Begin no more calls, and wait for one under way, but not for ever: it may be stuck."""
        with self._lock:
            self._is_closed = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(self._every_s)

    def _run(self) -> None:
        while not self._is_closed:
            self._wanted.clear()
            self._work()
            self._wanted.wait(self._every_s)


def start(work: Callable[[], object], name: str) -> threading.Thread:
    """A thread that does ``work``; the process does not wait for it at its end."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
