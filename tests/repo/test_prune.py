import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import Conflict, IntegrityError, InvalidInput, Locked, NotFound
from kvist.repo import RefKind, Repository, Snapshot, fsck, gc, lease, marks, prune, stats
from kvist.repo.objects import snapshot_key
from kvist.repo.prune import Rules
from kvist.repo.refs import Refs
from kvist.store import MemoryStore, ObjectInfo, Store, WrapperStore
from kvist.testing.faults import CrashingStore, SimulatedCrash

from .making import LAYOUT, halves, manifest, read_back, snapshot

HALF = LAYOUT.page_bytes
DAY = 86400
NOW = 1_700_000_000  # Tuesday 2023-11-14, 22:13:20


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands still for prune; leases go by the real one."""
    monkeypatch.setattr(prune, "time", SimpleNamespace(time=lambda: float(NOW)))


def grow(
    repo: Repository, ages: Sequence[float], branch: str = "main", seed: int = 0, **more: object
) -> list[Snapshot]:
    """Snapshots of those ages in seconds, oldest first, each with one page of its own and one of all."""
    made = []
    tip = repo.refs.read(RefKind.BRANCH, branch)
    for number, age in enumerate(ages):
        data = halves(1, 1000) + halves(1, seed + number)
        repo.put_pages(data)
        listed = manifest(data)
        repo.objects.put_manifests([listed])
        parents = (tip.cid,) if tip is not None else ()
        one = Snapshot((listed.cid,), parents, 8, created_ns=int((NOW - age) * 1e9), **more)  # type: ignore[arg-type]
        repo.objects.put_snapshots([one])
        tip = repo.refs.move(tip, one.cid) if tip is not None else repo.refs.create(RefKind.BRANCH, branch, one.cid)
        made.append(one)
    return made


def pruned(repo: Repository, **rules: object) -> set[str]:
    return set(prune.plan(repo, Rules(**rules)).snapshots)  # type: ignore[arg-type]


def collect(repo: Repository) -> gc.GcPlan:
    return gc.apply(repo, gc.plan(repo, min_age=0))


# -- rules ---------------------------------------------------------------------------------------------------------


def test_the_last_so_many_are_kept(repo: Repository) -> None:
    made = grow(repo, [5, 4, 3, 2, 1])
    planned = prune.plan(repo, Rules(last=2))
    assert planned.snapshots == tuple(one.cid for one in made[:3]), "oldest first"
    assert planned.kept_snapshots == 2
    assert (planned.kept_bytes, planned.free_bytes) == (6 * HALF, 6 * HALF)
    assert json.loads(json.dumps(planned.to_json()))["rules"]["last"] == 2
    assert "prune 3 snapshots" in planned.summary()
    assert not marks.pruned(repo.store), "a plan changes nothing"


def test_days_weeks_and_months_keep_the_newest_of_each() -> None:
    repo = Repository.init(MemoryStore())
    hours = [one.cid for one in grow(repo, [3600 * hour for hour in range(24 * 70, -1, -6)])]
    by_age = {6 * (len(hours) - 1 - number): cid for number, cid in enumerate(hours)}
    assert set(hours) - pruned(repo, daily=3) == {by_age[0], by_age[24], by_age[48]}
    # it is Tuesday, 22:13: the newest of the weeks before are from Sunday, 22:13
    assert set(hours) - pruned(repo, weekly=3) == {by_age[0], by_age[48], by_age[48 + 168]}
    # and of the months before from the last day of October and September
    assert set(hours) - pruned(repo, monthly=9) == {by_age[0], by_age[24 * 14], by_age[24 * 45]}
    assert set(hours) - pruned(repo, daily=2, weekly=2) == {by_age[0], by_age[24], by_age[48]}
    repo.close()


def test_a_day_without_snapshots_does_not_count(repo: Repository) -> None:
    made = grow(repo, [30 * DAY, 29 * DAY, 3 * DAY, 0])
    assert pruned(repo, daily=3) == {made[0].cid}


def test_within_and_labels(repo: Repository) -> None:
    old = grow(repo, [100], message="release 1\nmore")
    made = grow(repo, [90, 80], seed=10)
    named = grow(repo, [70], seed=20, name="keep/me")
    grow(repo, [10], seed=30)
    assert pruned(repo, within=85.0) == {old[0].cid, made[0].cid}
    assert pruned(repo, labels=("release*", "keep/*")) == {one.cid for one in made}
    assert pruned(repo, labels=("more",)) == {one.cid for one in (*old, *made, *named)}, "the first line is the label"


def test_tips_tags_and_what_is_leased_are_never_pruned(repo: Repository) -> None:
    made = grow(repo, [6, 5, 4, 3, 2, 1])
    repo.tag("v1", made[0].cid)
    repo.branch("other", made[1].cid)
    with lease.hold(repo, cids=[made[2].cid]):
        assert pruned(repo, last=1) == {made[3].cid, made[4].cid}
    assert pruned(repo, last=1) == {made[2].cid, made[3].cid, made[4].cid}


def test_what_another_branch_reaches_is_kept_unless_it_is_selected(repo: Repository) -> None:
    made = grow(repo, [4, 3, 2, 1])
    repo.branch("side", made[1].cid)
    assert pruned(repo, last=1, branches=("main",)) == {made[2].cid}
    assert pruned(repo, last=1, branches=("main", "s*")) == {made[0].cid, made[2].cid}
    assert pruned(repo, last=2, branches=("*",)) == set(), "each branch keeps its own"
    assert pruned(repo, last=1, branches=("nothing",)) == set()


@pytest.fixture
def old_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refs that nobody has moved for years."""
    monkeypatch.setattr(Refs, "modified", lambda self, ref: 0.0)


