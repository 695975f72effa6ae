import contextlib
import fcntl
import itertools
import json
import os
from pathlib import Path

import pytest

from kvist.errors import (
    AlreadyExists,
    Conflict,
    DamagedPage,
    IntegrityError,
    InvalidManifest,
    Locked,
    NotFound,
    StoreError,
    StoreFull,
)
from kvist.repo import RefKind, Repository, fsck, gc, lease, lock, objects, record, witness
from kvist.repo.witness import Witness
from kvist.store import LocalStore, MemoryStore, ObjectWriter, Store, WrapperStore
from kvist.testing.faults import CrashingStore, Refuse, Rot, SimulatedCrash
from kvist.testing.faulty import FaultyStore

from .making import LAYOUT, digest, halves, manifest, read_back, snapshot


def collect(repo: Repository) -> gc.GcPlan:
    return gc.apply(repo, gc.plan(repo, min_age=0))


def cids(repo: Repository) -> set[str]:
    return {cid for cid, _ in repo.objects.snapshots()}


def keys(store: Store) -> list[str]:
    return [info.key for info in store.list()]


def test_an_empty_repository_has_nothing_to_collect(repo: Repository) -> None:
    plan = gc.plan(repo, min_age=0)
    assert plan.is_empty and gc.apply(repo, plan).is_empty
    assert keys(repo.store) == ["kvist.json"]


def test_snapshots_that_refs_reach_stay_and_the_rest_goes(repo: Repository) -> None:
    kept = [snapshot(repo, halves(1, i)) for i in range(3)]
    tagged = snapshot(repo, halves(1, 10), None)
    repo.tag("v1", tagged.cid)
    gone = snapshot(repo, halves(1, 20), None)
    plan = gc.plan(repo, min_age=0)
    assert plan.snapshots == (gone.cid,) and plan.manifests == gone.manifests and len(plan.segments) == 1
    assert gone.cid in cids(repo), "a plan changes nothing"
    before = sum(info.size for info in repo.store.list())
    done = gc.apply(repo, plan)
    assert done == plan
    assert before - sum(info.size for info in repo.store.list()) >= plan.delete_bytes
    assert cids(repo) == {each.cid for each in (*kept, tagged)}
    assert gc.plan(repo, min_age=0).is_empty
    assert json.loads(json.dumps(plan.to_json()))["lost_pages"] == 0
    assert "delete 1 snapshots, 1 manifests, 1 segments" in plan.summary()


def test_what_is_young_stays_with_all_it_needs(repo: Repository) -> None:
    old = snapshot(repo, halves(2), None)
    young = snapshot(repo, halves(2), None, parents=[old.cid])
    assert gc.plan(repo).is_empty
    gc.apply(repo, gc.plan(repo))
    assert read_back(repo, young.cid) == read_back(repo, old.cid) == halves(2)


def test_a_deleted_branch_frees_its_snapshots(repo: Repository) -> None:
    snapshot(repo, halves(2), "a")
    shared = snapshot(repo, halves(2) + halves(2, 1), "b")
    repo.delete_ref(RefKind.BRANCH, "a")
    collect(repo)
    assert cids(repo) == {shared.cid}
    assert read_back(repo, "b") == halves(2) + halves(2, 1)


def test_a_sparse_segment_is_rewritten(repo: Repository) -> None:
    data = halves(8)
    repo.put_pages(data)
    repo.commit([manifest(data[:4])], branch="main")
    plan = gc.plan(repo, min_age=0)
    assert len(plan.repack) == 1 and plan.copy_bytes == 4 * LAYOUT.page_bytes and len(plan.lost_pages) == 12
    calls: list[tuple[int, int]] = []
    gc.apply(repo, plan, progress=lambda done, of: calls.append((done, of)))
    assert calls[-1] == (4, 4)
    assert read_back(repo, "main") == data[:4]
    assert [segment.data_bytes for segment in repo.pages.segments()] == [4 * LAYOUT.page_bytes]
    assert gc.plan(repo, min_age=0).is_empty


