"""Where pages are, tier by tier: what each holds and what flows through it, for the page and for metrics.

Knows an engine's counters, a repository's tiers and the recorders' contract. Must not know HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

from kvist.repo import Repository
from kvist.store.wrap import READS, WRITES
from kvist.telemetry import Recorder

if TYPE_CHECKING:
    from kvist.cartridge.room import ResidencyMetrics
    from kvist.engines.hf import AnyEngine

WINDOW_S: Final = 60
"""Seconds over which a flow is averaged."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tier.

    Attributes:
        kind: ``"held"``, ``"cached"``, ``"pinned"``, ``"free"``: what colour it has.
        name: for people.
        amount: in the tier's unit.
        means: what is counted.
    """

    kind: str
    name: str
    amount: int
    means: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A number beside a tier.

    Attributes:
        name: for people.
        amount: in ``unit``.
        unit: ``""``: a count; ``"B"``: bytes; ``"B/s"``.
        means: what is counted.
    """

    name: str
    amount: float
    unit: str
    means: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One tier, as it is now.

    Attributes:
        name: for people.
        means: what it is.
        unit: of the parts: ``"B"``, or what is counted.
        parts: what fills it; together its capacity, where it has one.
        facts: what went through it since the server started.
        trouble: what is wrong with it; ``""``: nothing.
    """

    name: str
    means: str
    unit: str = ""
    parts: tuple[Part, ...] = ()
    facts: tuple[Fact, ...] = ()
    trouble: str = ""

    @property
    def capacity(self) -> int:
        """Of all parts together."""
        return sum(part.amount for part in self.parts)


class Flow(Recorder):
    """Bytes that went to and from the store in the last `WINDOW_S` seconds. Thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._began = clock()
        self._seconds: deque[list[int]] = deque()  # [second, bytes read, bytes written]

    def store_call(self, call: str, seconds: float, *, nbytes: int, error: str | None) -> None:
        """See `Recorder.store_call`."""
        if nbytes:
            with self._lock:
                now = int(self._clock())
                self._forget(now)
                if not self._seconds or self._seconds[-1][0] != now:
                    self._seconds.append([now, 0, 0])
                self._seconds[-1][1] += nbytes if call in READS else 0
                self._seconds[-1][2] += nbytes if call in WRITES else 0

    def rates(self) -> tuple[float, float]:
        """Bytes a second, read and written."""
        with self._lock:
            self._forget(int(self._clock()))
            over = max(1.0, min(WINDOW_S, self._clock() - self._began))
            read, written = (sum(second[at] for second in self._seconds) / over for at in (1, 2))
        return read, written

    def _forget(self, now: int) -> None:
        while self._seconds and self._seconds[0][0] <= now - WINDOW_S:
            self._seconds.popleft()


def pool_tier(engine: AnyEngine) -> Tier:
    """The engine's own pool."""
    stats = engine.stats()
    pinned = stats["pages_pinned"]
    return Tier(
        name="engine pool",
        means=f"pages in the engine's memory, of {engine.layout.page_size_tokens} tokens each",
        unit="pages",
        parts=(
            Part("held", "in use", stats["pages_held"] - pinned, "pages of sequences that run or can be continued"),
            Part("pinned", "pinned", pinned, "pages that a capture or a checkout holds on to"),
            Part("cached", "cached", stats["pages_cached"], "pages kept for prompts to come; the first to be evicted"),
            Part("free", "free", stats["pages_free"], "pages that hold nothing"),
        ),
        facts=(
            Fact("running", stats["running"], "", "sequences that get tokens now"),
            Fact("waiting", stats["waiting"], "", "sequences that wait for pages"),
            Fact("resident", stats["residents"], "", "sequences that ended and can be continued"),
            Fact("evictions", stats["evictions"], "", "cached pages given up for others, since the start"),
            Fact("preemptions", stats["preemptions"], "", "times that a sequence gave way and is computed anew"),
        ),
    )


def residency_tier(metrics: ResidencyMetrics) -> Tier:
    """Cartridges in host memory."""
    room = metrics.capacity_bytes - metrics.resident_bytes - metrics.reserved_bytes
    return Tier(
        name="cartridges",
        means=f"{metrics.resident} cartridges in host memory, {metrics.in_use} of them in use",
        unit="B",
        parts=(
            Part("held", "resident", metrics.resident_bytes, "bytes of cartridges that need no load"),
            Part("pinned", "loading", metrics.reserved_bytes, "bytes that loads under way will take"),
            Part("free", "free", max(0, room), "bytes for further cartridges"),
        ),
        facts=(
            Fact("hits", metrics.hits, "", "requests whose cartridge was in memory"),
            Fact("misses", metrics.misses, "", "requests whose cartridge had to be loaded"),
            Fact("evictions", metrics.evictions, "", "cartridges given up for others"),
            Fact("loaded", metrics.bytes_loaded, "B", "bytes loaded since the start"),
        ),
    )


def page_tiers(repo: Repository) -> Iterable[Tier]:
    """The tiers between the repository and its store, the first to be asked first."""
    for stats in repo.pages.tier_stats():
        yield Tier(
            name=stats.url,
            means="a cache of pages before the store; a page that it lacks comes from below and is kept here",
            facts=(
                Fact("hits", stats.hits, "", "pages that it had"),
                Fact("misses", stats.misses, "", "pages that it had not"),
                Fact("read", stats.bytes_read, "B", "bytes that it gave"),
                Fact("written", stats.bytes_written, "B", "bytes that it was given"),
                Fact("dropped", stats.dropped, "", "pages that it did not take"),
                Fact("bad", stats.bad, "", "copies whose bytes were not the page's; they were forgotten"),
            ),
            trouble="it does not answer; pages come from below" if stats.is_down else "",
        )


def store_tier(repo: Repository, flow: Flow | None) -> Tier:
    """The store at the bottom, with what flows to and from it, where that is known."""
    means = f"by this server, mean of the last {WINDOW_S} s"
    names = ("read", "written")
    rates = () if flow is None else zip(names, flow.rates(), strict=True)
    facts = tuple(Fact(name, rate, "B/s", means) for name, rate in rates)
    return Tier(name=repo.store.url, means="where the repository lies", facts=facts)
