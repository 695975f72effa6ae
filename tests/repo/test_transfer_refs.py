"""Refs at the target of a transfer: what they may become, and what is refused before anything moves."""

from __future__ import annotations

import pytest

from kvist.errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    PageNameMismatch,
)
from kvist.repo import RefKind, Repository, fsck, gc, transfer
from kvist.store import MemoryStore, WrapperStore

from .making import LAYOUT, halves, snapshot
from .transferring import move, names, require_same


def test_a_branch_moves_forward(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    move(repo, target, "main")
    tip = snapshot(repo, halves(1, 1))
    plan = transfer.plan(repo, target, ["main"])
    assert [each.act for each in plan.moves] == [transfer.Act.FORWARD]
    assert transfer.apply(repo, target, plan).refs[0].cid == tip.cid
    require_same(repo, target)


def test_a_branch_that_moved_elsewhere_is_refused_and_forced(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    move(repo, target, "main")
    ours, theirs = snapshot(repo, halves(1, 1)), snapshot(target, halves(1, 2))
    with pytest.raises(Conflict, match=theirs.cid) as refused:
        transfer.plan(repo, target, ["main"])
    assert ours.cid in str(refused.value) and refused.value.hint and "--force" in refused.value.hint
    plan = transfer.plan(repo, target, ["main"], force=True)
    assert [each.act for each in plan.moves] == [transfer.Act.REPLACE]
    transfer.apply(repo, target, plan)
    assert names(target) == names(repo)
    gc.apply(target, gc.plan(target, min_age=0))
    require_same(repo, target)


def test_a_target_that_is_ahead_is_left(repo: Repository, target: Repository) -> None:
    old = snapshot(repo, halves(1))
    snapshot(repo, halves(1, 1))
    move(repo, target)
    repo.branch("main", old.cid, move=True)
    assert transfer.plan(repo, target, ["main"]).is_empty
    assert transfer.plan(target, repo, ["main"]).moves[0].act is transfer.Act.FORWARD
    move(repo, target, "main", force=True)
    assert names(target) == names(repo)


def test_a_tag_never_moves(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    repo.tag("v1", "main")
    move(repo, target, "v1")
    assert transfer.plan(repo, target, ["v1"]).is_empty, "an equal tag is no error"
    other = snapshot(target, halves(1, 1), "x")
    target.tag("v2", other.cid)
    repo.tag("v2", "main")
    for force in (False, True):
        with pytest.raises(AlreadyExists, match=other.cid):
            transfer.plan(repo, target, ["v2"], force=force)
    target.delete_ref(RefKind.TAG, "v1")
    with pytest.raises(AlreadyExists, match="never used again"):
        transfer.plan(repo, target, ["v1"], force=True)


def test_a_rev_goes_to_a_branch_of_another_name(repo: Repository, target: Repository) -> None:
    first = snapshot(repo, halves(1))
    second = snapshot(repo, halves(1, 1))
    for rev in ("main", second.cid, second.cid[7:20]):
        move(repo, target, f"{rev}:copy")
    move(repo, target, f"{first.cid}:old")
    assert names(target) == {(RefKind.BRANCH, "copy"): second.cid, (RefKind.BRANCH, "old"): first.cid}
    assert fsck.check(target).is_clean


def test_two_revs_for_one_name(repo: Repository, target: Repository) -> None:
    first, second = snapshot(repo, halves(1)), snapshot(repo, halves(1, 1))
    with pytest.raises(InvalidInput, match=f"branch main: {second.cid} and {first.cid}"):
        transfer.plan(repo, target, ["main", f"{first.cid}:main"])
    assert len(transfer.plan(repo, target, ["main", f"{second.cid}:main", "main"]).moves) == 1


def test_a_name_of_a_branch_and_a_tag_means_both(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    repo.tag("main", "main")
    move(repo, target, "main")
    assert names(target) == names(repo)


@pytest.mark.parametrize("what", ["", "none", "a:b:c", "main:-x", "main:", ":x", "sha256:", "sha256:main:x"])
def test_what_names_nothing(repo: Repository, target: Repository, what: str) -> None:
    snapshot(repo, halves(1))
    if what == "main:":
        move(repo, target, what)
        return
    with pytest.raises((InvalidInput, NotFound)):
        transfer.plan(repo, target, [what])


def test_a_bare_snapshot_would_be_held_by_nothing(repo: Repository, target: Repository) -> None:
    made = snapshot(repo, halves(1))
    for rev in (made.cid, made.cid[7:19]):
        with pytest.raises(InvalidInput, match="nothing would hold it") as refused:
            transfer.plan(repo, target, [rev])
        assert refused.value.hint and refused.value.hint.endswith(":NAME")


def test_nothing_asked_for_and_all_at_once(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    for revs, everything in (((), False), (("main",), True)):
        with pytest.raises(InvalidInput, match="say which"):
            transfer.plan(repo, target, revs, everything=everything)


def test_one_repository_is_not_two(repo: Repository) -> None:
    with pytest.raises(InvalidInput, match="one repository"):
        transfer.plan(repo, Repository.open(WrapperStore(repo.store)), everything=True)


def test_pages_of_other_names_are_refused(repo: Repository) -> None:
    snapshot(repo, halves(1))
    others = [Repository.init(MemoryStore(), page_digest="sha256"), Repository.init(MemoryStore(), salt="ab" * 32)]
    for other in others:
        with pytest.raises(PageNameMismatch) as refused:
            transfer.plan(repo, other, everything=True)
        assert f"by {repo.page_identity}," in str(refused.value) and f"by {other.page_identity}:" in str(refused.value)
        assert "abab" not in str(refused.value), "the salt is not told"
        assert refused.value.exit_code == 12


@pytest.mark.parametrize("how", [{"page_digest": "sha256"}, {"salt": "0f" * 32}])
def test_a_clone_names_pages_as_its_source(how: dict[str, str]) -> None:
    with Repository.init(MemoryStore(), **how) as source:
        data = halves(2)
        names_of = source.put_pages(data).digests
        from kvist.repo import LogicalSeq, Manifest, PageEntry

        pages = tuple(PageEntry(i, names_of[2 * i], names_of[2 * i + 1]) for i in range(2))
        source.commit([Manifest(LAYOUT, pages, (LogicalSeq("s", (0, 1)),))], branch="main")
        with transfer.init_like(source, MemoryStore()) as clone:
            assert clone.page_identity == source.page_identity and clone.id != source.id
            move(source, clone)
            require_same(source, clone)
