"""gc: deletes what no ref reaches. Plans, then applies; never deletes what it did not plan.

Knows reachability and age. The protocol with concurrent writers is in `kvist.repo.lock`.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from kvist.errors import IntegrityError, KvistError
from kvist.repo import fsck, lineage, lock, marks
from kvist.repo.objects import MANIFESTS, SNAPSHOTS, manifest_key, snapshot_key
from kvist.repo.repository import Repository
from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.repo.segment import Segment
from kvist.repo.snapshot import Snapshot
from kvist.store import ObjectInfo

logger = logging.getLogger(__name__)

MIN_AGE: Final = 3600.0
"""Seconds for which whatever was written is kept, reachable or not."""
REPACK_BELOW: Final = 0.5
"""A segment with a smaller part of live bytes is rewritten."""
_SURVEYS: Final = 3
"""How often a gc looks again because refs changed while it looked."""


@dataclass(frozen=True)
class GcPlan:
    """What a gc would do.

    Attributes:
        snapshots: cids to delete, children before parents.
        manifests: cids to delete.
        segments: keys of segments that hold no live page, or none that can be read.
        repack: keys of segments whose live pages would be copied to a new one before they are deleted.
        lost_pages: digests of pages that disappear with ``repack``.
        delete_bytes: bytes of all that would be deleted.
        copy_bytes: bytes of the pages that would be copied.
        kept_snapshots: snapshots that stay.
        kept_bytes: bytes of the segments that stay.
        min_age: seconds for which whatever was written is kept.
    """

    snapshots: tuple[str, ...]
    manifests: tuple[str, ...]
    segments: tuple[str, ...]
    repack: tuple[str, ...]
    lost_pages: frozenset[str]
    delete_bytes: int
    copy_bytes: int
    kept_snapshots: int
    kept_bytes: int
    min_age: float

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to delete."""
        return not (self.snapshots or self.manifests or self.segments or self.repack)

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return asdict(self) | {"lost_pages": len(self.lost_pages)}

    def summary(self) -> str:
        """For people."""
        return (
            f"delete {len(self.snapshots)} snapshots, {len(self.manifests)} manifests, {len(self.segments)} segments; "
            f"rewrite {len(self.repack)} segments ({self.copy_bytes:,} bytes to copy); "
            f"free {self.delete_bytes - self.copy_bytes:,} bytes, keep {self.kept_snapshots} snapshots "
            f"and {self.kept_bytes + self.copy_bytes:,} bytes of pages"
        )


def plan(repo: Repository, *, min_age: float = MIN_AGE) -> GcPlan:
    """Find what no ref reaches and nobody has just written. Changes nothing.

    Raises:
        IntegrityError: fsck finds something missing that a ref reaches. What a gc would delete might be what
            mends it.
    """
    return _survey(repo, min_age).plan


