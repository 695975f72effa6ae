"""Gauges of what a server has: its repository, its tiers, its engine. Read at a scrape; none of them lists a store.

Knows counters and readings; must not know Prometheus, but for what `kvist.server.metrics.Sample` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from kvist.repo import Repository
from kvist.repo.stats import Stats
from kvist.server.aged import Aged
from kvist.server.metrics import Metrics, Sample

if TYPE_CHECKING:
    from kvist.engines.hf import Engine

_REPOSITORY: Final = {
    "snapshots": "Snapshots stored.",
    "unreachable_snapshots": "Snapshots that no ref reaches.",
    "pruned_snapshots": "Snapshots of which only the record is kept.",
    "leases": "Leases that hold.",
    "stored_bytes": "Bytes of everything in the store.",
    "page_bytes": "Bytes of distinct pages that refs reach.",
    "logical_bytes": "Bytes of pages that refs reach, as if each snapshot had its own.",
    "tokens": "Tokens of all snapshots that refs reach.",
    "segments": "Segments stored.",
    "damaged_pages": "Page copies known to be damaged.",
}
"""Fields of `kvist.repo.stats.Stats`."""
_TIER: Final = {
    "hits": "Pages that the tier had.",
    "misses": "Pages that it had not.",
    "bytes_read": "Bytes that it gave.",
    "bytes_written": "Bytes that it was given.",
    "pages_written": "Pages that it was given.",
    "dropped": "Pages that it did not take.",
    "bad": "Copies in it whose bytes were not the page's.",
    "errors": "Calls of it that failed.",
}
"""Fields of a tier's statistics."""
_ENGINE: Final = {
    "running": ("kvist_engine_running", "Sequences that get tokens."),
    "waiting": ("kvist_engine_waiting", "Sequences that wait."),
    "residents": ("kvist_engine_resident", "Sequences that ended and can be continued."),
    "evictions": ("kvist_pool_evictions_total", "Cached pages given up for others."),
    "preemptions": ("kvist_engine_preemptions_total", "Times that a sequence gave way and is computed anew."),
    "steps": ("kvist_engine_steps_total", "Steps of the engine."),
}
"""Fields of `kvist.engines.hf.Engine.stats`."""
_RESIDENCY: Final = {
    "hits": "Requests whose cartridge was in host memory.",
    "misses": "Requests whose cartridge had to be loaded.",
    "waits": "Requests that waited for another one's load of their cartridge.",
    "loads": "Cartridges loaded into host memory.",
    "failures": "Loads into host memory that failed.",
    "refusals": "Loads that found no room.",
    "evictions": "Cartridges that went out of host memory.",
    "bytes_loaded": "Bytes loaded into host memory.",
    "bytes_evicted": "Bytes that went out of host memory.",
    "capacity_bytes": "Bytes of host memory that there are for cartridges.",
    "resident": "Cartridges in host memory.",
    "resident_bytes": "Bytes of cartridges in host memory.",
    "reserved_bytes": "Bytes that loads under way will take.",
    "in_use": "Cartridges in host memory that requests use.",
    "pinned": "Cartridges in host memory that are kept although nobody uses them.",
}
"""Fields of `kvist.cartridge.room.ResidencyMetrics`."""
_LEVELS: Final = frozenset({"capacity_bytes", "resident", "resident_bytes", "reserved_bytes", "in_use", "pinned"})


def watch_repository(metrics: Metrics, repo: Repository, space: Aged[Stats]) -> None:
    """Show what a repository holds, as old as ``space`` is, and what its tiers did."""

    def read() -> Iterator[Sample]:
        reading = space.peek()
        if reading is not None and reading.value is not None:
            yield from _repository(reading.value)
            yield Sample("kvist_repository_age_seconds", "Seconds since these figures were counted.", reading.age_s)
        for tier in repo.pages.tier_stats():
            labels = {"tier": tier.url}
            for name, text in _TIER.items():
                yield Sample(f"kvist_tier_{name}_total", text, getattr(tier, name), labels)
            yield Sample("kvist_tier_up", "1: it answers; 0: it is down.", float(not tier.is_down), labels)

    metrics.gauges(read)


def _repository(stats: Stats) -> Iterator[Sample]:
    for name, text in _REPOSITORY.items():
        yield Sample(f"kvist_repository_{name}", text, getattr(stats, name))
    for kind, number in (("branch", stats.branches), ("tag", stats.tags)):
        yield Sample("kvist_repository_refs", "Branches and tags.", number, {"kind": kind})
    yield Sample("kvist_repository_garbage_bytes", "Bytes that a gc would free.", stats.garbage_bytes or 0)
    is_whole = stats.garbage_bytes is not None
    yield Sample("kvist_repository_whole", "1: a gc would work; 0: fsck has a finding.", float(is_whole))


def watch_engine(metrics: Metrics, engine: Engine) -> None:
    """Show what an engine's pool holds, and its cartridges."""

    def read() -> Iterator[Sample]:
        stats = engine.stats()
        pages = {
            "held": stats["pages_held"] - stats["pages_pinned"],
            "pinned": stats["pages_pinned"],
            "cached": stats["pages_cached"],
            "free": stats["pages_free"],
        }
        for state, number in pages.items():
            yield Sample("kvist_pool_pages", "Pages of the engine's pool, by state.", number, {"state": state})
        for field, (name, text) in _ENGINE.items():
            yield Sample(name, text, stats[field])
        residency = dataclasses.asdict(engine.cartridges.metrics())
        for field, text in _RESIDENCY.items():
            yield Sample(f"kvist_cartridge_{field}{'' if field in _LEVELS else '_total'}", text, residency[field])

    metrics.gauges(read)
