import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvist.errors import IntegrityError, InvalidInput, Locked, NotFound, StoreError
from kvist.repo import RefKind, Repository, fsck, gc, lock, repair
from kvist.repo.fsck import Code
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.repo.scan import Cursor
from kvist.repo.segment import Segment
from kvist.store import LocalStore, Range, ReadOnlyStore, Store, WrapperStore

from .damaged import FIXTURES, build
from .making import LAYOUT, digest, halves, manifest, read_back, snapshot

HARMLESS = {Code.DAMAGED_SEGMENT, Code.STRAY_OBJECT, Code.DAMAGED_COPY, Code.DAMAGED_SIGNATURE}


@pytest.fixture(params=["built", "fixture"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path, code: Code) -> Path:
    """Made by today's code, or by the code that wrote the fixture: fsck must still name what is wrong."""
    root = tmp_path / "damaged"
    if request.param == "built":
        build(root, code)
    else:
        shutil.copytree(FIXTURES / code.value, root, copy_function=shutil.copy)  # not their age
    return root


@pytest.mark.parametrize("code", Code)
def test_each_kind_of_damage_is_named_and_nothing_else(damaged: Path, code: Code) -> None:
    with Repository.open(LocalStore(damaged, durable=False)) as repo:
        before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
        for _ in range(2):
            report = fsck.check(repo)
            found = {finding.code for finding in report.findings}
            assert found == {code}, report.findings
            assert not report.is_clean
            assert all(finding.subject and finding.detail and finding.mend for finding in report.findings)
            assert report.is_whole == (code in HARMLESS | {Code.DAMAGED_LOCK, Code.DAMAGED_LEASE})
        assert report.to_json()["clean"] is False
        assert before == {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", Code)
def test_gc_refuses_while_something_reachable_is_missing_or_marked(damaged: Path, code: Code) -> None:
    store = LocalStore(damaged, durable=False)
    with Repository.open(store) as repo:
        _read_everything(repo)  # so that the damage is marked
        before = sorted((info.key, info.etag) for info in store.list())
        if code is Code.DAMAGED_LOCK:
            planned = gc.plan(repo, min_age=0)
            with pytest.raises(Locked):
                gc.apply(repo, planned)
            assert sorted((info.key, info.etag) for info in store.list()) == before
            gc.apply(repo, planned, break_lock=True)
            assert fsck.check(repo).is_clean
        elif code is Code.DAMAGED_LEASE:
            with pytest.raises(Locked, match="is unreadable"):
                gc.plan(repo, min_age=0)
        elif code in HARMLESS:
            gc.apply(repo, gc.plan(repo, min_age=0))
            left = {finding.code for finding in fsck.check(repo).findings}
            assert left <= {Code.DAMAGED_SIGNATURE}, "nobody but its maker can mend it"
            assert len(repo.log("main")) == 3
        else:
            with pytest.raises(IntegrityError, match="fsck has a finding"):
                gc.plan(repo, min_age=0)
            assert sorted((info.key, info.etag) for info in store.list()) == before


def _read_everything(repo: Repository) -> None:
    for cid, _ in repo.objects.snapshots():
        with contextlib.suppress(IntegrityError, InvalidInput, NotFound):
            read_back(repo, cid)


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
    assert calls[-1] == (16 * LAYOUT.page_bytes, 16 * LAYOUT.page_bytes)


def test_a_key_that_is_no_cid_is_stray(repo: Repository) -> None:
    for key in ("snapshots/README", "manifests/aa"):
        repo.store.put(key, b"?")
    assert [finding.code for finding in fsck.check(repo).findings] == [Code.STRAY_OBJECT] * 2


@pytest.mark.parametrize("junk", ["ab" * 32, "abcd", "AB" * 32, "not-hex"])
def test_a_mark_that_fits_no_page_is_stray_and_does_no_harm(repo: Repository, junk: str) -> None:
    data = halves(1)
    snapshot(repo, data)
    key = f"damaged/{repo.pages.segments()[0].key.removeprefix('segments/')}/{junk}"
    repo.store.put(key, b"")
    with Repository.open(repo.store) as again:
        findings = fsck.check(again).findings
        assert [(one.code, one.subject, one.affects) for one in findings] == [(Code.STRAY_OBJECT, key, ())]
        planned = repair.plan(again)
        assert planned.is_empty and [one.subject for one in planned.left] == [key]
        assert read_back(again, "main") == data


def test_the_mark_of_a_segment_that_is_gone_waits_for_the_next_gc(repo: Repository) -> None:
    repo.store.put(f"damaged/{0:032x}/{'ab' * 32}", b"")
    assert fsck.check(repo).is_clean


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
    original = repo.pages.segments
    done = []

    def late() -> list[Segment]:
        found = original()
        if not done:
            done.append(gc.apply(other, gc.plan(other, min_age=0)))
        return found

    repo.pages.segments = late  # type: ignore[method-assign]
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


# -- a check that is stopped and goes on ---------------------------------------------------------------------------


class Slow(WrapperStore):
    """Gives pages in small portions, one at a time, and counts them."""

    window, parallel = 2 * LAYOUT.page_bytes, 1
    reads = 0

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        self.reads += 1
        time.sleep(0.002)
        super().get_ranges(key, ranges)


def test_a_check_that_was_stopped_goes_on(tmp_path: Path) -> None:
    store = Slow(LocalStore(tmp_path / "store", durable=False))
    path = tmp_path / "cache" / "cursor.json"
    with Repository.init(store) as repo:
        for seed in range(3):
            snapshot(repo, halves(20, seed))
        rounds = 0
        read = 0
        while True:
            report = fsck.check(repo, cursor=Cursor.load(path), max_duration=0.005)
            rounds += 1
            read += report.bytes_read
            assert report.is_clean and report.bytes_done == read and report.bytes_all == 120 * LAYOUT.page_bytes
            if report.complete:
                break
            assert 0 < report.bytes_read < report.bytes_all and path.exists()
        assert rounds > 2 and read == report.bytes_all, "each page was read once"
        assert not path.exists(), "a full pass begins anew"
        assert fsck.check(repo, cursor=Cursor.load(path)).bytes_read == report.bytes_all


def test_what_an_earlier_part_found_is_told_until_it_is_mended(tmp_path: Path) -> None:
    store = Slow(LocalStore(tmp_path / "store", durable=False))
    path = tmp_path / "cursor.json"
    with Repository.init(store) as repo:
        data = halves(20)
        snapshot(repo, data)
        key = repo.pages.segments()[0].key
        whole = store.get(key)
        store.put(key, bytes([whole[0] ^ 1]) + whole[1:])
        first = fsck.check(repo, cursor=Cursor.load(path), max_duration=0)
        assert not first.complete and [f.subject for f in first.findings] == [digest(data[0])]
        second = fsck.check(repo, cursor=Cursor.load(path), max_duration=0)
        assert not second.complete and [f.subject for f in second.findings] == [digest(data[0])]
        assert second.bytes_done > first.bytes_done
        store.put(key, whole)
        assert fsck.check(repo, cursor=Cursor.load(path), max_duration=0).is_clean


def test_segments_that_come_and_go_between_the_parts(tmp_path: Path) -> None:
    store = Slow(LocalStore(tmp_path / "store", durable=False))
    path = tmp_path / "cursor.json"
    with Repository.init(store) as repo:
        snapshot(repo, halves(20), "a")
        snapshot(repo, halves(20, 1), "b")
        fsck.check(repo, cursor=Cursor.load(path), max_duration=0.03)
        repo.delete_ref(RefKind.BRANCH, "a")
        gc.apply(repo, gc.plan(repo, min_age=0))
        snapshot(repo, halves(20, 2), "c")
        report = fsck.check(repo, cursor=Cursor.load(path))
        assert report.is_clean and report.complete and report.bytes_all == 80 * LAYOUT.page_bytes


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version":1,"done":{"a":"b"},"bad":[]}', b'{"version":2}'])
def test_a_cursor_that_cannot_be_read_begins_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cursor.json"
    path.write_bytes(content)
    assert Cursor.load(path) == Cursor(path)


def test_a_store_that_takes_no_writes_can_be_checked(repo: Repository) -> None:
    data = halves(2)
    snapshot(repo, data)
    with Repository.open(ReadOnlyStore(repo.store)) as readonly:
        assert fsck.check(readonly).is_clean
    key = repo.pages.segments()[0].key
    repo.store.put(key, b"x" + repo.store.get(key)[1:])
    with Repository.open(ReadOnlyStore(repo.store)) as readonly:
        for _ in range(2):
            (finding,) = fsck.check(readonly).findings
            assert (finding.code, finding.subject) == (Code.DAMAGED_PAGE, digest(data[0]))
        assert fsck.check(readonly, read_pages=False).is_clean, "nobody has read it"


def test_one_wrong_byte_on_the_way_is_no_damage(store: Store) -> None:
    class Noisy(WrapperStore):
        noise = True
        has_views = False  # type: ignore[assignment]

        def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
            super().get_ranges(key, ranges)
            if self.noise:
                ranges[0].out[0] ^= 1
                self.noise = False

    with Repository.init(Noisy(store)) as repo:
        snapshot(repo, halves(2))
        assert fsck.check(repo).is_clean
        assert not repo.store.noise  # type: ignore[attr-defined]


def test_a_store_out_of_reach_is_no_finding(repo: Repository) -> None:
    made = snapshot(repo, halves(1))

    class Away(WrapperStore):
        def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
            if key == snapshot_key(made.cid):
                raise StoreError("no route to host")
            return super().get(key, start=start, size=size)

    with Repository.open(Away(repo.store)) as away, pytest.raises(StoreError, match="no route"):
        fsck.check(away)