@pytest.mark.usefixtures("old_records")
def test_stale_branches_go_first(repo: Repository) -> None:
    made = grow(repo, [100, 50])
    forks = repo.fork("main", 3, name="f")
    old = grow(repo, [90], "old")
    with lease.hold(repo, cids=[old[0].cid]):
        assert prune.plan(repo, Rules(stale=60)).is_empty
    planned = prune.plan(repo, Rules(stale=60))
    assert planned.branches == (("old", old[0].cid),) and not planned.snapshots
    assert planned.free_bytes == 0 and planned.kept_snapshots == len(made) + len(forks)
    done = prune.apply(repo, planned)
    assert done.branches == planned.branches and repo.refs.read(RefKind.BRANCH, "old") is None


def test_a_branch_that_was_just_made_to_keep_an_old_snapshot_is_not_stale(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = grow(repo, [90])
    repo.branch("keep-this", old.cid)
    monkeypatch.setattr(Refs, "modified", lambda self, ref: NOW - 1.0 if ref.name == "keep-this" else NOW - 90.0)
    assert prune.plan(repo, Rules(stale=60)).branches == (("main", old.cid),)


def test_when_a_ref_was_written(repo: Repository) -> None:
    made = repo.branch("a", grow(repo, [90])[0].cid)
    assert abs(repo.refs.modified(made) - time.time()) < 60
    with pytest.raises(NotFound, match="branch none"):
        repo.refs.modified(replace(made, name="none"))


@pytest.mark.parametrize(
    "rules", [{}, {"branches": ("x",)}, {"last": -1}, {"within": -1.0}, {"max_bytes": -1}, {"stale": float("nan")}]
)
def test_rules_that_make_no_sense(rules: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="prune"):
        Rules(**rules)  # type: ignore[arg-type]


# -- the budget ----------------------------------------------------------------------------------------------------


def test_the_budget_drops_the_oldest_until_it_fits(repo: Repository) -> None:
    made = grow(repo, [5, 4, 3, 2, 1])
    planned = prune.plan(repo, Rules(max_bytes=7 * HALF))
    assert planned.snapshots == tuple(one.cid for one in made[:3])
    assert planned.fits and planned.kept_bytes == 6 * HALF
    planned = prune.plan(repo, Rules(max_bytes=HALF))
    assert planned.snapshots == tuple(one.cid for one in made[:4]) and planned.fits is False
    assert "more than" in planned.summary()
    assert prune.plan(repo, Rules(max_bytes=100 * HALF)).is_empty


def test_the_budget_takes_what_other_rules_keep_but_not_labels(repo: Repository) -> None:
    grow(repo, [9], message="release")
    made = grow(repo, [5, 4, 3, 2, 1], seed=10)
    planned = prune.plan(repo, Rules(last=4, labels=("release",), max_bytes=8 * HALF))
    assert planned.snapshots == tuple(one.cid for one in made[:3])


def test_the_budget_spares_what_frees_nothing(repo: Repository) -> None:
    """A session that only grows: all pages of its earlier snapshots are in the later ones."""
    pages = halves(8)
    for number in range(1, 8):
        snapshot(repo, pages[: 2 * number])
    other = snapshot(repo, pages + halves(4, 1))
    snapshot(repo, pages)
    planned = prune.plan(repo, Rules(max_bytes=16 * HALF))
    assert planned.snapshots == (other.cid,) and planned.fits


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=2, max_size=9),
    st.integers(0, 12),
    st.integers(0, 3),
)
def test_the_budget_is_what_a_gc_leaves(contents: list[list[int]], most: int, last: int) -> None:
    with Repository.init(MemoryStore()) as repo:
        for numbers in contents:
            snapshot(repo, [bytes([number]) * HALF for number in numbers for _ in "kv"])
        rules = Rules(last=last, max_bytes=most * HALF)
        planned = prune.plan(repo, rules)
        tip = len({*contents[-1]})
        assert planned.fits == (planned.kept_bytes <= most * HALF)
        assert planned.fits or planned.kept_bytes == tip * HALF
        before = prune.plan(repo, Rules(last=1000)).kept_bytes
        assert planned.free_bytes == before - planned.kept_bytes
        prune.apply(repo, planned)
        collect(repo)
        assert fsck.check(repo).is_clean
        live = {page for snapshot in repo.log() for page in _pages(repo, snapshot.cid)}
        assert len(live) * HALF == planned.kept_bytes
        if planned.fits:
            assert prune.plan(repo, rules).snapshots == () or last