def apply(
    repo: Repository,
    planned: GcPlan,
    *,
    break_lock: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> GcPlan:
    """Delete what was planned and still nothing reaches; returns what was really deleted.

    Writers go on meanwhile. A crash leaves some of it undeleted and a lock that the next gc takes over.

    Args:
        repo: the repository that was planned for.
        planned: from `plan`.
        break_lock: take the gc lock even if its holder seems alive.
        progress: called with pages copied and pages to copy.

    Raises:
        Locked: another gc runs.
    """
    held = lock.acquire(repo.store, _condemned(planned), break_lock=break_lock)
    try:
        now = _make_ready(repo, planned, progress)
        gone = {*now.segments, *now.repack}
        # From the top down, children before parents: a crash in between leaves no object that names a missing one.
        repo.store.delete(map(snapshot_key, now.snapshots))
        repo.store.delete(map(manifest_key, now.manifests))
        repo.store.delete(gone)
        marks.drop_stale(repo.store)
        repo.store.clean(planned.min_age)
    finally:
        lock.release(repo.store, held)
        repo.pages.refresh()
        repo.objects.forget()
    return now


def _make_ready(repo: Repository, planned: GcPlan, progress: Callable[[int, int], None] | None) -> GcPlan:
    """Survey, copy what must stay, and return what may be deleted: if it can be had, by refs as they still are.

    A writer whose ref came after the survey takes it back, unless it is killed before it looks: hence the last glance
    at the refs. Where they never stand still the last survey has to do, or a busy repository would have no gc.
    """
    copied = 0
    now = planned
    for _ in range(_SURVEYS):
        seen = fsck.ref_etags(repo)
        survey = _survey(repo, planned.min_age, planned)
        now = survey.plan
        repo.pages.rewrite(survey.copied, progress)
        copied += now.copy_bytes
        # the copy that stays may be the bad one
        repo.pages.rewrite(repo.pages.verify(survey.doubled, without={*now.segments, *now.repack}))
        if fsck.ref_etags(repo) == seen:
            break
    return replace(now, copy_bytes=copied)


@dataclass(frozen=True)
class _Survey:
    """A plan, and what to do before it.

    Attributes:
        plan: what is dead.
        copied: pages to copy out of it: digests.
        doubled: live pages in it of which a copy lies elsewhere.
    """

    plan: GcPlan
    copied: list[str]
    doubled: list[str]


def _survey(repo: Repository, min_age: float, planned: GcPlan | None = None) -> _Survey:
    """What is dead now, and was already ``planned``.

    What was not planned counts as alive, with all that it needs: a writer may be about to name it, and what stays in
    the store must stay whole.
    """
    report = fsck.check(repo, read_pages=False)
    if not report.is_whole:
        first = next(finding for finding in report.findings if finding.affects)
        raise IntegrityError(
            f"gc deletes nothing while fsck has a finding: {first.code} {first.subject}: {first.detail}",
            hint="kvist fsck",
        )
    before = time.time() - min_age
    announced = None if planned is None else _condemned(planned)

    def may_go(info: ObjectInfo) -> bool:
        return info.modified <= before and (announced is None or info.key in announced.objects)

    snapshots, manifests = dict(repo.objects.snapshots()), dict(repo.objects.manifests())
    live = _live(repo, [cid for cid, info in snapshots.items() if not may_go(info)])
    live_manifests = {cid for snapshot in live.values() for cid in snapshot.manifests}
    live_manifests |= {cid for cid, info in manifests.items() if not may_go(info)}
    live_pages = _live_pages(repo, live_manifests & manifests.keys())
    dead = [snapshots[cid] for cid in _children_first(repo, snapshots.keys() - live.keys())]
    dead_manifests = [info for cid, info in manifests.items() if cid not in live_manifests]
    segments = _sort_segments(repo, before, announced, live_pages)
    moved = dict.fromkeys(name for segment in segments.repack for name in repo.pages.names(segment))
    lost = frozenset(moved if planned is None else planned.lost_pages) - live_pages
    gone_keys = {*segments.broken, *(segment.key for segment in segments.gone)}
    copied = [
        name for name in moved if name not in lost and (homes := repo.pages.homes(name)) and gone_keys.issuperset(homes)
    ]
    plan = GcPlan(
        snapshots=tuple("sha256:" + info.key.removeprefix(SNAPSHOTS) for info in dead),
        manifests=tuple("sha256:" + info.key.removeprefix(MANIFESTS) for info in dead_manifests),
        segments=tuple(sorted(gone_keys.difference(segment.key for segment in segments.repack))),
        repack=tuple(segment.key for segment in segments.repack),
        lost_pages=frozenset(lost),
        delete_bytes=sum(info.size for info in (*dead, *dead_manifests, *segments.broken.values()))
        + sum(segment.data_bytes for segment in segments.gone),
        copy_bytes=sum(repo.pages.size(digest) or 0 for digest in copied),
        kept_snapshots=len(live),
        kept_bytes=segments.kept_bytes,
        min_age=min_age,
    )
    gone = {name for segment in segments.gone for name in repo.pages.names(segment)}
    return _Survey(plan, copied, sorted((gone & live_pages).difference(copied)))


@dataclass
class _Segments:
    """What a gc does with the segments.

    Attributes:
        broken: those to delete that cannot be read, by key.
        gone: those to delete that can be.
        repack: of those, the ones whose pages are partly copied first.
        kept_bytes: bytes of the pages of all others.
    """

    broken: dict[str, ObjectInfo] = field(default_factory=dict)
    gone: list[Segment] = field(default_factory=list)
    repack: list[Segment] = field(default_factory=list)
    kept_bytes: int = 0


def _sort_segments(
    repo: Repository, before: float, announced: lock.Condemned | None, live_pages: set[str]
) -> _Segments:
    """Sort the old segments, all or those that were announced, by how much of them lives.

    One announced as rewritten stays so even if it has died since: writers may rely on its other pages.
    """
    found = _Segments()
    broken = repo.pages.broken_segments()
    for info in repo.store.list(SEGMENTS):
        if info.key in broken and info.modified <= before and (announced is None or info.key in announced.segments):
            found.broken[info.key] = info
    for segment in repo.pages.segments():
        used = sum(
            segment.span(entry)[1]
            for entry, name in enumerate(repo.pages.names(segment))
            if name in live_pages and repo.pages.homes(name)[:1] == [segment.key]
        )
        is_sparse = segment.modified <= before and used < REPACK_BELOW * segment.data_bytes
        if is_sparse and not used and (announced is None or segment.key in announced.segments):
            found.gone.append(segment)
        elif is_sparse and (announced is None or segment.key in announced.repacked):
            found.gone.append(segment)
            found.repack.append(segment)
        else:
            found.kept_bytes += segment.data_bytes
    return found


def _live_pages(repo: Repository, manifests: Iterable[str]) -> set[str]:
    live: set[str] = set()
    for cid in manifests:
        try:
            live.update(repo.objects.manifest(cid).digests)
        except KvistError as error:  # no ref reaches it: fsck has found what refs reach whole
            logger.warning("gc cannot read an unnamed manifest: %s", error)
    return live


def _children_first(repo: Repository, cids: Iterable[str]) -> list[str]:
    """Dead snapshots in the order of their deletion."""
    readable: dict[str, Snapshot] = {}
    damaged: list[str] = []
    for cid in cids:
        try:
            readable[cid] = repo.objects.snapshot(cid)
        except KvistError:
            damaged.append(cid)
    return sorted(damaged) + lineage.newest_first(readable)


def _live(repo: Repository, young: Iterable[str]) -> dict[str, Snapshot]:
    """Snapshots that refs or young snapshots reach.

    What refs reach is whole, fsck has said so. A young snapshot may be damaged, or have lost a parent to a crash
    between two steps; then it protects what it can.
    """
    live: dict[str, Snapshot] = {}

    def parents(cid: str) -> tuple[str, ...]:
        try:
            live[cid] = repo.objects.snapshot(cid)
        except KvistError as error:
            logger.warning("gc cannot follow an unnamed snapshot: %s", error)
            return ()
        return live[cid].parents

    tips = [ref.cid for ref in repo.refs.all() if ref.cid is not None]
    collections.deque(lineage.ancestors([*tips, *young], parents), maxlen=0)
    return live


def _condemned(planned: GcPlan) -> lock.Condemned:
    return lock.Condemned(
        objects=frozenset([*map(snapshot_key, planned.snapshots), *map(manifest_key, planned.manifests)]),
        segments=frozenset(planned.segments),
        repacked=frozenset(planned.repack),
        pages=planned.lost_pages,
    )
