"""prune: thins the history of branches by rules of retention. Plans, then applies.

Knows which snapshots rules keep. A snapshot's parents are part of its name, so none can be cut out of a lineage: what
is pruned keeps its record, and loses its manifests and pages to the next gc, once its mark says that it may. What a ref
or a lease names directly is never pruned, and where it is named later, it is kept as long as it is whole.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Final

from kvist.errors import Conflict, IntegrityError, InvalidInput, NotFound
from kvist.repo import lease, lineage, marks
from kvist.repo.census import Census, bare, holding
from kvist.repo.refs import Ref, RefKind
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot
from kvist.telemetry import counted

_PERIODS: Final[Mapping[str, Callable[[datetime], object]]] = {
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
}


CACHES: Final = "cache/"
"""Branches below this are prefix caches (`kvist.pager.chain`): each snapshot of one names only what those before it do
not, so none of them can go by itself. They bound themselves, and are no concern of prune."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is kept: of each branch what any rule keeps. All times are UTC.

    Attributes:
        branches: globs; only the history of branches that match one is thinned, and of that nothing that another
            branch reaches. Prefix caches (`CACHES`) never match.
        last: the newest so many.
        daily, weekly, monthly: the newest of each of the last so many days, weeks and months that have any.
        within: those younger than so many seconds.
        labels: globs; those whose name, or first line of the message, matches one.
        max_bytes: bytes of distinct pages that may stay in all. Beyond, the oldest go, also what other rules but
            `labels` keep, and of those only such as free anything.
        stale: branches that match, and whose tip and whose record are older than so many seconds, are deleted first.
    """

    branches: tuple[str, ...] = ("*",)
    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    within: float | None = None
    labels: tuple[str, ...] = ()
    max_bytes: int | None = None
    stale: float | None = None

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("last", "daily", "weekly", "monthly")}
        numbers |= {
            name: value for name in ("within", "max_bytes", "stale") if (value := getattr(self, name)) is not None
        }
        for name, value in numbers.items():
            if not value >= 0:
                raise InvalidInput(f"prune: {name} must not be negative, got {value!r}")
        if not self.thins and self.max_bytes is None and self.stale is None:
            raise InvalidInput("prune: expected at least one rule of what is kept, got none")

    @property
    def thins(self) -> bool:
        """Whether there is any rule by which a snapshot is kept, and so others are not."""
        return bool(self.last or self.daily or self.weekly or self.monthly or self.labels or self.within is not None)


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What a prune would do.

    Attributes:
        rules: by which it was made.
        branches: to delete, each with the snapshot that it names.
        snapshots: cids to prune, oldest first.
        kept_snapshots: reachable snapshots that keep their pages.
        kept_bytes: bytes of their distinct pages.
        free_bytes: bytes of distinct pages that only what goes needs; the next gc frees them.
        fits: whether what is kept is within ``max_bytes``; ``None`` without such a rule.
    """

    rules: Rules
    branches: tuple[tuple[str, str], ...]
    snapshots: tuple[str, ...]
    kept_snapshots: int
    kept_bytes: int
    free_bytes: int
    fits: bool | None

    @property
    def is_empty(self) -> bool:
        """Whether nothing goes."""
        return not (self.branches or self.snapshots)

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        branches = [{"name": name, "cid": cid} for name, cid in self.branches]
        return asdict(self) | {"branches": branches}

    def summary(self) -> str:
        """For people."""
        budget = "" if self.fits is not False else f", which is more than {self.rules.max_bytes:,}"
        return (
            f"delete {len(self.branches)} branches, prune {len(self.snapshots)} snapshots; keep {self.kept_snapshots} "
            f"snapshots with {self.kept_bytes:,} bytes of pages{budget}; the next gc frees {self.free_bytes:,} bytes"
        )


def plan(repo: Repository, rules: Rules) -> PrunePlan:
    """Say what the rules do not keep. Changes nothing.

    Raises:
        IntegrityError: an ancestor of a ref is not stored.
        Locked: a lease is unreadable: nobody can tell what it holds.
    """
    return _Planner(repo, rules).plan()


@counted("prune")
def apply(repo: Repository, planned: PrunePlan) -> PrunePlan:
    """Do what was planned, as far as the rules still say so; returns what was done.

    A crash leaves some of it undone; run again. What gets a name meanwhile is kept by that name.
    """
    now = plan(repo, planned.rules)
    branches = [branch for branch in now.branches if branch in planned.branches]
    deleted = tuple(branch for branch in branches if _delete(repo, *branch))
    snapshots = tuple(cid for cid in now.snapshots if cid in set(planned.snapshots))
    marks.record_pruned(repo.store, snapshots)
    return replace(now, branches=deleted, snapshots=snapshots)


def _delete(repo: Repository, name: str, cid: str) -> bool:
    """Delete a branch, unless it has moved."""
    ref = repo.refs.read(RefKind.BRANCH, name)
    if ref is None or ref.cid != cid:
        return False
    try:
        repo.refs.delete(ref)
    except Conflict:
        return False
    return True