def _pages(repo: Repository, cid: str) -> set[bytes]:
    try:
        return set(read_back(repo, cid))
    except NotFound:
        return set()


# -- what is pruned ------------------------------------------------------------------------------------------------


def test_a_pruned_snapshot_keeps_its_record_and_loses_its_pages(repo: Repository) -> None:
    made = grow(repo, [4, 3, 2, 1])
    done = prune.apply(repo, prune.plan(repo, Rules(last=2)))
    assert done.snapshots == tuple(one.cid for one in made[:2])
    assert len(read_back(repo, made[0].cid)) == 4, "until the next gc"
    assert prune.plan(repo, Rules(last=2)).is_empty
    plan = gc.plan(repo, min_age=0)
    assert plan.snapshots == () and set(plan.manifests) == {m for one in made[:2] for m in one.manifests}
    collect(repo)
    assert [one.cid for one in repo.log("main")] == [one.cid for one in reversed(made)]
    assert fsck.check(repo).is_clean
    assert len(read_back(repo, "main")) == len(read_back(repo, made[2].cid)) == 4
    for act in (
        lambda: repo.manifests(made[0].cid),
        lambda: repo.branch("b", made[0].cid),
        lambda: repo.fork(made[0].cid, 1),
    ):
        with pytest.raises(NotFound, match="was pruned"):
            act()
    assert gc.plan(repo, min_age=0).is_empty
    with Repository.open(repo.store) as again:
        snapshot(again, halves(1, 77))
        snapshot(again, halves(1, 78), "side", parents=[made[1].cid])
        assert fsck.check(again).is_clean, "a child of a pruned snapshot is whole"


def test_a_pruned_snapshot_that_is_named_before_the_gc_stays(repo: Repository) -> None:
    made = grow(repo, [4, 3, 2, 1])
    prune.apply(repo, prune.plan(repo, Rules(last=1)))
    repo.tag("v1", made[0].cid)
    held = lease.hold(repo, cids=[made[1].cid])
    collect(repo)
    assert len(read_back(repo, "v1")) == 4 == len(read_back(repo, made[1].cid))
    with pytest.raises(NotFound, match="was pruned"):
        repo.manifests(made[2].cid)
    assert fsck.check(repo).is_clean
    held.release()
    repo.delete_ref(RefKind.TAG, "v1")
    collect(repo)
    with pytest.raises(NotFound):
        repo.manifests(made[0].cid)


def test_a_pruned_snapshot_that_a_gc_is_taking_cannot_be_named(repo: Repository) -> None:
    made = grow(repo, [2, 1])
    prune.apply(repo, prune.plan(repo, Rules(last=1)))
    plan = gc.plan(repo, min_age=0)
    etag = gc.lock.acquire(repo.store, gc._condemned(plan))
    with pytest.raises(Conflict):
        repo.tag("v1", made[0].cid)
    with pytest.raises(Conflict):
        lease.hold(repo, cids=[made[0].cid])
    gc.lock.release(repo.store, etag)


