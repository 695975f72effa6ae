"""The books of a residency: what its bytes are doing, and what has happened. Knows numbers only; takes no lock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyMetrics:
    """Counters since the start, then gauges. All bytes are those that ``size_of`` said.

    Attributes:
        hits: acquired, and it was resident.
        misses: acquired, and this began a load.
        waits: acquired while it was being loaded for somebody else.
        loads: loads that ended well, those of prefetches too.
        failures: loads that failed.
        refusals: loads that found no room.
        evictions: how many have gone.
        bytes_loaded, bytes_evicted: their bytes; the difference is ``resident_bytes``, always.
        capacity_bytes: never exceeded by ``resident_bytes + reserved_bytes``.
        resident: how many can be acquired without a load.
        resident_bytes: of those, and of those evicted by force that are still used.
        reserved_bytes: of loads under way.
        in_use: how many of the resident are leased.
        pinned: how many of the resident are pinned.
    """

    hits: int
    misses: int
    waits: int
    loads: int
    failures: int
    refusals: int
    evictions: int
    bytes_loaded: int
    bytes_evicted: int
    capacity_bytes: int
    resident: int
    resident_bytes: int
    reserved_bytes: int
    in_use: int
    pinned: int


@dataclass(slots=True)
class Room:
    """Bytes from their reservation to their release, and the counters of `ResidencyMetrics`.

    Attributes:
        capacity: of all.
        reserved: for loads under way.
        leaving: evicted, and not released yet.
    """

    capacity: int
    reserved: int = 0
    leaving: int = 0
    hits: int = 0
    misses: int = 0
    waits: int = 0
    loads: int = 0
    failures: int = 0
    refusals: int = 0
    evictions: int = 0
    bytes_loaded: int = 0
    bytes_evicted: int = 0

    @property
    def resident(self) -> int:
        """Bytes that are loaded and not evicted."""
        return self.bytes_loaded - self.bytes_evicted

    @property
    def free(self) -> int:
        """Bytes that nothing takes. Negative while what was evicted for a reservation is still being released."""
        return self.capacity - self.resident - self.reserved - self.leaving

    def load(self, size: int) -> None:
        """What was reserved is resident."""
        self.reserved -= size
        self.loads += 1
        self.bytes_loaded += size

    def evict(self, size: int) -> None:
        """What was resident is leaving."""
        self.evictions += 1
        self.bytes_evicted += size
        self.leaving += size

    def metrics(self, *, resident: int, in_use: int, pinned: int) -> ResidencyMetrics:
        """All of it, with the gauges that count cartridges."""
        return ResidencyMetrics(
            hits=self.hits,
            misses=self.misses,
            waits=self.waits,
            loads=self.loads,
            failures=self.failures,
            refusals=self.refusals,
            evictions=self.evictions,
            bytes_loaded=self.bytes_loaded,
            bytes_evicted=self.bytes_evicted,
            capacity_bytes=self.capacity,
            resident=resident,
            resident_bytes=self.resident,
            reserved_bytes=self.reserved,
            in_use=in_use,
            pinned=pinned,
        )
