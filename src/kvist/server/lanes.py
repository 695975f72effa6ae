"""Threads for requests, so that those who wait for a cartridge hold up nobody else. Must not know HTTP or engines."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread

_T = TypeVar("_T")
_PLAIN: Final = 16
_SLOW: Final = 64
_SLOW_OF_ONE: Final = 8
"""One cartridge is fetched, converted or loaded once, however many wait for it; more threads would only wait too."""


class Lanes:
    """Where work of requests is done: one lane for plain ones, and one for each cartridge."""

    def __init__(self) -> None:
        self._plain, self._slow = CapacityLimiter(_PLAIN), CapacityLimiter(_SLOW)
        self._of_one: WeakValueDictionary[Hashable, CapacityLimiter] = WeakValueDictionary()

    async def run(self, work: Callable[[], _T], lane: Hashable | None) -> _T:
        """What ``work`` returns or raises.

        Args:
            work: may block.
            lane: what it may have to wait for long; ``None``: nothing.
        """
        if lane is None:
            return await to_thread.run_sync(work, limiter=self._plain)
        limiter = self._of_one.get(lane)
        if limiter is None:
            limiter = self._of_one[lane] = CapacityLimiter(_SLOW_OF_ONE)
        async with limiter:
            return await to_thread.run_sync(work, limiter=self._slow)
