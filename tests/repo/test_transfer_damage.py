"""Damage on either side of a transfer: it is named at the source, healed at the target, and never passed on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvist.errors import (
    DamagedObject,
    DamagedPage,
    IntegrityError,
    InvalidManifest,
    MissingPage,
    NotFound,
)
from kvist.repo import Repository, fsck, gc, lease, moving, signing, transfer
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.store import Store

from .making import digest, halves, read_back, snapshot
from .transferring import move, names, require_same


def flip(store: Store, key: str, at: int = 5) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 1
    store.put(key, data)


def flip_page(repo: Repository, half: bytes) -> None:
    for info in [*repo.store.list("segments/")]:
        data = repo.store.get(info.key)
        if half in data:
            flip(repo.store, info.key, data.index(half) + 3)


def test_a_damaged_page_at_the_source_is_named_and_nothing_published(repo: Repository, target: Repository) -> None:
    data = halves(4)
    snapshot(repo, data)
    flip_page(repo, data[3])
    plan = transfer.plan(repo, target, ["main"])  # nobody has read it yet
    with pytest.raises(DamagedPage, match=digest(data[3])):
        transfer.apply(repo, target, plan)
    with pytest.raises(DamagedPage, match=digest(data[3])):
        transfer.plan(repo, target, ["main"])  # now it is known
    assert names(target) == {} and not [*target.objects.snapshots()]
    assert not [*target.store.list(lease.PREFIX)]
    repo.put_pages(data)  # healed
    move(repo, target, "main")
    require_same(repo, target)


def test_what_the_source_lacks(repo: Repository, target: Repository) -> None:
    first, tip = snapshot(repo, halves(1)), snapshot(repo, halves(1, 1))
    (old, *_) = [info.key for info in repo.store.list("segments/")]
    segment = repo.store.get(old)
    repo.store.delete([old])
    with pytest.raises(MissingPage):
        transfer.plan(repo, target, ["main"])
    repo.store.put(old, segment)
    for key, error in ((snapshot_key(first.cid), NotFound), (manifest_key(tip.manifests[0]), NotFound)):
        kept = repo.store.get(key)
        repo.store.delete([key])
        repo.objects.forget()
        with pytest.raises(error):
            transfer.plan(repo, target, ["main"])
        repo.store.put(key, kept)
        flip(repo.store, key, 30)
        repo.objects.forget()
        with pytest.raises((DamagedObject, InvalidManifest)):
            transfer.plan(repo, target, ["main"])
        repo.store.put(key, kept)
    assert names(target) == {}
    move(repo, target)
    require_same(repo, target)


def test_a_page_that_changes_on_its_way_gets_no_wrong_name(
    repo: Repository, target: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(repo, halves(2))
    real = moving._read

    def read(source: Repository, batch: object, room: memoryview) -> list[memoryview]:
        outs = real(source, batch, room)  # type: ignore[arg-type]
        outs[1][0] ^= 1
        return outs

    monkeypatch.setattr(moving, "_read", read)
    with pytest.raises(IntegrityError, match="arrived"):
        move(repo, target, "main")
    assert names(target) == {}
    monkeypatch.undo()
    move(repo, target, "main")
    assert names(target) == names(repo) and fsck.check(target).is_clean


def test_damage_that_the_target_knows_is_healed(repo: Repository, target: Repository) -> None:
    data = halves(3)
    snapshot(repo, data)
    snapshot(repo, halves(1, 1))
    move(repo, target)
    flip_page(target, data[2])
    with pytest.raises(DamagedPage):
        read_back(target, target.log("main")[1].cid)
    plan = transfer.plan(repo, target, ["main"])
    assert plan.lacking.pages == (digest(data[2]),) and not plan.lacking.snapshots and not plan.lacking.manifests
    assert [each.act for each in plan.moves] == [transfer.Act.KEEP]
    transfer.apply(repo, target, plan)
    require_same(repo, target)


def test_a_segment_without_its_index_is_healed(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(3))
    move(repo, target)
    for info in [*target.store.list("segments/")]:
        target.store.put(info.key, target.store.get(info.key)[:-10])
    with Repository.open(target.store) as reopened:
        assert len(transfer.plan(repo, reopened, ["main"]).lacking.pages) == 6
        move(repo, reopened)
        assert read_back(reopened, "main") == halves(3)
        gc.apply(reopened, gc.plan(reopened, min_age=0))
        require_same(repo, reopened)


Harm = Callable[[Store, str], None]


def cut(store: Store, key: str) -> None:
    store.put(key, store.get(key)[:-7])


def empty(store: Store, key: str) -> None:
    store.put(key, b"")


def remove(store: Store, key: str) -> None:
    store.delete([key])


@pytest.mark.parametrize("harm", [flip, cut, empty, remove])
@pytest.mark.parametrize("prefix", ["snapshots/", "manifests/", "segments/", "refs/branches/"])
def test_whatever_is_damaged_at_the_target_is_healed_when_asked(
    repo: Repository, target: Repository, prefix: str, harm: Harm
) -> None:
    for i in range(3):
        snapshot(repo, halves(1, i))
    move(repo, target)
    for info in [*target.store.list(prefix)]:
        harm(target.store, info.key)
    with Repository.open(target.store) as reopened:
        if prefix == "refs/branches/" and harm is not remove:
            with pytest.raises(DamagedObject):
                transfer.plan(repo, reopened, everything=True)
        move(repo, reopened, heal=True)
        assert transfer.plan(repo, reopened, everything=True, heal=True).is_empty
        gc.apply(reopened, gc.plan(reopened, min_age=0))
        require_same(repo, reopened)


def move_signed(repo: Repository, target: Repository) -> str:
    """Push a signed snapshot; the key of its signature."""
    pytest.importorskip("cryptography")
    made = snapshot(repo, halves(1))
    signing.sign(repo.store, made.cid, signing.PrivateKey.new())
    move(repo, target)
    (key,) = [info.key for info in target.store.list(signing.PREFIX)]
    return key


@pytest.mark.parametrize("harm", [flip, cut, empty, remove])
def test_a_damaged_signature_is_healed_when_asked(repo: Repository, target: Repository, harm: Harm) -> None:
    key = move_signed(repo, target)
    harm(target.store, key)
    if harm is not remove:
        assert [one.subject for one in fsck.check(target).findings] == [key]
        assert transfer.plan(repo, target, everything=True).is_empty
    move(repo, target, heal=True)
    assert target.store.get(key) == repo.store.get(key)
    assert transfer.plan(repo, target, everything=True, heal=True).is_empty
    require_same(repo, target)


def test_a_signature_that_is_damaged_at_the_source_heals_none(repo: Repository, target: Repository) -> None:
    key = move_signed(repo, target)
    flip(repo.store, key)
    assert transfer.plan(repo, target, everything=True, heal=True).is_empty
    flip(target.store, key)
    assert transfer.plan(repo, target, everything=True, heal=True).is_empty


def test_a_pull_heals_what_is_damaged_here(repo: Repository, target: Repository) -> None:
    """The same act with the sides changed."""
    data = halves(3)
    snapshot(repo, data)
    move(repo, target)
    flip_page(repo, data[0])
    with pytest.raises(DamagedPage):
        read_back(repo, "main")
    assert move(target, repo, "main").pages == 1
    require_same(target, repo)
