"""What tests of transfers share."""

from __future__ import annotations

from kvist.repo import RefKind, Repository, fsck, lease, transfer

from .making import LAYOUT, commit_parts, halves, read_back, snapshot

HALF = LAYOUT.page_bytes


def fill(repo: Repository) -> None:
    """A history, a snapshot of two layouts, forks, a tag."""
    snapshot(repo, halves(3))
    second = snapshot(repo, halves(3) + halves(1, 1))
    commit_parts(repo, "parts")
    repo.fork("main", 2, name="f")
    repo.tag("v1", second.cid)


def move(source: Repository, target: Repository, *revs: str, **how: bool) -> transfer.Transferred:
    """Plan and apply; everything, if no rev is given."""
    return transfer.apply(source, target, transfer.plan(source, target, revs, everything=not revs, **how))


def names(repo: Repository) -> dict[tuple[RefKind, str], str | None]:
    """What its refs name."""
    return {(ref.kind, ref.name): ref.cid for ref in repo.refs.all()}


def require_same(source: Repository, target: Repository) -> None:
    """The target has what the source's refs reach, nothing more, and is whole."""
    assert names(target) == names(source)
    assert {cid for cid, _ in target.objects.snapshots()} == source.reachable().keys()
    for cid in source.reachable():
        assert read_back(target, cid) == read_back(source, cid)
    report = fsck.check(target)
    assert report.is_clean, report.findings
    assert not [*target.store.list(lease.PREFIX)]