def test_the_young_are_kept_by_a_gc_though_they_were_pruned(repo: Repository) -> None:
    made = grow(repo, [2, 1])
    prune.apply(repo, prune.plan(repo, Rules(last=1)))
    gc.apply(repo, gc.plan(repo))
    assert len(read_back(repo, made[0].cid)) == 4


def test_marks_go_with_their_snapshots(repo: Repository) -> None:
    grow(repo, [3, 2, 1])
    prune.apply(repo, prune.plan(repo, Rules(last=1)))
    repo.delete_ref(RefKind.BRANCH, "main")
    collect(repo)
    assert not marks.pruned(repo.store) and not [*repo.objects.snapshots()]


def test_a_check_during_a_prune_and_a_gc_gives_no_false_finding(repo: Repository) -> None:
    grow(repo, [3, 2, 1])
    other = Repository.open(repo.store)
    original = repo.objects.manifest
    done = []

    def late(cid: str) -> object:
        if not done:
            done.append(prune.apply(other, prune.plan(other, Rules(last=1))))
            collect(other)
        return original(cid)

    repo.objects.manifest = late  # type: ignore[method-assign,assignment]
    assert fsck.check(repo).is_clean
    assert done[0].snapshots
    other.close()


# -- others at the same time, and crashes --------------------------------------------------------------------------


@pytest.mark.usefixtures("old_records")
def test_what_got_a_name_since_the_plan_is_spared(repo: Repository) -> None:
    made = grow(repo, [6, 5, 4, 3, 2, 1])
    repo.branch("old", made[0].cid)
    planned = prune.plan(repo, Rules(last=1, stale=5.5, branches=("main", "old")))
    assert planned.branches == (("old", made[0].cid),)
    repo.tag("v1", made[1].cid)
    repo.branch("kept", made[3].cid)
    repo.branch("old", made[4].cid, move=True)
    done = prune.apply(repo, planned)
    assert not done.branches and repo.resolve("old") == made[4].cid
    assert done.snapshots == (), "the new branch reaches all that are left"
    assert len(read_back(repo, "v1")) == 4


def test_a_missing_ancestor_stops_it(repo: Repository) -> None:
    made = grow(repo, [3, 2, 1])
    repo.store.delete([snapshot_key(made[0].cid)])
    repo.objects.forget()
    with pytest.raises(IntegrityError, match=made[0].cid):
        prune.plan(repo, Rules(last=1))


@pytest.mark.parametrize("count", [stats.count, lambda repo: prune.plan(repo, Rules(last=1, stale=0))])
def test_a_branch_that_is_deleted_meanwhile(count: Callable[[Repository], object]) -> None:
    class Late(WrapperStore):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            yield from [*super().list(prefix)]
            if prefix == RefKind.TAG and other.refs.read(RefKind.BRANCH, "brief") is not None:
                other.delete_ref(RefKind.BRANCH, "brief")

    below = MemoryStore()
    with Repository.init(below) as other, Repository.open(Late(below)) as repo:
        snapshot(other, halves(1))
        snapshot(other, halves(1, 1), "brief")
        count(repo)
        assert other.refs.read(RefKind.BRANCH, "brief") is None


def test_a_prefix_cache_is_left_alone(repo: Repository) -> None:
    grow(repo, [3, 2, 1], "cache/0123456789ab")
    assert prune.plan(repo, Rules(last=1, branches=("*", "cache/*"), stale=0)).is_empty


def test_an_unreadable_lease_stops_it(repo: Repository) -> None:
    grow(repo, [2, 1])
    repo.store.put(f"{lease.PREFIX}{0:032x}", b"?")
    with pytest.raises(Locked):
        prune.plan(repo, Rules(last=1))


@pytest.mark.usefixtures("old_records")
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_write_and_the_next_run_completes(store: Store, after: bool) -> None:
    with Repository.init(store) as repo:
        made = grow(repo, [9, 8, 7, 6, 5])
        grow(repo, [100], "stale", seed=50)
    rules = Rules(last=2, stale=50)
    for at in range(1, 8):
        with contextlib.suppress(SimulatedCrash), Repository.open(CrashingStore(store, at, after=after)) as dying:
            prune.apply(dying, prune.plan(dying, rules))
        with Repository.open(store) as again:
            assert fsck.check(again).is_clean
            collect(again)
            assert fsck.check(again).is_clean
            assert len(read_back(again, "main")) == 4
    with Repository.open(store) as again:
        assert prune.plan(again, rules).is_empty
        assert marks.pruned(store).keys() == {one.cid for one in made[:3]}