def test_a_segment_at_half_is_left(repo: Repository) -> None:
    data = halves(8)
    repo.put_pages(data)
    repo.commit([manifest(data[:8])], branch="main")
    assert gc.plan(repo, min_age=0).is_empty


def two_copies(repo: Repository, data: list[bytes]) -> None:
    """Two writers at the same moment store the same pages."""
    other = Repository.open(repo.store)
    other.pages.refresh = lambda: None  # type: ignore[method-assign]
    repo.put_pages(data)
    other.pages.put(data)
    other.pages.close()
    repo.pages.refresh()


def test_a_second_copy_goes_and_is_not_copied(repo: Repository) -> None:
    data = halves(4)
    two_copies(repo, data)
    repo.commit([manifest(data)], branch="main")
    assert len(repo.pages.segments()) == 2
    plan = collect(repo)
    assert plan.copy_bytes == 0 and len(plan.segments) == 1
    assert gc.plan(repo, min_age=0).is_empty
    assert read_back(repo, "main") == data


def test_the_only_good_copy_is_saved_when_the_one_that_stays_is_silently_damaged(repo: Repository) -> None:
    data = halves(4)
    two_copies(repo, data)
    repo.commit([manifest(data)], branch="main")
    stays = repo.pages.homes(digest(data[0]))[0]
    damaged = bytearray(repo.store.get(stays))
    damaged[5] ^= 1
    repo.store.put(stays, damaged)
    collect(repo)
    assert read_back(repo, "main") == data
    assert fsck.check(repo).is_clean


def test_what_is_named_between_plan_and_apply_stays(repo: Repository) -> None:
    data = halves(4)
    lost = snapshot(repo, data, None)
    child = snapshot(repo, data[:2], None, parents=[lost.cid])
    plan = gc.plan(repo, min_age=0)
    assert plan.snapshots == (child.cid, lost.cid), "children first"
    repo.branch("found", child.cid)
    done = gc.apply(repo, plan)
    assert done.is_empty and done.delete_bytes == 0
    assert read_back(repo, "found") == data[:2] and read_back(repo, lost.cid) == data


def test_what_an_unplanned_snapshot_needs_stays_too(repo: Repository) -> None:
    """Else that snapshot, which stays, could be named later, and would have no whole past."""
    old = snapshot(repo, halves(2), None)
    plan = gc.plan(repo, min_age=0)
    new = snapshot(repo, halves(2, 1), None, parents=[old.cid])
    newer = snapshot(repo, halves(2, 2), None, parents=[new.cid])
    assert gc.apply(repo, plan).is_empty
    repo.branch("main", newer.cid)
    assert fsck.check(repo).is_clean and len(repo.log("main")) == 3


def test_what_died_between_plan_and_apply_waits_for_the_next(repo: Repository) -> None:
    made = snapshot(repo, halves(2))
    plan = gc.plan(repo, min_age=0)
    repo.delete_ref(RefKind.BRANCH, "main")
    gc.apply(repo, plan)
    assert cids(repo) == {made.cid}
    collect(repo)
    assert keys(repo.store) == ["kvist.json", "refs/branches/main.ref"]


def test_a_broken_segment_stays_while_a_lease_needs_what_may_be_in_it(repo: Repository) -> None:
    """A live engine knows its index, and reads it well."""
    made = snapshot(repo, halves(3), None)
    with lease.hold(repo, cids=[made.cid]), Repository.open(repo.store) as other:
        (segment,) = repo.pages.segments()
        broken = bytearray(repo.store.get(segment.key))
        broken[-20] ^= 1
        repo.store.put(segment.key, broken)
        assert collect(other).is_empty
        assert read_back(repo, made.cid) == halves(3)
    assert collect(repo).segments == (segment.key,)


def test_marks_of_segments_that_are_gone_go(repo: Repository) -> None:
    made = snapshot(repo, halves(1), None)
    for segment in repo.pages.segments():
        repo.store.put(segment.key, b"x" * 10 + repo.store.get(segment.key)[10:])
    with pytest.raises(DamagedPage):
        read_back(repo, made.cid)
    repo.store.put("damaged/00000000000000000000000000000000/" + "ab" * 32, b"")
    assert len([*repo.store.list("damaged/")]) == 2
    collect(repo)
    assert keys(repo.store) == ["kvist.json"]


