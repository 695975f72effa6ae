"""Links between tiers, and their clock. Each shares its bandwidth equally among the transfers that are on it.

Knows bytes and time; must not know what is moved, or why. A `Network` is the clock of all links that can affect each
other: those of one worker, or of all workers of a simulation where some links are shared.

Results are exact and do not depend on how often `Network.advance` is called: a link's figures change only where a
transfer begins or ends. Beginning and ending one costs O(log n); `Network.deadline` is O(1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from kvist.errors import Conflict, InvalidInput

_BYTES_PER_MS = 1e6  # of a link of 1 GB/s


class Network:
    """Links, and the one clock that moves them. Time is in milliseconds and never goes back.

    Attributes:
        now: how far the links have come. What begins between two calls of `advance` begins now; inside a transfer's
            callback it is the moment at which that transfer ended.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._agenda: list[tuple[float, int, Link]] = []  # the earliest first; holds times that no longer stand
        self._links = 0
        self._advancing = False

    def link(self, gb_per_s: float, *, latency_ms: float = 0.0) -> Link:
        """A new link.

        Args:
            gb_per_s: 10**9 bytes a second for all transfers together. ``math.inf``: a transfer ends at the `advance`
                that follows its start, whatever its size.
            latency_ms: how long after its last byte was sent a transfer ends. It takes no bandwidth.

        Raises:
            InvalidInput: a bandwidth that is not above 0, or a latency that is negative or not finite.
        """
        if not gb_per_s > 0:
            raise InvalidInput(f"a link's gb_per_s must be above 0, not {gb_per_s}")
        if not 0 <= latency_ms < math.inf:
            raise InvalidInput(f"a link's latency_ms must be 0 or more, not {latency_ms}")
        self._links += 1
        return Link(self, self._links, gb_per_s * _BYTES_PER_MS, latency_ms)

    def deadline(self) -> float | None:
        """When the next transfer ends if none begins before; ``None`` if there is none."""
        agenda = self._agenda
        while agenda and agenda[0][2]._wake != agenda[0][0]:
            heappop(agenda)
        return agenda[0][0] if agenda else None

    def advance(self, now: float) -> None:
        """Let time pass, and call back each transfer that ends, in the order in which they end.

        Equal times go by the age of the link, and on one link by that of the transfer. A callback may begin transfers;
        those that end by ``now`` are called back too. An error of a callback reaches the caller: that transfer is over,
        and the next call goes on with what follows.

        Raises:
            InvalidInput: ``now`` is before the time that was reached, or not finite.
            Conflict: called from a callback.
        """
        if not self.now <= now < math.inf:
            raise InvalidInput(f"time goes on from {self.now} ms, not to {now} ms")
        if self._advancing:
            raise Conflict("time advances already; a callback cannot advance it")
        agenda = self._agenda
        self._advancing = True
        try:
            while agenda and agenda[0][0] <= now:
                at, _, link = heappop(agenda)
                if link._wake == at:
                    self.now = at
                    link._end_one()
            self.now = now
        finally:
            self._advancing = False

    def _wake_at(self, link: Link, number: int, at: float) -> None:
        heappush(self._agenda, (at, number, link))


class Link:
    """A way for bytes in one direction. Made by `Network.link`.

    Attributes:
        network: its clock.
        started_bytes: of all transfers that began.
        ended_bytes: of all that ended.
    """

    __slots__ = (
        "_latency",
        "_number",
        "_rate",
        "_sending",
        "_sent",
        "_served",
        "_since",
        "_transfers",
        "_wake",
        "ended_bytes",
        "network",
        "started_bytes",
    )

    def __init__(self, network: Network, number: int, rate: float, latency: float) -> None:
        self.started_bytes = 0
        self.ended_bytes = 0
        self.network = network
        self._number = number
        self._rate = rate  # bytes a millisecond
        self._latency = latency
        # Each transfer gets as many bytes as each other: one figure tells how many that are, and a transfer ends when
        # the figure has grown by its size.
        self._served = 0.0
        self._since = 0.0  # when it was that much
        self._sending: list[tuple[float, int, int, Callable[[], None]]] = []  # heap of (served at its end, number, ...)
        self._sent: deque[tuple[float, int, Callable[[], None]]] = deque()  # past their last byte: (end, bytes, ...)
        self._transfers = 0
        self._wake = math.inf

    @property
    def active(self) -> int:
        """How many transfers are on it."""
        return len(self._sending) + len(self._sent)

    def start(self, nbytes: int, done: Callable[[], None]) -> None:
        """Begin a transfer, at the network's time.

        Args:
            nbytes: how much; 0 ends at once, as far as the others let it.
            done: called when it ends, in `Network.advance`.

        Raises:
            InvalidInput: ``nbytes`` is negative.
        """
        if nbytes < 0:
            raise InvalidInput(f"a transfer has 0 bytes or more, not {nbytes}")
        now = self.network.now
        self._settle(now)
        if self._sending:
            self._served += (now - self._since) * self._rate / len(self._sending)
        else:
            self._served = 0.0
        self._since = now
        heappush(self._sending, (self._served + nbytes, self._transfers, nbytes, done))
        self._transfers += 1
        self.started_bytes += nbytes
        self._plan()

    def _end_one(self) -> None:
        self._settle(self.network.now)
        _, nbytes, done = self._sent.popleft()
        self.ended_bytes += nbytes
        self._wake = math.inf  # its entry in the agenda is used up
        self._plan()
        done()

    def _settle(self, now: float) -> None:
        """Move on what has sent its last byte by ``now``."""
        while self._sending and (at := self._next_sent()) <= now:
            self._served, _, nbytes, done = heappop(self._sending)
            self._since = at
            self._sent.append((at + self._latency, nbytes, done))

    def _next_sent(self) -> float:
        missing = max(0.0, self._sending[0][0] - self._served)
        return self._since + missing * len(self._sending) / self._rate

    def _plan(self) -> None:
        if self._sent:
            wake = self._sent[0][0]
        elif self._sending:
            wake = self._next_sent() + self._latency
        else:
            wake = math.inf
        if wake != self._wake:
            self._wake = wake
            if wake < math.inf:
                self.network._wake_at(self, self._number, wake)
