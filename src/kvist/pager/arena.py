"""A reusable byte buffer: captures and restores need room for many pages, and fresh memory is slow to touch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Arena:
    """One buffer that grows to the largest size asked for and stays.

    `borrow` gives one user at a time the whole buffer; others wait. An engine keeps one arena for all its captures
    and restores, so that a pause never pays for page faults.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, size: int) -> Iterator[memoryview]:
        """A writable view of ``size`` bytes, content undefined, valid inside the ``with`` block."""
        with self._lock:
            if len(self._data) < size:
                self._data = bytearray(size)
            with memoryview(self._data) as whole, whole[:size] as view:
                yield view
