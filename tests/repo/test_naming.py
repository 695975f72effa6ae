"""Names for snapshots that no ref reaches: what a gc that was cut short has left of them is not named."""

from collections.abc import Callable, Iterable, Iterator

import pytest

from kvist.errors import Conflict, NotFound, StoreError
from kvist.repo import RefKind, Repository, Snapshot, fsck, gc, lock
from kvist.store import MemoryStore, MeteredStore, ObjectInfo, Store, WrapperStore
from kvist.testing.faults import CrashingStore, Refuse, SimulatedCrash
from kvist.testing.faulty import FaultyStore

from .making import halves, snapshot

LENGTH = 6


class Unordered(WrapperStore):
    """Deletes parents before their children, and only some of them."""

    def __init__(self, store: Store, parents: Iterable[str]) -> None:
        super().__init__(store)
        self._first = {f"snapshots/{cid.removeprefix('sha256:')}" for cid in parents}

    def delete(self, keys: Iterable[str]) -> None:
        found = set(keys)
        super().delete(found & self._first)
        if found & self._first:
            raise StoreError("slow down")
        super().delete(found)


def grow(repo: Repository, branch: str = "main") -> list[Snapshot]:
    return [snapshot(repo, halves(1, seed), branch) for seed in range(LENGTH)]


def cut_short(store: Store, parents: Iterable[str]) -> None:
    """A gc of what no ref reaches, which gets no further than to these snapshots."""
    with Repository.open(Unordered(store, parents)) as repo, pytest.raises(StoreError, match="slow down"):
        gc.apply(repo, gc.plan(repo, min_age=0))
    assert lock.holder(store) is None


def damage(repo: Repository) -> None:
    repo.store.put("refs/branches/hurt.ref", b"damaged")


NAMINGS: dict[str, Callable[[Repository, str], object]] = {
    "branch": lambda repo, cid: repo.branch("new", cid),
    "move": lambda repo, cid: repo.branch("other", cid, move=True),
    "tag": lambda repo, cid: repo.tag("new", cid),
    "fork": lambda repo, cid: repo.fork(cid, 2, name="new"),
    "commit": lambda repo, cid: snapshot(repo, halves(1, 50), "new", parents=[cid]),
    "mend": lambda repo, cid: (damage(repo), repo.mend_ref(RefKind.BRANCH, "hurt", cid)),
}


@pytest.fixture(params=NAMINGS)
def name(request: pytest.FixtureRequest) -> Callable[[Repository, str], object]:
    return NAMINGS[request.param]


@pytest.mark.parametrize("lost", [0, 2, LENGTH - 2])
def test_what_has_lost_an_ancestor_is_not_named(name: Callable[[Repository, str], object], lost: int) -> None:
    store = MemoryStore()
    with Repository.init(store) as repo:
        other = snapshot(repo, halves(1, 60), "other")
        made = grow(repo)
        repo.delete_ref(RefKind.BRANCH, "main")
        cut_short(store, [made[lost].cid])
        for process in (repo, Repository.open(store)):  # the one that made it, and another
            with pytest.raises((NotFound, Conflict)):
                name(process, made[-1].cid)
        repo.store.delete(["refs/branches/hurt.ref"])
        assert fsck.check(repo).is_clean and repo.resolve("other") == other.cid
        gc.apply(repo, gc.plan(repo, min_age=0))
        assert set(repo.reachable()) == {cid for cid, _ in repo.objects.snapshots()} == {other.cid}


@pytest.mark.parametrize("seed", range(20))
def test_a_gc_that_is_killed_leaves_nothing_half_that_can_be_named(seed: int) -> None:
    store = MemoryStore()
    with Repository.init(store) as repo:
        made = grow(repo)
        repo.delete_ref(RefKind.BRANCH, "main")
    dying = Repository.open(CrashingStore(store, 3 + seed % (LENGTH - 1), seed=seed))
    with pytest.raises(SimulatedCrash):
        gc.apply(dying, gc.plan(dying, min_age=0))
    dying.pages.close()
    with Repository.open(store) as repo:
        named = []
        for number, one in enumerate(made):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lock.Holder, "is_dead", True)  # as it is where the gc's process has ended
                try:
                    named.append(repo.branch(f"b{number}", one.cid))
                except NotFound:
                    continue
        assert fsck.check(repo).is_clean
        assert len(named) == len({each.cid for each in named}) < LENGTH


