import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.errors import IntegrityError, InvalidInput, NotFound
from kvist.hashing import Buffer, sha256_cid
from kvist.repo import RefKind, Repository, fsck, gc, lease, lock, mending, repair
from kvist.repo.fsck import Code
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.repo.repair import Act
from kvist.store import LocalStore, MemoryStore, PutMode, ReadOnlyStore, Store, WrapperStore
from kvist.testing.faults import CrashingStore, SimulatedCrash

from .damaged import build
from .making import LAYOUT, digest, halves, manifest, parts, read_back, snapshot

MENDED_ALONE = {Code.DAMAGED_COPY, Code.DAMAGED_SEGMENT, Code.DAMAGED_LOCK, Code.DAMAGED_LEASE, Code.STRAY_OBJECT,
                Code.DAMAGED_SIGNATURE}  # fmt: skip
FROM_A_COPY = {Code.DAMAGED_SNAPSHOT, Code.MISSING_PARENT, Code.MISSING_MANIFEST, Code.DAMAGED_MANIFEST,
               Code.DAMAGED_PAGE}  # fmt: skip


@pytest.fixture
def damaged(tmp_path: Path, code: Code) -> Iterator[Repository]:
    build(tmp_path / "damaged", code)
    with Repository.open(LocalStore(tmp_path / "damaged", durable=False)) as repo:
        yield repo


@pytest.fixture
def whole() -> Iterator[Repository]:
    """Another repository, with the pages and snapshots that every damaged one had once."""
    with Repository.init(MemoryStore()) as repo:
        yield repo


