"""gc: deletes what no ref reaches. Plans, then applies; never deletes what it did not plan.

Knows reachability and age. The protocol with concurrent writers is in `kvist.repo.lock`.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvist.errors import IntegrityError, KvistError
from kvist.repo import fsck, lineage, lock
from kvist.repo.objects import MANIFESTS, SNAPSHOTS, manifest_key, snapshot_key
from kvist.repo.repository import Repository
from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.repo.snapshot import Snapshot

logger = logging.getLogger(__name__)

MIN_AGE: Final = 3600.0
"""Seconds for which whatever was written is kept, reachable or not."""
REPACK_BELOW: Final = 0.5
"""A segment with a smaller part of live bytes is rewritten."""


@dataclass(frozen=True)
class GcPlan:
    """What a gc would do.

    Attributes:
        snapshots: cids to delete.
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
    lock.acquire(repo.store, _condemned(planned), break_lock=break_lock)
    try:
        now = _still_dead(planned, _survey(repo, planned.min_age))
        keep = [
            name
            for segment in repo.pages.segments()
            if segment.key in now.repack
            for name in repo.pages.names(segment)
            if name not in now.lost_pages
        ]
        repo.pages.rewrite(keep, progress)
        # from the top down: a crash in between leaves no object that names a missing one
        gone_segments = [*now.segments, *now.repack]
        repo.store.delete(map(snapshot_key, now.snapshots))
        repo.store.delete(map(manifest_key, now.manifests))
        repo.store.delete(gone_segments)
        repo.pages.drop_marks(gone_segments)
        repo.store.clean(planned.min_age)
    finally:
        lock.release(repo.store)
        repo.pages.refresh()
        repo.objects.forget()
    return now


@dataclass(frozen=True)
class _Survey:
    """A plan, and the digests of all pages that were live when it was made."""

    plan: GcPlan
    live_pages: set[str]


def _survey(repo: Repository, min_age: float) -> _Survey:
    report = fsck.check(repo, read_pages=False)
    if not report.is_whole:
        first = next(finding for finding in report.findings if finding.affects)
        raise IntegrityError(
            f"gc deletes nothing while fsck has a finding: {first.code} {first.subject}: {first.detail}",
            hint="kvist fsck",
        )
    before = time.time() - min_age
    snapshots = dict(repo.objects.snapshots())
    manifests = dict(repo.objects.manifests())
    live = _live(repo, [cid for cid, info in snapshots.items() if info.modified > before])
    live_manifests = {cid for snapshot in live.values() for cid in snapshot.manifests}
    live_pages = {digest for cid in live_manifests if cid in manifests for digest in repo.objects.manifest(cid).digests}
    dead_snapshots = [info for cid, info in snapshots.items() if cid not in live and info.modified <= before]
    dead_manifests = [info for cid, info in manifests.items() if cid not in live_manifests and info.modified <= before]
    broken = repo.pages.broken_segments()
    dead = [info for info in repo.store.list(SEGMENTS) if info.key in broken and info.modified <= before]
    dead_bytes = sum(info.size for info in (*dead_snapshots, *dead_manifests, *dead))
    dead_keys = [info.key for info in dead]
    repack: list[str] = []
    lost: set[str] = set()
    copied = kept = 0
    for segment in repo.pages.segments():
        names = repo.pages.names(segment)
        used = {name for name in names if name in live_pages and repo.pages.homes(name)[:1] == [segment.key]}
        used_bytes = sum(segment.span(entry)[1] for entry, name in enumerate(names) if name in used)
        if segment.modified > before or used_bytes >= REPACK_BELOW * segment.data_bytes:
            kept += segment.data_bytes
            continue
        dead_bytes += segment.data_bytes
        if used:
            repack.append(segment.key)
            lost |= set(names) - live_pages
            copied += used_bytes
        else:
            dead_keys.append(segment.key)
    return _Survey(
        GcPlan(
            snapshots=tuple("sha256:" + info.key.removeprefix(SNAPSHOTS) for info in dead_snapshots),
            manifests=tuple("sha256:" + info.key.removeprefix(MANIFESTS) for info in dead_manifests),
            segments=tuple(dead_keys),
            repack=tuple(repack),
            lost_pages=frozenset(lost),
            delete_bytes=dead_bytes,
            copy_bytes=copied,
            kept_snapshots=len(live),
            kept_bytes=kept,
            min_age=min_age,
        ),
        live_pages,
    )


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


def _still_dead(planned: GcPlan, now: _Survey) -> GcPlan:
    """The part of a plan that a later survey confirms.

    A segment announced as rewritten stays so even if it has died since: writers may rely on its other pages.
    """
    gone = {*now.plan.segments, *now.plan.repack}
    return dataclasses.replace(
        now.plan,
        snapshots=tuple(cid for cid in planned.snapshots if cid in now.plan.snapshots),
        manifests=tuple(cid for cid in planned.manifests if cid in now.plan.manifests),
        segments=tuple(key for key in planned.segments if key in now.plan.segments),
        repack=tuple(key for key in planned.repack if key in gone),
        lost_pages=planned.lost_pages - now.live_pages,
    )