def test_an_undiscovered_damage_in_a_page_to_copy_stops_it(repo: Repository) -> None:
    data = halves(8)
    repo.put_pages(data)
    repo.commit([manifest(data[:2])], branch="main")
    plan = gc.plan(repo, min_age=0)
    (key,) = plan.repack
    repo.store.put(key, b"x" + repo.store.get(key)[1:])
    with pytest.raises(DamagedPage):
        gc.apply(repo, plan)
    assert repo.store.head(key) is not None and lock.holder(repo.store) is None
    with pytest.raises(IntegrityError):
        gc.plan(repo, min_age=0)
    repo.put_pages(data)
    collect(repo)
    assert read_back(repo, "main") == data[:2]


def test_leftovers_of_dead_writers_go(tmp_path: Path) -> None:
    with Repository.init(LocalStore(tmp_path)) as repo:
        snapshot(repo, halves(1))
        left = tmp_path / ".tmp" / "1-dead"
        left.write_bytes(b"half a segment")
        assert fsck.check(repo).is_clean
        gc.apply(repo, gc.plan(repo))
        assert left.exists(), "young"
        collect(repo)
        assert not left.exists()


# -- a writer that dies between publishing and looking ---------------------------------------------------------------


def test_a_ref_that_came_after_the_survey_is_seen_before_the_first_delete(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = snapshot(repo, halves(2), None)
    gone = snapshot(repo, halves(2, 1), None)
    survey, surveys = gc._survey, 0

    def publish_after(*args: object) -> object:
        nonlocal surveys
        surveys += 1
        found = survey(*args)  # type: ignore[arg-type]
        if surveys == 2:  # the first is the plan's
            repo.refs.create(RefKind.BRANCH, "main", made.cid)  # and is killed before it looks
        return found

    monkeypatch.setattr(gc, "_survey", publish_after)
    assert collect(repo).snapshots == (gone.cid,)
    assert surveys == 3
    assert read_back(repo, "main") == halves(2) and fsck.check(repo).is_clean


def test_refs_that_never_hold_still_do_not_starve_the_gc(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    named, gone = snapshot(repo, halves(1)), snapshot(repo, halves(1, 1), None)
    plan = gc.plan(repo, min_age=0)
    survey, surveys = gc._survey, 0

    def and_another(*args: object) -> object:
        nonlocal surveys
        surveys += 1
        repo.refs.create(RefKind.TAG, f"v{surveys}", named.cid)
        return survey(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gc, "_survey", and_another)
    assert gc.apply(repo, plan).snapshots == (gone.cid,)
    assert surveys == 3 and lock.holder(repo.store) is None
    assert read_back(repo, "v3") == halves(1) and fsck.check(repo).is_clean


# -- the lock ------------------------------------------------------------------------------------------------------


def test_one_gc_at_a_time(repo: Repository) -> None:
    plan = gc.plan(repo, min_age=0)
    held = lock.acquire(repo.store, lock.Condemned())
    with pytest.raises(Locked, match=f"process {os.getpid()}"):
        gc.apply(repo, plan)
    gc.apply(repo, plan, break_lock=True)
    assert lock.holder(repo.store) is None
    lock.release(repo.store, held)


def test_whoever_lost_the_lock_does_not_release_the_new_holders(repo: Repository) -> None:
    first = lock.acquire(repo.store, lock.Condemned())
    second = lock.acquire(repo.store, lock.Condemned(), break_lock=True)
    lock.release(repo.store, first)
    assert lock.holder(repo.store) is not None
    lock.release(repo.store, second)
    assert lock.holder(repo.store) is None


def test_a_named_manifest_that_cannot_be_read_after_fsck_has_keeps_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: once while planning, and once while making sure."""
    monkeypatch.setattr(objects, "_MANIFESTS_KEPT", 1)
    refused = 0
    for first, second in itertools.combinations(range(1, 16), 2):
        store = MemoryStore()
        with Repository.init(store) as repo:
            for seed in range(2):
                snapshot(repo, halves(1, seed))
            unreadable = Rot(ops={"get"}, prefix="manifests/", at={first, first + 1, second, second + 1}, how="flip")
            with Repository.open(FaultyStore(store, unreadable)) as failing:
                try:
                    collect(failing)
                except (IntegrityError, InvalidManifest):
                    refused += 1
            assert [read_back(repo, each.cid) for each in repo.log()] == [halves(1, seed) for seed in (1, 0)]
    assert refused


def test_a_gc_that_could_not_withdraw_holds_nobody_up(repo: Repository) -> None:
    """Its process lives on, and so would its lock."""
    made = snapshot(repo, halves(1), None)
    store = FaultyStore(repo.store, Refuse(ops={"delete"}, prefix="locks/"))
    with Repository.open(store) as failing, pytest.raises(StoreError, match="as was wished"):
        collect(failing)
    assert lock.condemned(repo.store) == lock.Condemned() and cids(repo) == set()
    snapshot(repo, halves(1))
    assert collect(repo).is_empty and lock.holder(repo.store) is None
    assert made.manifests[0] in {cid for cid, _ in repo.objects.manifests()}


def test_an_announcement_whose_answer_was_lost_is_our_own(repo: Repository) -> None:
    """A store that tries again by itself then meets what it has written."""
    store = FaultyStore(repo.store, Refuse(ops={"put"}, prefix="locks/", after=True, error=AlreadyExists, times=1))
    held = lock.acquire(store, lock.Condemned())
    lock.release(store, held)
    assert lock.holder(repo.store) is None
    store = FaultyStore(repo.store, Refuse(ops={"put"}, prefix="locks/", after=True))
    with pytest.raises(StoreError, match="answer was lost"):
        lock.acquire(store, lock.Condemned())
    assert repo.store.head(lock.KEY) is None, "nobody else could ever tell that this gc never ran"


def test_only_what_has_surely_ended_loses_its_lock(repo: Repository) -> None:
    held = lock.acquire(repo.store, lock.Condemned(objects=frozenset(["x"])))
    assert lock.condemned(repo.store).objects == {"x"}
    with pytest.raises(Locked, match=f"process {os.getpid()}"):
        lock.acquire(repo.store, lock.Condemned())
    held.close()  # as the kernel does when the process ends
    assert lock.condemned(repo.store) == lock.Condemned()
    again = lock.acquire(repo.store, lock.Condemned())
    lock.release(repo.store, held)
    assert lock.holder(repo.store) is not None
    lock.release(repo.store, again)
    assert not [token for token in (held.token, again.token) if witness._path(token).exists()]


@pytest.mark.parametrize("change", [{"pid": 1}, {"pid": 2**40}, {"host": "elsewhere"}])
def test_a_number_that_another_process_has_now_hides_no_death(repo: Repository, change: dict[str, object]) -> None:
    """After a reboot, or much work, in a container that was started again, or on a machine that was renamed."""
    held = lock.acquire(repo.store, lock.Condemned(objects=frozenset(["x"])))
    repo.store.put(lock.KEY, record.encode(lock.KEY, record.decode(lock.KEY, repo.store.get(lock.KEY)) | change))
    assert lock.condemned(repo.store).objects == {"x"}
    held.close()
    lock.release(repo.store, lock.acquire(repo.store, lock.Condemned()))


def test_a_machine_that_only_looks_alike_knows_nothing(
    repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two made of one image have one host name and machine id, and neither can ask for the other's processes."""
    made = snapshot(repo, halves(1), None)
    held = lock.acquire(repo.store, gc._condemned(gc.plan(repo, min_age=0)))
    monkeypatch.setattr(witness, "_DIRECTORY", tmp_path)  # the other's disk
    with pytest.raises(Conflict):
        repo.branch("main", made.cid)
    held.close()
    with pytest.raises(Locked):
        lock.acquire(repo.store, lock.Condemned())
    monkeypatch.undo()
    lock.release(repo.store, held)


def test_a_witness_is_not_believed_of_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "_DIRECTORY", tmp_path)
    made = Witness()
    made.close()
    assert witness.is_dead(made.token) and not witness.is_dead("../" + made.token)
    if os.getuid() == 0:
        os.chown(witness._path(made.token), 4711, -1)
        assert not witness.is_dead(made.token)
    witness.remove(made.token)
    assert not witness.is_dead(made.token) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fails", ["open", "flock"])
def test_where_no_witness_can_be_made_nobody_takes_a_live_gc_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("read-only, or a file system without locks")

    monkeypatch.setattr(witness, "_DIRECTORY", tmp_path)
    with monkeypatch.context() as failing:
        failing.setattr(*((os, "open") if fails == "open" else (fcntl, "flock")), fail)
        held = Witness()
    held.close()
    assert not witness.is_dead(held.token) and not [*tmp_path.iterdir()]


def test_all_that_is_announced_is_read_once(repo: Repository) -> None:
    """It may be many megabytes, and each put asks for it."""
    store = FaultyStore(repo.store)
    held = lock.acquire(repo.store, lock.Condemned(pages=frozenset(["x"])))
    for calls in (2, 3, 4):
        assert lock.condemned(store).pages == {"x"} and store.calls == calls, "and then only looked for"
    lock.release(repo.store, held)
    held = lock.acquire(repo.store, lock.Condemned(pages=frozenset(["y"])))
    assert lock.condemned(store).pages == {"y"}
    lock.release(repo.store, held)
    assert lock.condemned(store) == lock.Condemned()


def test_condemned_pages() -> None:
    condemned = lock.Condemned(segments=frozenset("a"), repacked=frozenset("b"), pages=frozenset("p"))
    assert condemned.loses("p", []) and condemned.loses("p", "ab") and condemned.loses("q", "a")
    assert not condemned.loses("q", "b") and not condemned.loses("q", "ab") and not condemned.loses("p", "abc")
    assert not lock.Condemned().loses("p", "a") and lock.Condemned().loses("p", [])


# -- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 14))
def test_a_crash_at_any_write_of_a_gc(store: Store, at: int, after: bool) -> None:
    with Repository.init(store) as repo:
        data = halves(8)
        repo.put_pages(data)
        repo.commit([manifest(data[:4])], branch="main")
        last: list[str] = []
        for i in range(3):
            last = [snapshot(repo, halves(1, i), None, parents=last).cid]
        dying = Repository.open(CrashingStore(store, at, after=after))
        plan = gc.plan(dying, min_age=0)
        with contextlib.suppress(SimulatedCrash):
            gc.apply(dying, plan)
        dying.pages.close()
        again = Repository.open(store)
        assert fsck.check(again).is_clean
        assert read_back(again, "main") == data[:4]
        for cid in cids(again):
            if not cids(again).issuperset(again.objects.snapshot(cid).parents):
                with pytest.raises(NotFound):  # parents went first, as some stores do it
                    again.branch("headless", cid)
        collect(again)
        assert read_back(again, "main") == data[:4]
        assert len(cids(again)) == 1 and len(again.pages.segments()) == 1
        assert gc.plan(again, min_age=0).is_empty
        again.pages.close()


def test_a_full_store_is_emptied_of_what_is_wholly_dead(store: Store) -> None:
    class Full(WrapperStore):
        is_full = False

        def writer(self, key: str) -> ObjectWriter:
            if self.is_full:
                raise StoreFull("no space is left")
            return super().writer(key)

    full = Full(store)
    with Repository.init(full) as repo:
        data = halves(8)
        repo.put_pages(data)
        repo.commit([manifest(data[:4])], branch="main")
        snapshot(repo, halves(3, 1), None)
        plan = gc.plan(repo, min_age=0)
        assert len(plan.repack) == len(plan.segments) == 1
        full.is_full = True
        done = gc.apply(repo, plan)
        assert done.segments == plan.segments and not done.repack and done.copy_bytes == 0
        assert done.delete_bytes == plan.delete_bytes - 16 * LAYOUT.page_bytes
        assert read_back(repo, "main") == data[:4] and fsck.check(repo).is_clean
        full.is_full = False
        assert collect(repo).repack == plan.repack
        assert read_back(repo, "main") == data[:4]
