import shutil
from pathlib import Path

import pytest

from kvist.errors import IntegrityError, Locked
from kvist.repo import RefKind, Repository, fsck, gc, lock
from kvist.repo.fsck import Code
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.store import LocalStore, Store

from .damaged import FIXTURES, build
from .making import digest, halves, manifest, read_back, snapshot

HARMLESS = {Code.DAMAGED_SEGMENT, Code.STRAY_OBJECT}


@pytest.fixture(params=["built", "fixture"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path, code: Code) -> Path:
    """Made by today's code, or by the code that wrote the fixture: fsck must still name what is wrong."""
    root = tmp_path / "damaged"
    if request.param == "built":
        build(root, code)
    else:
        shutil.copytree(FIXTURES / code.value, root)
    return root


@pytest.mark.parametrize("code", Code)
def test_each_kind_of_damage_is_named_and_nothing_else(damaged: Path, code: Code) -> None:
    with Repository.open(LocalStore(damaged, durable=False)) as repo:
        for _ in range(2):  # the second time with the damage marked
            report = fsck.check(repo)
            found = {finding.code for finding in report.findings}
            assert found == {code}, report.findings
            assert not report.is_clean
            assert all(finding.subject and finding.detail and finding.mend for finding in report.findings)
            assert report.is_whole == (code in HARMLESS | {Code.DAMAGED_LOCK})
        assert report.to_json()["clean"] is False


@pytest.mark.parametrize("code", Code)
def test_gc_refuses_while_something_reachable_is_damaged(damaged: Path, code: Code) -> None:
    store = LocalStore(damaged, durable=False)
    with Repository.open(store) as repo:
        fsck.check(repo)
        before = sorted((info.key, info.etag) for info in store.list())
        if code is Code.DAMAGED_LOCK:
            planned = gc.plan(repo, min_age=0)
            with pytest.raises(Locked):
                gc.apply(repo, planned)
            assert sorted((info.key, info.etag) for info in store.list()) == before
            gc.apply(repo, planned, break_lock=True)
            assert fsck.check(repo).is_clean
        elif code in HARMLESS:
            gc.apply(repo, gc.plan(repo, min_age=0))
            assert fsck.check(repo).is_clean
            assert len(repo.log("main")) == 3
        else:
            with pytest.raises(IntegrityError, match="fsck has a finding"):
                gc.plan(repo, min_age=0)
            assert sorted((info.key, info.etag) for info in store.list()) == before


def test_a_whole_repository_is_clean(repo: Repository) -> None:
    assert fsck.check(repo).is_clean
    snapshot(repo, halves(3))
    report = fsck.check(repo)
    assert report.is_clean and report.is_whole
    assert (report.snapshots, report.pages, report.read_pages) == (1, 6, True)
    assert not fsck.check(repo, read_pages=False).read_pages


def test_progress_ends_with_all_pages(repo: Repository) -> None:
    snapshot(repo, halves(8))
    calls: list[tuple[int, int]] = []
    fsck.check(repo, progress=lambda done, of: calls.append((done, of)))
    assert calls[-1] == (16, 16)


def test_a_key_that_is_no_cid_is_stray(repo: Repository) -> None:
    for key in ("snapshots/README", "manifests/aa"):
        repo.store.put(key, b"?")
    assert [finding.code for finding in fsck.check(repo).findings] == [Code.STRAY_OBJECT] * 2


def test_junk_among_the_damage_marks_is_ignored(repo: Repository) -> None:
    snapshot(repo, halves(1))
    repo.store.put("damaged/zz/not-hex", b"")
    with Repository.open(repo.store) as again:
        assert fsck.check(again).is_clean


def test_a_manifest_of_another_digest_algorithm_is_a_finding(repo: Repository) -> None:
    first = snapshot(repo, halves(1))
    foreign = manifest(halves(1), algorithm="sha256")
    repo.objects.put_manifests([foreign])
    made = type(first)((foreign.cid,), (first.cid,), 4)
    repo.objects.put_snapshots([made])
    repo.refs.create(RefKind.TAG, "foreign", made.cid)
    assert [finding.code for finding in fsck.check(repo).findings] == [Code.DAMAGED_MANIFEST]


def test_one_flipped_bit_anywhere_is_found_or_harmless(store: Store) -> None:
    """In every object of a small repository, at a few places each."""
    with Repository.init(store) as repo:
        made = snapshot(repo, halves(1))
        repo.tag("v1", made.cid)
    for key in [info.key for info in store.list()]:
        whole = store.get(key)
        for at in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 70, len(whole) - 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            store.put(key, damaged)
            try:
                with Repository.open(store) as repo:
                    clean = fsck.check(repo).is_clean
            except Exception as error:
                assert key == "kvist.json", (key, error)
            else:
                assert not clean or key == "kvist.json", (key, at)
            store.put(key, whole)
            store.delete([info.key for info in store.list("damaged/")])
    with Repository.open(store) as repo:
        assert fsck.check(repo).is_clean


def test_stores_that_lost_everything_but_the_refs(repo: Repository) -> None:
    made = snapshot(repo, halves(1))
    repo.store.delete([snapshot_key(made.cid), manifest_key(made.manifests[0])])
    report = fsck.check(repo)
    assert [(f.code, f.subject, f.affects) for f in report.findings] == [
        (Code.DANGLING_REF, "branch main", (made.cid,))
    ]


def test_a_ref_that_moves_during_the_check_gives_no_false_finding(repo: Repository) -> None:
    """Another process moves the branch away and collects, just after the check has read it."""
    old = snapshot(repo, halves(1))
    other = Repository.open(repo.store)
    new = snapshot(other, halves(1, 5), branch="other")
    original = repo.objects.snapshot
    moved = []

    def late(cid: str) -> object:
        if cid == old.cid and not moved:
            moved.append(cid)
            other.branch("main", new.cid, move=True)
            gc.apply(other, gc.plan(other, min_age=0))
        return original(cid)

    repo.objects.snapshot = late  # type: ignore[method-assign,assignment]
    assert fsck.check(repo).is_clean
    assert moved
    other.pages.close()


def test_pages_rewritten_during_the_check_give_no_false_finding(repo: Repository) -> None:
    data = halves(4)
    repo.put_pages(data)
    made = repo.commit([manifest(data[:2])], branch="main")
    other = Repository.open(repo.store)
    original = repo.pages.verify
    done = []

    def late(*args: object, **more: object) -> object:
        if not done:
            done.append(gc.apply(other, gc.plan(other, min_age=0)))
        return original(*args, **more)  # type: ignore[arg-type]

    repo.pages.verify = late  # type: ignore[method-assign,assignment]
    assert fsck.check(repo).is_clean
    assert done[0].repack
    assert read_back(repo, made.cid) == data[:2]
    assert repo.pages.size(digest(data[3])) is None
    other.pages.close()


def test_a_commit_during_the_check_gives_no_false_finding(repo: Repository) -> None:
    other = Repository.open(repo.store)
    original = repo.refs.names
    done = []

    def late(kind: RefKind) -> list[str]:
        if not done:
            done.append(snapshot(other, halves(1)))
        return original(kind)

    repo.refs.names = late  # type: ignore[method-assign]
    assert fsck.check(repo).is_clean
    other.pages.close()


def test_a_lock_with_nonsense_in_it_is_damaged(repo: Repository) -> None:
    for record in (
        b"",
        b"[]",
        b'{"host":1,"objects":[],"pages":[],"pid":1,"repacked":[],"segments":[],"started":0}',
        b'{"host":"h","objects":[],"pages":[],"pid":"1","repacked":[],"segments":[],"started":0}',
        b'{"host":"h","objects":[[]],"pages":[],"pid":1,"repacked":[],"segments":[],"started":0}',
        b'{"host":"h","objects":[],"pages":[],"pid":1,"repacked":[],"segments":[],"started":"x"}',
    ):
        repo.store.put(lock.KEY, record)
        assert [finding.code for finding in fsck.check(repo).findings] == [Code.DAMAGED_LOCK]
        with pytest.raises(Locked, match="unreadable"):
            snapshot(repo, halves(1))
        assert repo.refs.read(RefKind.BRANCH, "main") is None