def objects(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


def mend(repo: Repository, **options: object) -> mending.Repaired:
    planned = repair.plan(repo, **options)  # type: ignore[arg-type]
    return mending.apply(repo, planned, source=options.get("source"))  # type: ignore[arg-type]


# -- every finding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", Code)
def test_a_plan_changes_nothing_and_tells_what_it_leaves(damaged: Repository, code: Code) -> None:
    before = objects(damaged.store)
    planned = repair.plan(damaged)
    assert objects(damaged.store) == before
    assert {finding.code for finding in planned.findings} == {code}
    assert (not planned.left) == (code in MENDED_ALONE)
    assert json.loads(json.dumps(planned.to_json()))["steps"] == [step.to_json() for step in planned.steps]


@pytest.mark.parametrize("code", Code)
def test_what_can_be_mended_alone_is_and_nothing_whole_is_lost(damaged: Repository, code: Code) -> None:
    before = _readable(damaged.store)
    done = mend(damaged)
    assert not done.failed
    report = fsck.check(damaged)
    assert report.is_clean == (code in MENDED_ALONE), report.findings
    assert _readable(damaged.store).items() >= before.items()
    assert not mend(damaged).done, "nothing is left to do"
    if code is Code.DAMAGED_PAGE:
        damaged.put_pages([page for seed in range(3) for page in halves(2, seed)])
        assert fsck.check(damaged).is_clean, "the next put heals it"


@pytest.mark.parametrize("code", sorted(FROM_A_COPY))
def test_a_copy_mends_the_rest(tmp_path: Path, code: Code) -> None:
    root, copy = tmp_path / "damaged", tmp_path / "copy"
    build(root, code)
    build(copy, code)
    with Repository.open(LocalStore(root, durable=False)) as repo:
        shutil.rmtree(copy)
        _copy_of(repo, copy)
        with Repository.open(LocalStore(copy, durable=False)) as source:
            planned = repair.plan(repo, source=source)
            assert not planned.left, planned.left
            done = mending.apply(repo, planned, source=source)
            assert not done.failed and not done.left
            assert fsck.check(repo).is_clean
            assert len(repo.log("main")) == 3
            assert gc.plan(repo, min_age=0) is not None


def _copy_of(repo: Repository, root: Path) -> None:
    """A repository with all that `build` makes; snapshots have times and so other cids there: copy these objects."""
    with Repository.init(LocalStore(root, durable=False)) as copy:
        for seed in range(3):
            data = halves(2, seed)
            copy.put_pages(data)
            copy.objects.put_manifests([manifest(data)])
        copy.put_pages(halves(1, 9))
        for key, data in DELETED.items():
            copy.store.put(key, data)


DELETED: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def remember_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snapshot that any repository of this test has put, by key."""
    DELETED.clear()
    original = fsck.Repository.commit

    def commit(self: Repository, *args: object, **more: object) -> object:
        made = original(self, *args, **more)  # type: ignore[arg-type]
        DELETED[snapshot_key(made.cid)] = made.encode()
        return made

    monkeypatch.setattr(fsck.Repository, "commit", commit)


def _cids(repo: Repository) -> list[str]:
    return [cid for cid, _ in repo.objects.snapshots()]


def _readable(store: Store) -> dict[str, list[bytes]]:
    """Pages of every snapshot that is whole; finds damage and marks none."""
    found = {}
    with Repository.open(ReadOnlyStore(store)) as repo:
        for cid in _cids(repo):
            with contextlib.suppress(IntegrityError, InvalidInput, NotFound):
                found[cid] = read_back(repo, cid)
    return found


# -- pages ---------------------------------------------------------------------------------------------------------


def test_a_mark_on_a_whole_copy_is_taken_back(repo: Repository) -> None:
    data = halves(2)
    snapshot(repo, data)
    key = repo.pages.segments()[0].key
    repo.store.put(f"damaged/{key.removeprefix('segments/')}/{digest(data[0]).removeprefix('blake3:')}", b"")
    repo.pages.refresh()
    assert [finding.code for finding in fsck.check(repo).findings] == [Code.DAMAGED_PAGE]
    done = mend(repo)
    assert [step.act for step in done.done] == [Act.UNMARK] and not done.left
    assert fsck.check(repo).is_clean and read_back(repo, "main") == data


@pytest.mark.parametrize("hurt", ["footer", "index", "cut", "head"])
def test_pages_are_saved_out_of_a_broken_segment(repo: Repository, hurt: str) -> None:
    data = halves(4)
    snapshot(repo, data)
    other = halves(2, 1)
    snapshot(repo, other, "other")
    key = repo.pages.homes(digest(data[0]))[0]
    whole = repo.store.get(key)
    pages = 8 * LAYOUT.page_bytes
    broken = {
        "footer": whole[:-10] + bytes(10),
        "index": whole[: pages + 40] + bytes([whole[pages + 40] ^ 1]) + whole[pages + 41 :],
        "cut": whole[: pages + 100],
        "head": whole[: pages // 2] + bytes(len(whole) - pages // 2),
    }[hurt]
    repo.store.put(key, broken)
    with Repository.open(repo.store) as again:
        assert Code.DAMAGED_SEGMENT in {finding.code for finding in fsck.check(again).findings}
        done = mend(again)
        assert not done.failed
        if hurt == "head":
            assert {one.code for one in done.left} == {Code.MISSING_PAGE, Code.DAMAGED_SEGMENT}
            assert len([step for step in done.done if step.act is Act.SAVE]) == 4
            assert again.store.head(key) is not None, "it may hold what is missing"
            again.put_pages(data)
            done = mend(again)
        assert not done.left and again.store.head(key) is None
        assert read_back(again, "main") == data and read_back(again, "other") == other


def test_pages_of_two_sizes_are_saved_by_the_lengths_in_the_index(repo: Repository) -> None:
    layouts = parts(1, 2)
    data = [halves(2, 7, layout) for layout in layouts]
    repo.put_pages([*data[0], *data[1]])
    manifests = [manifest(part, layout, seqs=[]) for part, layout in zip(data, layouts, strict=True)]
    made = repo.commit(manifests, branch="main")
    (key,) = (info.key for info in repo.store.list("segments/"))
    repo.store.put(key, repo.store.get(key)[:-8] + bytes(8))
    with Repository.open(repo.store) as again:
        assert not mend(again).left
        assert read_back(again, made.cid) == [*data[0], *data[1]]


def test_garbage_in_a_broken_segment_that_a_manifest_names_is_saved_too(repo: Repository) -> None:
    """Its snapshot may be somebody's who is about to name it."""
    snapshot(repo, halves(1, 5))
    data = halves(2)
    made = snapshot(repo, data, None)
    key = repo.pages.homes(digest(data[0]))[0]
    repo.store.put(key, repo.store.get(key)[:-8] + bytes(8))
    with Repository.open(repo.store) as again:
        assert not mend(again).left and again.store.head(key) is None
        assert read_back(again, made.cid) == data


@pytest.mark.parametrize("when", ["before the plan", "after the plan"])
def test_what_only_a_lease_needs_is_not_deleted(when: str) -> None:
    """An engine goes on reading pages whose index is broken: it has that in memory."""
    with Repository.init(MemoryStore()) as repo:
        snapshot(repo, halves(1))
        data = halves(1, 7)
        made = snapshot(repo, data, "mine")
        repo.delete_ref(RefKind.BRANCH, "mine")
        key = repo.pages.homes(digest(data[0]))[0]
        whole = repo.store.get(key)
        repo.store.put(key, whole[: sum(map(len, data))] + bytes(len(whole)))  # and nobody finds a page in it
        with contextlib.ExitStack() as stack, Repository.open(repo.store) as other:
            if when == "before the plan":
                stack.enter_context(lease.hold(repo, cids=[made.cid]))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(repair, "salvage", lambda *_: [])
                planned = repair.plan(other)
            if when == "after the plan":
                stack.enter_context(lease.hold(repo, cids=[made.cid]))
            done = mending.apply(other, planned)
            assert not done.done and other.store.head(key) is not None
            assert read_back(repo, made.cid) == data
        with Repository.open(repo.store) as again:
            assert not mend(again).left and repo.store.head(key) is None


# -- from a copy ---------------------------------------------------------------------------------------------------


def test_a_copy_that_is_damaged_itself_gives_what_it_has(repo: Repository, whole: Repository) -> None:
    data = halves(3)
    snapshot(repo, data)
    whole.put_pages(data)
    for one, at in ((repo, 0), (repo, 5), (whole, 5)):
        key = one.pages.segments()[0].key
        start, _ = one.pages.segments()[0].span(at)
        flipped = bytearray(one.store.get(key))
        flipped[start] ^= 1
        one.store.put(key, flipped)
    done = mend(repo, source=whole)
    assert [step.act for step, _ in done.failed] == [Act.FETCH_PAGE]
    assert [one.code for one in done.left] == [Code.DAMAGED_PAGE]
    assert fsck.check(repo).findings[0].subject == digest(data[5])


def test_a_plan_that_fetches_needs_its_source_again(repo: Repository, whole: Repository) -> None:
    made = snapshot(repo, halves(1))
    whole.objects.put_manifests([manifest(halves(1))])
    repo.store.delete([manifest_key(made.manifests[0])])
    planned = repair.plan(repo, source=whole)
    done = mending.apply(repo, planned)
    assert len(done.failed) == 1 and [one.code for one in done.left] == [Code.MISSING_MANIFEST]


def test_all_that_a_lost_snapshot_leads_to_is_planned(repo: Repository, whole: Repository) -> None:
    """Nobody knows what a missing snapshot needs, but the copy does."""
    for one in (repo, whole):
        snapshot(one, halves(2))
        snapshot(one, halves(2, 1))
    made = repo.snapshot("main")
    first = repo.snapshot(made.parents[0])
    for each in (made, first):
        whole.store.put(snapshot_key(each.cid), each.encode())
        repo.store.delete([snapshot_key(each.cid), manifest_key(each.manifests[0])])
    repo.store.delete([info.key for info in repo.store.list("segments/")])
    planned = repair.plan(repo, source=whole)
    kinds = [step.act for step in planned.steps]
    assert kinds.count(Act.FETCH_OBJECT) == 4 and kinds.count(Act.FETCH_PAGE) == 8 and not planned.left
    mending.apply(repo, planned, source=whole)
    assert fsck.check(repo).is_clean and read_back(repo, "main") == halves(2, 1)


def test_bytes_that_are_their_cids_and_yet_nothing_are_left(repo: Repository) -> None:
    first = snapshot(repo, halves(1))
    data = b"no manifest"
    cid = sha256_cid(data)
    repo.store.put(manifest_key(cid), data)
    made = type(first)((cid,), (first.cid,), 4)
    repo.objects.put_snapshots([made])
    tip = repo.refs.read(RefKind.BRANCH, "main")
    assert tip is not None
    repo.refs.move(tip, made.cid)
    assert [one.code for one in repair.plan(repo).left] == [Code.DAMAGED_MANIFEST]
    assert not mend(repo, rewind=True).left and repo.resolve("main") == first.cid


# -- branches ------------------------------------------------------------------------------------------------------


def test_a_branch_goes_back_to_its_newest_whole_ancestor_only_when_asked(repo: Repository) -> None:
    first, second, third = (snapshot(repo, halves(1, seed)) for seed in range(3))
    repo.store.delete([manifest_key(third.manifests[0]), manifest_key(second.manifests[0])])
    repo.objects.forget()
    assert repair.plan(repo).is_empty
    planned = repair.plan(repo, rewind=True)
    assert [(step.act, step.subject, step.where) for step in planned.steps] == [(Act.REWIND, "main", first.cid)]
    assert not planned.left
    done = mending.apply(repo, planned)
    assert not done.failed and fsck.check(repo).is_clean
    assert repo.resolve("main") == first.cid


def test_a_branch_that_moved_since_the_plan_is_left_alone(repo: Repository) -> None:
    snapshot(repo, halves(1))
    tip = snapshot(repo, halves(1, 1))
    other = snapshot(repo, halves(1, 2), "other")
    repo.store.delete([manifest_key(tip.manifests[0])])
    repo.objects.forget()
    planned = repair.plan(repo, rewind=True)
    repo.branch("main", other.cid, move=True)
    done = mending.apply(repo, planned)
    assert len(done.failed) == 1 and "moved" in done.failed[0][1]
    assert repo.resolve("main") == other.cid


@pytest.mark.parametrize("lost", ["record", "tip", "parent"])
def test_what_a_branch_named_is_never_guessed(repo: Repository, lost: str) -> None:
    """Whole snapshots are told that it may have named; which of them it was, a person says."""
    first = snapshot(repo, halves(1))
    second = snapshot(repo, halves(1, 1))
    third = snapshot(repo, halves(1, 2))
    other = snapshot(repo, halves(1, 3), None)
    snapshot(repo, halves(1, 4), "named")
    broken = snapshot(repo, halves(1, 5), None)
    repo.store.delete([manifest_key(broken.manifests[0])])
    if lost == "record":
        repo.store.put("refs/branches/main.ref", b"nonsense")
    else:
        repo.store.delete([snapshot_key({"tip": third, "parent": second}[lost].cid)])
    repo.objects.forget()
    planned = repair.plan(repo, rewind=True)
    expected = {"record": third, "tip": second, "parent": first}[lost]
    assert planned.is_empty and planned.candidates == (other.cid, expected.cid)
    assert planned.to_json()["candidates"] == [other.cid, expected.cid]
    if lost == "record":
        repo.mend_ref(RefKind.BRANCH, "main", expected.cid)
    else:
        repo.branch("main", expected.cid, move=True)
    assert fsck.check(repo).is_clean and repair.plan(repo).candidates == ()


def test_two_unreadable_branches_do_not_get_one_snapshot(repo: Repository) -> None:
    first = snapshot(repo, halves(2))
    snapshot(repo, halves(2, 1), "other")
    snapshot(repo, halves(1, 3), "continues", parents=[first.cid])
    for name in ("main", "other"):
        repo.store.put(f"refs/branches/{name}.ref", b"nonsense")
    planned = repair.plan(repo, rewind=True)
    assert planned.is_empty and {one.code for one in planned.left} == {Code.DAMAGED_REF}


def test_a_tag_never_goes_back(repo: Repository) -> None:
    snapshot(repo, halves(1))
    made = snapshot(repo, halves(1, 1))
    repo.tag("v1", made.cid)
    repo.store.delete([manifest_key(made.manifests[0])])
    repo.objects.forget()
    done = mend(repo, rewind=True)
    assert repo.resolve("v1") == made.cid and [one.code for one in done.left] == [Code.MISSING_MANIFEST]


# -- others at the same time, and crashes --------------------------------------------------------------------------


def test_what_has_become_whole_since_the_plan_is_not_deleted(repo: Repository) -> None:
    snapshot(repo, halves(2))
    repo.store.put(lock.KEY, b"{}")
    planned = repair.plan(repo)
    repo.store.delete([lock.KEY])
    etag = lock.acquire(repo.store, lock.Condemned())
    mending.apply(repo, planned)
    assert repo.store.head(lock.KEY) is not None
    lock.release(repo.store, etag)


def test_a_gc_while_it_runs_takes_nothing_that_it_brings(store: Store, whole: Repository) -> None:
    data = halves(4)
    with Repository.init(store) as repo:
        made = snapshot(repo, data)
        whole.put_pages(data)
        store.delete([info.key for info in store.list("segments/")])
    tried = []

    class Busy(WrapperStore):
        """Whenever it is written to, another process collects."""

        def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
            done = super().put(key, data, mode=mode)
            with contextlib.suppress(IntegrityError), Repository.open(self.store) as other:
                tried.append(key)
                gc.apply(other, gc.plan(other, min_age=0))
            return done

    with Repository.open(Busy(store)) as repo:
        done = mend(repo, source=whole)
        assert tried and not done.failed and not done.left
        assert read_back(repo, made.cid) == data


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_write_loses_nothing_and_the_next_run_completes(after: bool) -> None:
    at = 0
    crashed = True
    while crashed:
        at += 1
        assert at < 60
        store, copy = MemoryStore(), MemoryStore()
        with Repository.init(store) as repo, Repository.init(copy) as source:
            _hurt(repo, source)
            held = _readable(store)
            dying = Repository.open(CrashingStore(store, at, after=after))
            crashed = False
            try:
                mending.apply(dying, repair.plan(dying, source=source, rewind=True), source=source)
            except SimulatedCrash:
                crashed = True
            dying.pages.close()
            with Repository.open(store) as again:
                assert _readable(store).items() >= held.items()
                done = mend(again, source=source, rewind=True)
                assert not done.failed and not done.left
                report = fsck.check(again)
                assert report.is_clean, report.findings
                assert read_back(again, "main") == halves(2) and read_back(again, "side") == halves(3, 1)
    assert at > 8


def _hurt(repo: Repository, source: Repository) -> None:
    """A damaged page and a missing manifest that the copy has, a broken segment, a stray, a branch to take back."""
    main = snapshot(repo, halves(2))
    side = snapshot(repo, halves(3, 1), "side")
    snapshot(repo, halves(1, 2), "back")
    lost = snapshot(repo, halves(1, 3), "back")
    stray = snapshot(repo, halves(1, 4), None)
    source.put_pages(halves(2))
    source.objects.put_manifests([repo.manifest(side.manifests[0])])
    key = repo.pages.homes(digest(halves(2)[1]))[0]
    data = bytearray(repo.store.get(key))
    data[LAYOUT.page_bytes] ^= 1
    repo.store.put(key, data)
    repo.store.delete([manifest_key(side.manifests[0]), manifest_key(lost.manifests[0])])
    broken = repo.pages.homes(digest(halves(3, 1)[0]))[0]
    repo.store.put(broken, repo.store.get(broken)[:-1] + b"x")
    repo.store.put(snapshot_key(stray.cid), b"{}")
    assert repo.refs.read(RefKind.BRANCH, "main") is not None and main.cid
