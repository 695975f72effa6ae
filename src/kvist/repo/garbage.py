"""Garbage: what neither a ref nor a lease reaches, and what was pruned. Finds it, and changes nothing.

Knows reachability and age. Must not know how it is deleted: that, and the protocol with concurrent writers, is
`kvist.repo.gc`'s.
"""

from __future__ import annotations

import collections
import logging
import math
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from kvist.errors import NotFound
from kvist.repo import fsck, lease, lineage, lock, marks
from kvist.repo.repository import Repository
from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.repo.segment import Segment
from kvist.repo.snapshot import Snapshot
from kvist.store import ObjectInfo

logger = logging.getLogger(__name__)

REPACK_BELOW: Final = 0.5
"""A segment with a smaller part of live bytes is rewritten."""


# -- what there is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What there was when a survey began. What came later is none of its business.

    Attributes:
        leases: those that hold, and those that did.
        before: seconds since the epoch: what was written later stays.
        announced: what a plan had found dead; ``None``: nothing was planned yet.
        snapshots, manifests: by cid.
    """

    leases: lease.Leases
    before: float
    announced: lock.Condemned | None
    snapshots: dict[str, ObjectInfo]
    manifests: dict[str, ObjectInfo]

    def may_go(self, info: ObjectInfo) -> bool:
        """Whether an object is old enough, and was planned to go.

        What was not planned counts as alive, with all that it needs: a writer may be about to name it, and what stays
        in the store must stay whole.
        """
        return info.modified <= self.before and (self.announced is None or info.key in self.announced.objects)

    def may_empty(self, key: str, modified: float) -> bool:
        """The same of a segment, with all its pages."""
        return modified <= self.before and (self.announced is None or key in self.announced.segments)

    def may_repack(self, segment: Segment) -> bool:
        """The same of a segment out of which pages are copied.

        One announced as such stays so even if it has died since: writers may rely on its other pages.
        """
        return segment.modified <= self.before and (self.announced is None or segment.key in self.announced.repacked)


def what_there_is(repo: Repository, min_age: float, announced: lock.Condemned | None) -> Stored:
    """Begin a survey.

    Args:
        repo: where.
        min_age: seconds for which whatever was written stays.
        announced: see `Stored`.

    Raises:
        Locked: a lease is unreadable: nobody can tell what it holds.
    """
    leases = lease.read(repo.store)
    leases.require_readable()
    # what was written at the very moment in which a lease began is the lease's
    before = min(time.time() - min_age, math.nextafter(leases.since, 0.0))
    return Stored(leases, before, announced, dict(repo.objects.snapshots()), dict(repo.objects.manifests()))


# -- what lives --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Living:
    """What stays.

    Attributes:
        snapshots: by cid.
        manifests: cids; some may not be stored.
        pages: digests of all pages that they name.
    """

    snapshots: dict[str, Snapshot]
    manifests: set[str]
    pages: set[str]


def what_lives(repo: Repository, stored: Stored) -> Living:
    """What refs and leases reach, and what may not go, with all that it needs; of what was pruned only the record."""
    pruned = marks.pruned(repo.store)
    named = {ref.cid for ref in repo.refs.all()} | stored.leases.cids
    young = {cid for cid, info in stored.snapshots.items() if info.modified > stored.before}
    bare = pruned.keys() - named - young

    def manifests_of(snapshots: Mapping[str, Snapshot]) -> set[str]:
        return {cid for name, snapshot in snapshots.items() if name not in bare for cid in snapshot.manifests}

    snapshots = _reach(repo, [*named, *(cid for cid, info in stored.snapshots.items() if not stored.may_go(info))])
    manifests = manifests_of(snapshots) | {cid for cid, info in stored.manifests.items() if not stored.may_go(info)}
    needed = manifests_of(_reach(repo, named))
    return Living(snapshots, manifests, _live_pages(repo, manifests & stored.manifests.keys(), needed))


def _reach(repo: Repository, tips: Iterable[str]) -> dict[str, Snapshot]:
    """Snapshots that these reach.

    What refs reach is whole, fsck has said so. Another may be damaged, or have lost a parent to a crash between two
    steps; then it protects what it can.
    """
    live: dict[str, Snapshot] = {}

    def parents(cid: str) -> tuple[str, ...]:
        try:
            live[cid] = repo.objects.snapshot(cid)
        except (NotFound, *fsck.WRONG) as error:
            logger.warning("gc cannot follow an unnamed snapshot: %s", error)
            return ()
        return live[cid].parents

    collections.deque(lineage.ancestors(tips, parents), maxlen=0)
    return live


def _live_pages(repo: Repository, manifests: Iterable[str], needed: Container[str]) -> set[str]:
    """Pages that the manifests name. One that is not ``needed`` by a ref or lease may be unreadable, and names none.

    Raises:
        IntegrityError, InvalidManifest: one that is needed has become unreadable since fsck found it whole.
    """
    live: set[str] = set()
    for cid in manifests:
        try:
            live.update(repo.objects.manifest(cid).digests)
        except (NotFound, *fsck.WRONG) as error:
            if cid in needed:
                raise
            logger.warning("gc cannot read an unnamed manifest: %s", error)
    return live


# -- what goes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Going:
    """What does not stay.

    Attributes:
        snapshots: children before parents.
        manifests: in no order.
        segments: keys of all segments that go.
        broken: those that cannot be read.
        whole: those that can be.
        repack: of these, the ones out of which pages are copied first.
        lost: digests of pages that disappear with ``repack``.
        copied: digests of live pages that are copied.
        doubled: digests of the other live pages in ``whole``: a copy lies in a segment that stays.
    """

    snapshots: list[ObjectInfo]
    manifests: list[ObjectInfo]
    segments: frozenset[str]
    broken: list[ObjectInfo]
    whole: list[Segment]
    repack: list[Segment]
    lost: frozenset[str]
    copied: list[str]
    doubled: list[str]


def what_goes(repo: Repository, stored: Stored, living: Living) -> Going:
    """All else; but of the segments only those of which little lives."""
    emptied, repack = _sparse(repo, stored, living.pages)
    broken, whole = _broken(repo, stored, living.pages), [*emptied, *repack]
    gone = frozenset([*(info.key for info in broken), *(segment.key for segment in whole)])
    moved = dict.fromkeys(name for segment in repack for name in repo.pages.names(segment))
    lost = frozenset(moved if stored.announced is None else stored.announced.pages) - living.pages
    copied = [
        name for name in moved if name not in lost and (homes := repo.pages.homes(name)) and gone.issuperset(homes)
    ]
    held = living.pages.intersection(name for segment in whole for name in repo.pages.names(segment))
    return Going(
        snapshots=[stored.snapshots[cid] for cid in _children_first(repo, stored.snapshots.keys() - living.snapshots)],
        manifests=[info for cid, info in stored.manifests.items() if cid not in living.manifests],
        segments=gone,
        broken=broken,
        whole=whole,
        repack=repack,
        lost=lost,
        copied=copied,
        doubled=sorted(held.difference(copied)),
    )


def _broken(repo: Repository, stored: Stored, live_pages: Iterable[str]) -> list[ObjectInfo]:
    """Segments that cannot be read; none while a live page lies nowhere else, as a lease's may: it may be in there."""
    broken = repo.pages.broken_segments()
    if not broken or not all(map(repo.pages.homes, live_pages)):
        return []
    return [
        info for info in repo.store.list(SEGMENTS) if info.key in broken and stored.may_empty(info.key, info.modified)
    ]


def _sparse(repo: Repository, stored: Stored, live_pages: Container[str]) -> tuple[list[Segment], list[Segment]]:
    """Segments in which no page lives, and those in which few do."""
    empty: list[Segment] = []
    repack: list[Segment] = []
    for segment in repo.pages.segments():
        used = sum(
            segment.span(entry)[1]
            for entry, name in enumerate(repo.pages.names(segment))
            if name in live_pages and repo.pages.homes(name)[:1] == [segment.key]
        )
        if not used and stored.may_empty(segment.key, segment.modified):
            empty.append(segment)
        elif used < REPACK_BELOW * segment.data_bytes and stored.may_repack(segment):
            repack.append(segment)
    return empty, repack


def _children_first(repo: Repository, cids: Iterable[str]) -> list[str]:
    """Dead snapshots in the order of their deletion."""
    readable: dict[str, Snapshot] = {}
    damaged: list[str] = []
    for cid in cids:
        try:
            readable[cid] = repo.objects.snapshot(cid)
        except (NotFound, *fsck.WRONG):
            damaged.append(cid)
    return sorted(damaged) + lineage.newest_first(readable)