class _Planner:
    def __init__(self, repo: Repository, rules: Rules) -> None:
        self.repo, self.rules, self.now = repo, rules, time.time()
        leases = lease.read(repo.store)
        leases.require_readable()
        self.refs = [*repo.refs.all()]
        self.leased = leases.cids
        try:
            self.snapshots = repo.reachable(ref.cid for ref in self.refs)
        except NotFound as error:
            raise IntegrityError(
                f"prune changes nothing while an ancestor of a ref is missing: {error}", hint="kvist fsck"
            ) from None

    def plan(self) -> PrunePlan:
        selected = [ref for ref in self.refs if ref.kind is RefKind.BRANCH and self._matches(ref.name)]
        stale = [ref for ref in selected if self._is_stale(ref)]
        refs = [ref for ref in self.refs if ref not in stale]
        named = {ref.cid for ref in refs} | self.leased
        gone = bare(self.repo, named)
        reached = self._reach(named)
        candidates = self._candidates([ref for ref in selected if ref not in stale], refs) - named - gone
        kept = candidates
        if self.rules.thins:
            kept = candidates & {cid for ref in selected if ref not in stale for cid in self._kept(ref, gone)}
        pruned = candidates - kept
        census = Census(self.repo)
        before = holding(self.snapshots, bare(self.repo, {ref.cid for ref in self.refs} | self.leased))
        budget = _Budget(census, holding(reached, gone | pruned))
        if self.rules.max_bytes is not None:
            labelled = {cid for cid in kept if self._is_labelled(self.snapshots[cid])}
            pruned |= budget.cut(self._oldest_first(kept - labelled), self.rules.max_bytes)
        return PrunePlan(
            rules=self.rules,
            branches=tuple((ref.name, ref.cid) for ref in stale),
            snapshots=tuple(snapshot.cid for snapshot in self._oldest_first(pruned)),
            kept_snapshots=len(reached.keys() - gone - pruned),
            kept_bytes=budget.bytes,
            free_bytes=census.page_bytes(census.manifests(before).values()) - budget.bytes,
            fits=None if self.rules.max_bytes is None else budget.bytes <= self.rules.max_bytes,
        )

    def _matches(self, name: str) -> bool:
        return not name.startswith(CACHES) and any(fnmatchcase(name, glob) for glob in self.rules.branches)

    def _is_stale(self, ref: Ref) -> bool:
        """Whether what a branch names is old, and the branch too: it may have been made this minute to keep that."""
        if self.rules.stale is None or ref.cid in self.leased or self._age(self.snapshots[ref.cid]) <= self.rules.stale:
            return False
        return self.now - self.repo.refs.modified(ref) > self.rules.stale

    def _age(self, snapshot: Snapshot) -> float:
        return self.now - snapshot.created_ns / 1e9

    def _reach(self, cids: Iterable[str]) -> dict[str, Snapshot]:
        tips = [cid for cid in cids if cid in self.snapshots]
        return {cid: self.snapshots[cid] for cid in lineage.ancestors(tips, lambda c: self.snapshots[c].parents)}

    def _candidates(self, selected: Sequence[Ref], refs: Sequence[Ref]) -> set[str]:
        """What selected branches reach and no other does. A tag holds its own snapshot, not what that continues."""
        others = [ref for ref in refs if ref.kind is RefKind.BRANCH and ref not in selected]
        return self._reach(ref.cid for ref in selected).keys() - self._reach(ref.cid for ref in others).keys()

    def _kept(self, ref: Ref, gone: set[str]) -> set[str]:
        """What the rules keep of one branch."""
        history = self._reach([ref.cid])
        newest = [history[cid] for cid in lineage.newest_first(history) if cid not in gone]
        kept = {snapshot.cid for snapshot in newest[: self.rules.last]}
        for name, period in _PERIODS.items():
            seen: dict[object, str] = {}
            for snapshot in newest:
                seen.setdefault(period(datetime.fromtimestamp(snapshot.created_ns / 1e9, UTC)), snapshot.cid)
            kept.update([*seen.values()][: getattr(self.rules, name)])
        kept |= {snapshot.cid for snapshot in newest if self._is_labelled(snapshot)}
        if self.rules.within is not None:
            kept |= {snapshot.cid for snapshot in newest if self._age(snapshot) <= self.rules.within}
        return kept

    def _is_labelled(self, snapshot: Snapshot) -> bool:
        texts = [snapshot.name or "", *snapshot.message.splitlines()[:1]]
        return any(fnmatchcase(text, glob) for text in texts for glob in self.rules.labels if text)

    def _oldest_first(self, cids: set[str]) -> list[Snapshot]:
        chosen = {cid: self.snapshots[cid] for cid in cids}
        return [chosen[cid] for cid in reversed(lineage.newest_first(chosen))]


class _Budget:
    """How many bytes of distinct pages some snapshots need, as one after the other goes.

    Attributes:
        bytes: that those which are left need.
    """

    def __init__(self, census: Census, snapshots: Iterable[Snapshot]) -> None:
        self._census = census
        self._users: Counter[int] = Counter()
        self.bytes = 0
        for snapshot in snapshots:
            self._add(snapshot)

    def cut(self, oldest: Sequence[Snapshot], most: int) -> set[str]:
        """Drop from the oldest on until ``most`` bytes are left, then take back what need not have gone.

        An old snapshot often holds nothing that a newer one does not hold too: to drop it would free nothing.
        """
        dropped = []
        for snapshot in oldest:
            if self.bytes <= most:
                break
            self._remove(snapshot)
            dropped.append(snapshot)
        cut = set()
        for snapshot in reversed(dropped):
            before = self.bytes
            self._add(snapshot)
            if self.bytes > max(most, before):
                self._remove(snapshot)
                cut.add(snapshot.cid)
        return cut

    def _pages(self, snapshot: Snapshot) -> Iterable[int]:
        for manifest in self._census.manifests([snapshot]).values():
            yield from manifest.pages

    def _add(self, snapshot: Snapshot) -> None:
        for page in self._pages(snapshot):
            self.bytes += self._census.sizes[page] if not self._users[page] else 0
            self._users[page] += 1

    def _remove(self, snapshot: Snapshot) -> None:
        for page in self._pages(snapshot):
            self._users[page] -= 1
            self.bytes -= self._census.sizes[page] if not self._users[page] else 0
