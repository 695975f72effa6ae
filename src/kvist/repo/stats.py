"""stats: what a repository holds, in all, by branch and by layout. Reads, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvist.errors import IntegrityError, Locked
from kvist.repo import gc, lease, lineage
from kvist.repo.census import Census, Counted, bare, holding
from kvist.repo.refs import Ref, RefKind
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot

_SHARED: Final = -1


@dataclass(frozen=True, slots=True)
class BranchStats:
    """One branch, with all that its tip descends from.

    Attributes:
        name: of the branch.
        cid: its tip.
        snapshots: how many.
        pruned: of these, those of which only the record is kept.
        logical_bytes: pages of all these snapshots, as if each had its own.
        page_bytes: distinct pages of them.
        own_bytes: of those, the pages that no other ref reaches: what deleting the branch would free.
    """

    name: str
    cid: str
    snapshots: int
    pruned: int
    logical_bytes: int
    page_bytes: int
    own_bytes: int

    @property
    def shared_bytes(self) -> int:
        """Bytes of distinct pages that another ref reaches too."""
        return self.page_bytes - self.own_bytes

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return asdict(self) | {"shared_bytes": self.shared_bytes}


@dataclass(frozen=True, slots=True)
class LayoutStats:
    """All pages of one layout.

    Attributes:
        fingerprint, model, revision, dtype, tp_rank, group: of the layout.
        snapshots: reachable snapshots that hold pages of it.
        logical_bytes, page_bytes: see `BranchStats`.
    """

    fingerprint: str
    model: str | None
    revision: str | None
    dtype: str
    tp_rank: int
    group: int
    snapshots: int
    logical_bytes: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """What a repository holds.

    Attributes:
        branches, tags, snapshots, manifests: how many; snapshots that no ref reaches are counted too.
        unreachable_snapshots: of those.
        pruned_snapshots: reachable ones of which only the record is kept.
        leases: leases that hold.
        tokens: over all reachable snapshots.
        logical_bytes: pages of all reachable snapshots, of every rank and group, as if each had its own.
        page_bytes: distinct pages of all reachable snapshots.
        stored_bytes: everything in the store.
        garbage_bytes: what a gc would free now; ``None``: it would refuse.
        segments: how many.
        damaged_pages: page copies known to be damaged.
        by_branch: by name.
        by_layout: by bytes, the most first.
    """

    branches: int
    tags: int
    snapshots: int
    unreachable_snapshots: int
    pruned_snapshots: int
    manifests: int
    leases: int
    tokens: int
    logical_bytes: int
    page_bytes: int
    stored_bytes: int
    garbage_bytes: int | None
    segments: int
    damaged_pages: int
    by_branch: tuple[BranchStats, ...]
    by_layout: tuple[LayoutStats, ...]

    @property
    def dedup(self) -> float:
        """Logical bytes over distinct bytes; 1.0 for an empty repository."""
        return self.logical_bytes / self.page_bytes if self.page_bytes else 1.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        by_branch = [branch.to_json() for branch in self.by_branch]
        return asdict(self) | {"dedup": self.dedup, "by_branch": by_branch}


def count(repo: Repository, *, min_age: float = gc.MIN_AGE) -> Stats:
    """Count a repository.

    Args:
        repo: what to count.
        min_age: seconds for which the gc, of which `Stats.garbage_bytes` tells, keeps whatever was written.

    Raises:
        NotFound: an ancestor of a ref is not stored; run fsck.
    """
    repo.pages.refresh()
    refs = [*repo.refs.all()]
    snapshots = repo.reachable(ref.cid for ref in refs)
    leases = lease.read(repo.store)
    pruned = bare(repo, {ref.cid for ref in refs})
    census = Census(repo)
    held = holding(snapshots, pruned)
    manifests = census.manifests(held)
    stored = sum(1 for _ in repo.objects.snapshots())
    branches = [ref for ref in refs if ref.kind is RefKind.BRANCH]
    return Stats(
        branches=len(branches),
        tags=len(refs) - len(branches),
        snapshots=stored,
        unreachable_snapshots=stored - len(snapshots),
        pruned_snapshots=len(pruned & snapshots.keys()),
        manifests=sum(1 for _ in repo.objects.manifests()),
        leases=len(leases.live),
        tokens=sum(snapshot.tokens for snapshot in snapshots.values()),
        logical_bytes=_logical(census, held),
        page_bytes=census.page_bytes(manifests.values()),
        stored_bytes=sum(info.size for info in repo.store.list()),
        garbage_bytes=_garbage(repo, min_age),
        segments=len(repo.pages.segments()),
        damaged_pages=len(repo.pages.damaged_places()),
        by_branch=tuple(_Branches(census, refs, snapshots, pruned).count()),
        by_layout=tuple(_by_layout(census, held)),
    )


def _logical(census: Census, snapshots: Iterable[Snapshot]) -> int:
    found = (census.manifest(cid) for snapshot in snapshots for cid in snapshot.manifests)
    return sum(manifest.logical_bytes for manifest in found if manifest is not None)


def _garbage(repo: Repository, min_age: float) -> int | None:
    try:
        plan = gc.plan(repo, min_age=min_age)
    except (IntegrityError, Locked):
        return None
    return plan.delete_bytes - plan.copy_bytes


class _Branches:
    """What each branch reaches, and what of it nothing else does."""

    def __init__(
        self, census: Census, refs: Sequence[Ref], snapshots: Mapping[str, Snapshot], pruned: set[str]
    ) -> None:
        self.census, self.refs, self.snapshots, self.pruned = census, refs, snapshots, pruned
        self.histories = [self._history(ref) for ref in refs]
        self.sizes: dict[frozenset[str], int] = {}  # forks mostly hold the same manifests

    def count(self) -> Iterable[BranchStats]:
        own = self._own()
        for number, (ref, history) in enumerate(zip(self.refs, self.histories, strict=True)):
            if ref.kind is RefKind.BRANCH:
                held = holding(history, self.pruned)
                yield BranchStats(
                    name=ref.name,
                    cid=ref.cid,
                    snapshots=len(history),
                    pruned=len(history) - len(held),
                    logical_bytes=_logical(self.census, held),
                    page_bytes=self._page_bytes(held),
                    own_bytes=own.get(number, 0),
                )

    def _history(self, ref: Ref) -> dict[str, Snapshot]:
        past = lineage.ancestors([ref.cid], lambda cid: self.snapshots[cid].parents)
        return {cid: self.snapshots[cid] for cid in past}

    def _page_bytes(self, held: Sequence[Snapshot]) -> int:
        names = frozenset(cid for snapshot in held for cid in snapshot.manifests)
        if names not in self.sizes:
            self.sizes[names] = self.census.page_bytes(self.census.manifests(held).values())
        return self.sizes[names]

    def _own(self) -> dict[int, int]:
        """Bytes of the pages that only one ref reaches, by its number."""
        owners: dict[str, int] = {}  # of manifests
        for number, history in enumerate(self.histories):
            for snapshot in holding(history, self.pruned):
                for cid in snapshot.manifests:
                    owners[cid] = number if owners.get(cid, number) == number else _SHARED
        pages: dict[int, int] = {}
        for cid, owner in owners.items():
            manifest = self.census.manifest(cid)
            for page in manifest.pages if manifest is not None else ():
                pages[page] = owner if pages.get(page, owner) == owner else _SHARED
        own: dict[int, int] = {}
        for page, owner in pages.items():
            own[owner] = own.get(owner, 0) + self.census.sizes[page]
        return own


def _by_layout(census: Census, held: Iterable[Snapshot]) -> list[LayoutStats]:
    users: dict[str, int] = {}
    logical: dict[str, int] = {}
    manifests: dict[str, dict[str, Counted]] = {}
    for snapshot in held:
        parts = census.manifests([snapshot])
        for cid, manifest in parts.items():
            fingerprint = manifest.layout.fingerprint
            logical[fingerprint] = logical.get(fingerprint, 0) + manifest.logical_bytes
            manifests.setdefault(fingerprint, {})[cid] = manifest
        for fingerprint in {manifest.layout.fingerprint for manifest in parts.values()}:
            users[fingerprint] = users.get(fingerprint, 0) + 1
    found = []
    for fingerprint, own in manifests.items():
        layout = next(iter(own.values())).layout
        found.append(
            LayoutStats(
                fingerprint=fingerprint,
                model=layout.model,
                revision=layout.revision,
                dtype=layout.dtype,
                tp_rank=layout.tp_rank,
                group=layout.group,
                snapshots=users[fingerprint],
                logical_bytes=logical[fingerprint],
                page_bytes=census.page_bytes(own.values()),
            )
        )
    return sorted(found, key=lambda layout: (-layout.page_bytes, layout.fingerprint))
