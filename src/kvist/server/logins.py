"""Logins: browsers that gave a token, each known by a word that it keeps in a cookie. Must not know HTTP.

A browser sends a cookie to every port of a host, and a token is good for every route, perhaps for years. So the cookie
holds a word that counts for the page of this one server, until it ends. The token is kept nowhere; its digest is, here.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

LASTS_S: Final = 12 * 3600
"""Seconds that a login lasts."""
_MOST: Final = 10_000


class Logins:
    """The logins of one process; a restart ends them all. Thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # in the order in which they end

    def begin(self, digest: bytes) -> str:
        """The word for a browser that gave the token of this digest; of too many, the oldest ends."""
        word = secrets.token_urlsafe(32)
        with self._lock:
            self._known[word] = digest, self._clock() + LASTS_S
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return word

    def find(self, word: str) -> bytes | None:
        """The digest of its token; ``None``: there is no such login, or it has ended."""
        with self._lock:
            digest, end = self._known.get(word, (None, 0.0))
            return digest if self._clock() < end else None

    def end(self, word: str) -> None:
        """Let a word count no more."""
        with self._lock:
            self._known.pop(word, None)