def test_what_loses_an_ancestor_while_it_is_named_has_its_name_taken_back() -> None:
    """The branch through which it was found goes, a gc comes and is cut short, all after the first look."""
    store = MemoryStore()

    class Late(WrapperStore):
        def put(self, key: str, *args: object, **more: object) -> str:
            if key == "refs/tags/new.ref":
                other.delete_ref(RefKind.BRANCH, "main")
                cut_short(store, [made[0].cid])
            return super().put(key, *args, **more)  # type: ignore[arg-type]

    with Repository.init(store) as other, Repository.open(Late(store)) as repo:
        snapshot(other, halves(1, 60), "other")
        made = grow(other)
        with pytest.raises(NotFound, match=made[0].cid):
            repo.tag("new", "main")
        assert [ref.name for ref in other.refs.all()] == ["other"]
        other.tag("new", "other")


def test_what_a_ref_reaches_is_not_walked(repo: Repository) -> None:
    """A long history costs whoever names its tip nothing."""
    for branch, length in (("short", 2), ("long", LENGTH)):
        for seed in range(length):
            snapshot(repo, halves(1, seed), branch)
    store = MeteredStore(repo.store)
    costs = []
    for rev in ("short", "long"):
        with Repository.open(store) as fresh:
            store.reset()
            fresh.branch(f"at-{rev}", rev)
            fresh.tag(f"at-{rev}", rev)
            fresh.fork(rev, 2, name=f"of-{rev}")
            snapshot(fresh, halves(1, 0), rev)
            costs.append({kind: traffic.calls for kind, traffic in store.traffic().items()})
    assert costs[0] == costs[1]


def test_a_store_that_does_not_answer_names_nothing() -> None:
    below = MemoryStore()
    with Repository.init(below) as repo:
        made = grow(repo)
        repo.delete_ref(RefKind.BRANCH, "main")
    for at in range(1, LENGTH + 2):
        store = FaultyStore(below, Refuse(ops={"get", "head"}, prefix="snapshots/", at={at}))
        with Repository.open(store) as repo, pytest.raises(StoreError, match="refused, as was wished"):
            repo.branch("new", made[-1].cid)
        with Repository.open(below) as repo:
            assert not [*repo.refs.all()]


# -- refs, many at once ------------------------------------------------------------------------------------------------


def test_reading_all_refs_costs_a_listing_and_a_read_of_each(repo: Repository) -> None:
    tip = snapshot(repo, halves(1))
    repo.fork("main", 40, name="f")
    repo.tag("v1", tip.cid)
    store = MeteredStore(repo.store)
    with Repository.open(store) as fresh:
        store.reset()
        found = [*fresh.refs.all()]
        calls = {kind: traffic.calls for kind, traffic in store.traffic().items()}
        assert calls == {"list": 2, "get": 42}
        assert found == [fresh.refs.read(ref.kind, ref.name) for ref in found]
        assert len(found) == 42
        fresh.refs.move(found[0], tip.cid)


def test_a_ref_that_moves_while_all_are_read_cannot_be_moved_on(repo: Repository) -> None:
    class Late(WrapperStore):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            yield from [*super().list(prefix)]
            if prefix == RefKind.BRANCH:
                snapshot(repo, halves(1, 1))

    first = snapshot(repo, halves(1))
    with Repository.open(Late(repo.store)) as other:
        (found,) = other.refs.all()
        assert found.cid == repo.resolve("main") != first.cid
        with pytest.raises(Conflict):
            other.refs.move(found, first.cid)


@pytest.mark.parametrize("taken_back", [0, 1, 2])
def test_what_is_left_of_forks_are_the_first_few(taken_back: int) -> None:
    """Of five the fourth is refused, and then one of the three that are taken back."""
    store = FaultyStore(MemoryStore(), Refuse(ops={"put"}, prefix="refs/branches/new/", at={4, 5 + taken_back}))
    with Repository.init(store) as repo:
        grow(repo)
        with pytest.raises(StoreError):
            repo.fork("main", 5, name="new")
        left = [ref.name for ref in repo.refs.all(RefKind.BRANCH) if ref.name != "main"]
        assert left == [f"new/{i}" for i in range(3 - taken_back)]
        assert fsck.check(repo).is_clean
