"""gc: deletes what neither a ref nor a lease reaches, and what was pruned. Plans, then applies; never deletes what it
did not plan.

Knows in which order things go. What may go is found by `kvist.repo.garbage`; the protocol with concurrent writers is in
`kvist.repo.lock`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from kvist.errors import IntegrityError, StoreFull
from kvist.repo import fsck, lease, lock, marks
from kvist.repo.garbage import what_goes, what_lives, what_there_is
from kvist.repo.objects import MANIFESTS, SNAPSHOTS, manifest_key, snapshot_key
from kvist.repo.repository import Repository
from kvist.telemetry import counted

logger = logging.getLogger(__name__)

MIN_AGE: Final = 3600.0
"""Seconds for which whatever was written is kept, reachable or not."""
NOTES: Final = (marks.PRUNED, "signatures/")
"""Prefixes of what tells of one snapshot, under ``<prefix><64 hex of its cid>``, and goes when that has gone."""
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
        leases: leases that hold.
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
    leases: int
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
        leases = f"; {self.leases} leases hold" if self.leases else ""
        return (
            f"delete {len(self.snapshots)} snapshots, {len(self.manifests)} manifests, {len(self.segments)} segments; "
            f"rewrite {len(self.repack)} segments ({self.copy_bytes:,} bytes to copy); "
            f"free {self.delete_bytes - self.copy_bytes:,} bytes, keep {self.kept_snapshots} snapshots "
            f"and {self.kept_bytes + self.copy_bytes:,} bytes of pages{leases}"
        )


def plan(repo: Repository, *, min_age: float = MIN_AGE) -> GcPlan:
    """Find what neither a ref nor a lease reaches and nobody has just written. Changes nothing.

    Raises:
        IntegrityError: fsck finds something missing that a ref reaches. What a gc would delete might be what
            mends it.
        Locked: a lease is unreadable: nobody can tell what it holds.
    """
    return _survey(repo, min_age).plan


@counted("gc", lambda done: (done.delete_bytes, 0))
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
        Locked: another gc runs, or a lease is unreadable.
    """
    held = lock.acquire(repo.store, _condemned(planned), break_lock=break_lock)
    try:
        now, leftovers = _make_ready(repo, planned, progress)
        gone = {*now.segments, *now.repack}
        # From the top down, so that what is left of a snapshot after a crash has its pages. It may lack ancestors, as
        # some stores delete in any order: whoever names it looks for them (`kvist.repo.naming`).
        repo.store.delete(map(snapshot_key, now.snapshots))
        repo.store.delete(map(manifest_key, now.manifests))
        repo.store.delete(gone)
        marks.drop_stale(repo.store)
        repo.store.delete(leftovers.notes)
        lease.sweep(repo.store, leftovers.leases)
        repo.store.clean(leftovers.age)
    finally:
        lock.release(repo.store, held)
        repo.pages.refresh()
        repo.objects.forget()
    return now


def _make_ready(
    repo: Repository, planned: GcPlan, progress: Callable[[int, int], None] | None
) -> tuple[GcPlan, _Leftovers]:
    """Survey, copy what must stay, and return what may be deleted: if it can be had, by refs as they still are.

    A writer whose ref came after the survey takes it back, unless it is killed before it looks: hence the last glance
    at the refs. Where they never stand still the last survey has to do, or a busy repository would have no gc.
    """
    copied = 0
    for attempt in range(_SURVEYS):
        seen = fsck.ref_etags(repo)
        survey = _survey(repo, planned.min_age, planned)
        now = survey.plan
        try:
            repo.pages.rewrite(survey.copied, progress)
            copied += now.copy_bytes
        except StoreFull as error:
            logger.warning(
                "no room to rewrite %d segments, so only what is wholly dead goes: %s", len(now.repack), error
            )
            now = _without_repack(repo, now)
        # the copy that stays may be the bad one
        repo.pages.rewrite(repo.pages.verify(survey.doubled, without={*now.segments, *now.repack}))
        if fsck.ref_etags(repo) == seen or attempt == _SURVEYS - 1:
            return replace(now, copy_bytes=copied), survey.leftovers
    raise AssertionError("unreachable")


def _without_repack(repo: Repository, plan: GcPlan) -> GcPlan:
    """The same, but what is partly alive stays as it is: what a full store can do without being written to."""
    left = sum(segment.data_bytes for segment in repo.pages.segments() if segment.key in plan.repack)
    return replace(
        plan,
        repack=(),
        lost_pages=frozenset(),
        copy_bytes=0,
        delete_bytes=plan.delete_bytes - left,
        kept_bytes=plan.kept_bytes + left,
    )


@dataclass(frozen=True)
class _Leftovers:
    """What harms nobody and goes last.

    Attributes:
        notes: keys of marks and signatures of snapshots that are gone.
        leases: those that have expired.
        age: seconds after which what a dead writer has left goes.
    """

    notes: tuple[str, ...]
    leases: tuple[lease.LeaseRecord, ...]
    age: float


@dataclass(frozen=True)
class _Survey:
    """A plan, what to do before it, and what after it.

    Attributes:
        plan: what is dead.
        copied: pages to copy out of it: digests.
        doubled: live pages in it of which a copy lies elsewhere.
        leftovers: what goes afterwards.
    """

    plan: GcPlan
    copied: list[str]
    doubled: list[str]
    leftovers: _Leftovers


def _survey(repo: Repository, min_age: float, planned: GcPlan | None = None) -> _Survey:
    """What is dead now, and was already ``planned``."""
    report = fsck.check(repo, read_pages=False)
    if not report.is_whole:
        first = next(finding for finding in report.findings if finding.affects)
        raise IntegrityError(
            f"gc deletes nothing while fsck has a finding: {first.code} {first.subject}: {first.detail}",
            hint="kvist fsck",
        )
    stored = what_there_is(repo, min_age, None if planned is None else _condemned(planned))
    living = what_lives(repo, stored)
    going = what_goes(repo, stored, living)
    plan = GcPlan(
        snapshots=tuple("sha256:" + info.key.removeprefix(SNAPSHOTS) for info in going.snapshots),
        manifests=tuple("sha256:" + info.key.removeprefix(MANIFESTS) for info in going.manifests),
        segments=tuple(sorted(going.segments.difference(segment.key for segment in going.repack))),
        repack=tuple(segment.key for segment in going.repack),
        lost_pages=going.lost,
        delete_bytes=sum(info.size for info in (*going.snapshots, *going.manifests, *going.broken))
        + sum(segment.data_bytes for segment in going.whole),
        copy_bytes=sum(repo.pages.size(digest) or 0 for digest in going.copied),
        kept_snapshots=len(living.snapshots),
        kept_bytes=sum(segment.data_bytes for segment in repo.pages.segments() if segment.key not in going.segments),
        leases=len(stored.leases.live),
        min_age=min_age,
    )
    notes = [info.key for prefix in NOTES for info in repo.store.list(prefix) if info.modified <= stored.before]
    leftovers = _Leftovers(
        notes=tuple(key for key in notes if "sha256:" + key.split("/")[1] not in living.snapshots),
        leases=stored.leases.expired,
        age=max(min_age, time.time() - stored.leases.since),
    )
    return _Survey(plan, going.copied, going.doubled, leftovers)


def _condemned(planned: GcPlan) -> lock.Condemned:
    return lock.Condemned(
        objects=frozenset([*map(snapshot_key, planned.snapshots), *map(manifest_key, planned.manifests)]),
        segments=frozenset(planned.segments),
        repacked=frozenset(planned.repack),
        pages=planned.lost_pages,
    )
