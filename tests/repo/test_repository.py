import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.errors import (
    AlreadyExists,
    Conflict,
    DamagedObject,
    DamagedPage,
    InvalidInput,
    InvalidManifest,
    InvalidName,
    MissingPage,
    NotFound,
    RepositoryNotFound,
)
from kvist.hashing import Buffer
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, RefKind, Repository, Snapshot, fsck, gc, lock
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.store import LocalStore, MemoryStore, Store
from kvist.testing.faults import CrashingStore, Rot, SimulatedCrash
from kvist.testing.faulty import FaultyStore

from .making import LAYOUT, digest, halves, manifest, read_back, snapshot


def stored(repo: Repository, prefix: str = "") -> list[tuple[str, str]]:
    return [(info.key, info.etag) for info in repo.store.list(prefix)]


def size(repo: Repository, prefix: str) -> int:
    return sum(info.size for info in repo.store.list(prefix))


# -- opening -------------------------------------------------------------------------------------------------------


def test_init_open_and_their_refusals(store: Store) -> None:
    with pytest.raises(RepositoryNotFound, match="holds no kvist repository"):
        Repository.open(store)
    assert not [*store.list()]
    made = Repository.init(store, page_digest="sha256")
    again = Repository.open(store, create=True)
    assert (again.id, again.page_digest) == (made.id, "sha256")
    with pytest.raises(AlreadyExists):
        Repository.init(store)
    with pytest.raises(InvalidInput, match="page digest"):
        Repository.init(MemoryStore(), page_digest="md5")
    made.close()
    made.close()
    again.close()


@pytest.mark.parametrize(
    "config",
    [b"", b"[]", b"{}", b'{"format":"x","version":1}', b'{"format":"kvist-repository","version":2}',
     b'{"format":"kvist-repository","version":1,"id":"a","page_digest":[]}',
     b'{"format":"kvist-repository","version":1,"id":5,"page_digest":"blake3"}'],
)  # fmt: skip
def test_refuses_a_config_it_cannot_read(config: bytes) -> None:
    store = MemoryStore()
    store.put("kvist.json", config)
    with pytest.raises(InvalidManifest):
        Repository.open(store)


@pytest.mark.parametrize("keep", ["refs/branches/", "refs/tags/", "segments/", "snapshots/"])
def test_a_repository_whose_config_is_lost_is_not_made_anew(store: Store, keep: str) -> None:
    """Its salt and its quota would be gone with it."""
    with Repository.init(store) as repo:
        snapshot(repo, halves(1))
        repo.tag("v1", "main")
        config = store.get("kvist.json")
        store.delete([info.key for info in store.list() if not info.key.startswith(keep)])
        before = stored(repo)
        with pytest.raises(RepositoryNotFound, match=r"kvist\.json is gone") as raised:
            Repository.open(store, create=True)
        assert raised.value.hint == "put kvist.json back from a copy"
        with pytest.raises(RepositoryNotFound):
            Repository.init(store)
        assert stored(repo) == before
        store.put("kvist.json", config)
        assert Repository.open(store, create=True).id == repo.id


def test_opening_and_reading_what_is_not_there_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFound):
        Repository.open(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    with Repository.init(LocalStore(tmp_path / "repo")) as repo:
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        for rev in ("main", "a/b", "abcdef", "0" * 64, "sha256:" + "0" * 64, "sha256:", "A" * 64):
            with pytest.raises(NotFound):
                repo.resolve(rev)
        for act in (repo.manifest, repo.objects.snapshot):
            with pytest.raises(NotFound):
                act("sha256:" + "0" * 64)
            with pytest.raises(InvalidInput):
                act("sha256:" + "A" * 64)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# -- commit --------------------------------------------------------------------------------------------------------


def test_a_snapshot_reads_back_by_another_process(tmp_path: Path) -> None:
    data = halves(64)
    with Repository.init(LocalStore(tmp_path)) as repo:
        made = snapshot(repo, data, message="64 pages")
    script = "import sys; from repo.making import read_back; from kvist.repo import Repository\n"
    script += "sys.stdout.buffer.write(b''.join(read_back(Repository.open(sys.argv[1]), sys.argv[2])))"
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, made.cid], cwd=tests, capture_output=True, check=True
    )
    assert done.stdout == b"".join(data)


def test_the_same_snapshot_again_stores_no_page(repo: Repository) -> None:
    data = halves(8)
    first = snapshot(repo, data)
    pages, all_bytes = stored(repo, "segments/"), size(repo, "")
    second = snapshot(repo, data)
    assert stored(repo, "segments/") == pages
    assert first.cid != second.cid and first.manifests == second.manifests
    assert second.parents == (first.cid,)
    assert size(repo, "") - all_bytes < 1024


def test_one_diverged_page_of_eight_costs_less_than_two_halves_and_2_kib_of_pages(repo: Repository) -> None:
    data = halves(8)
    snapshot(repo, data)
    before = size(repo, "segments/")
    snapshot(repo, [*halves(1, 77), *data[2:]])
    assert size(repo, "segments/") - before < 2 * LAYOUT.page_bytes + 2048


def test_sequences_survive(repo: Repository) -> None:
    data = halves(4)
    repo.put_pages(data)
    seqs = [LogicalSeq("z", (3, 2, 1, 0), 2, tuple(range(20)), {"a": [1]}), LogicalSeq("a", (0,))]
    made = repo.commit([manifest(data, seqs=seqs)], branch="main")
    again = repo.manifest(repo.snapshot("main").manifests[0])
    assert again.sequences == (seqs[1], seqs[0])
    assert made.tokens == 4 * 3 + 4  # page 0 is whole for a


def test_zero_pages_and_equal_halves(repo: Repository) -> None:
    empty = repo.commit([Manifest(LAYOUT)], branch="main")
    assert empty.tokens == 0 and read_back(repo, "main") == []
    same = [bytes(LAYOUT.page_bytes)] * 6
    assert repo.put_pages(same).new_pages == 1
    snapshot(repo, same)
    assert read_back(repo, "main") == same
    assert fsck.check(repo).is_clean


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(pages=st.integers(0, 32), seed=st.integers(0, 2**64 - 1))
def test_any_number_of_pages_reads_back(pages: int, seed: int) -> None:
    with Repository.init(MemoryStore()) as repo:
        data = halves(pages, seed)
        assert read_back(repo, snapshot(repo, data).cid) == data


def test_refuses_pages_that_are_absent_damaged_or_of_another_size(repo: Repository) -> None:
    data = halves(1)
    with pytest.raises(MissingPage, match=digest(data[0])):
        repo.commit([manifest(data)], branch="main")
    repo.put_pages([data[0][:-1], data[1][:-1]])
    wrong = manifest([data[0][:-1], data[1][:-1]])
    with pytest.raises(InvalidManifest, match=f"has {LAYOUT.page_bytes - 1} bytes"):
        repo.commit([wrong], branch="main")
    with pytest.raises(InvalidInput, match="sha256"):
        repo.commit([manifest(data, algorithm="sha256")], branch="main")
    with pytest.raises(InvalidInput, match="at least one manifest"):
        repo.commit([], branch="main")
    assert repo.refs.names(RefKind.BRANCH) == [] and stored(repo, "snapshots/") == []
    other = Layout(page_size_tokens=4, n_layers=2, n_heads=1, head_dim=8, dtype="f32")
    repo.put_pages(data)
    with pytest.raises(InvalidManifest):
        repo.commit([Manifest(other, (PageEntry(0, digest(data[0]), digest(data[1])),))])


def test_another_process_pages_count_as_stored(repo: Repository) -> None:
    other = Repository.open(repo.store)
    data = halves(2)
    other.put_pages(data)
    repo.commit([manifest(data)], branch="main")
    made = snapshot(other, halves(1, 4), "side")
    assert repo.fork(made.cid, 1)[0].manifests == made.manifests
    other.pages.close()


def test_parents(repo: Repository) -> None:
    a, b = snapshot(repo, halves(1, 1), "a"), snapshot(repo, halves(1, 2), "b")
    merged = snapshot(repo, halves(1, 3), "a", parents=[a.cid, b.cid])
    assert merged.parents == (a.cid, b.cid)
    loose = snapshot(repo, halves(1, 4), None, parents=[b.cid])
    assert loose.parents == (b.cid,) and repo.resolve("b") == b.cid
    root = snapshot(repo, halves(1, 5), None)
    assert root.parents == ()
    assert {each.cid for each in repo.log("a")} == {a.cid, b.cid, merged.cid}
    assert repo.log("a")[0].cid == merged.cid
    for parents in (["sha256:" + "0" * 64], ["x"], [a.cid.upper()], [a.cid, a.cid]):
        with pytest.raises((NotFound, InvalidInput)):
            snapshot(repo, halves(1, 6), None, parents=parents)
    with pytest.raises(Conflict, match="does not continue"):
        snapshot(repo, halves(1, 6), "a", parents=[b.cid])


def test_a_parent_that_was_never_finished_is_refused(repo: Repository) -> None:
    """What a crash, or a gc in the middle of a commit, left: a snapshot some of whose parts are gone."""
    first = snapshot(repo, halves(1), None)
    data = halves(1, 1)
    for lost in ("parent", "manifest", "page"):
        whole = manifest(halves(1, 2) if lost == "page" else data)
        repo.put_pages(data)
        half_made = Snapshot((whole.cid,), (first.cid if lost != "parent" else "sha256:" + "0" * 64,), nonce=lost)
        if lost != "manifest":
            repo.objects.put_manifests([whole])
        else:
            repo.store.delete([manifest_key(whole.cid)])
        repo.objects.put_snapshots([half_made])
        with pytest.raises((NotFound, MissingPage)):
            snapshot(repo, halves(1, 3), "main", parents=[half_made.cid])
        with pytest.raises((NotFound, MissingPage, Conflict)):
            repo.tag("v1", half_made.cid)
        assert [*repo.refs.all()] == []
    snapshot(repo, halves(1, 3), "main", parents=[first.cid])
    repo.tag("v1", "main")


def test_a_branch_whose_tip_was_never_finished_is_not_continued(store: Store) -> None:
    """A writer published it and died; a gc took a part of it."""
    with Repository.init(store) as repo:
        tip = snapshot(repo, halves(1))
        store.delete([manifest_key(tip.manifests[0])])
        with Repository.open(store) as other, pytest.raises(NotFound, match="never finished"):
            snapshot(other, halves(1, 1))
        assert repo.resolve("main") == tip.cid


def test_a_parent_deleted_by_another_process_is_refused_before_anything_is_written(repo: Repository) -> None:
    other = Repository.open(repo.store)
    first = snapshot(other, halves(1), None)
    second = snapshot(other, halves(1, 1), None, parents=[first.cid])
    repo.put_pages(halves(1, 2))
    gc.apply(repo, gc.plan(repo, min_age=0))
    other.put_pages(halves(1, 2))
    before = stored(other)
    for branch in (None, "main"):
        with pytest.raises(NotFound, match=second.cid):
            other.commit([manifest(halves(1, 2))], parents=[second.cid], branch=branch)
    assert stored(other) == before
    other.pages.close()


def test_a_damaged_parent_can_be_continued(repo: Repository) -> None:
    first = snapshot(repo, halves(1))
    (key,) = repo.pages.homes(digest(halves(1)[0]))
    damaged = bytearray(repo.store.get(key))
    damaged[0] ^= 1
    repo.store.put(key, damaged)
    with pytest.raises(DamagedPage):
        read_back(repo, "main")
    again = Repository.open(repo.store)
    assert snapshot(again, halves(1, 1)).parents == (first.cid,)
    assert snapshot(again, halves(1, 2), None, parents=[first.cid])
    with pytest.raises(DamagedPage):
        again.tag("v1", first.cid)
    snapshot(again, halves(1))
    again.tag("v1", first.cid)
    assert read_back(repo, "v1") == halves(1)
    again.pages.close()


def test_damaged_and_missing_objects_are_named_and_healed(repo: Repository) -> None:
    made = snapshot(repo, halves(1))
    key = manifest_key(made.manifests[0])
    data = repo.store.get(key)
    repo.store.put(key, data[:-1])
    repo.objects.forget()
    with pytest.raises(DamagedObject, match=made.manifests[0]):
        repo.manifest(made.manifests[0])
    snapshot(repo, halves(1))
    assert repo.store.get(key) == data, "the next commit of the same manifest heals it"
    repo.store.delete([key])
    repo.objects.forget()
    with pytest.raises(NotFound):
        repo.manifest(made.manifests[0])
    repo.store.put(snapshot_key(made.cid), b"{}")
    with pytest.raises(DamagedObject):
        repo.snapshot(made.cid)


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_wrong_byte_on_the_way_is_read_again(repo: Repository) -> None:
    made = snapshot(repo, halves(2))
    for ops in ({"get"}, {"get_ranges"}):
        store = FaultyStore(repo.store, Rot(ops=ops, prefix="m" if ops == {"get"} else "segments/", times=1))  # type: ignore[arg-type]
        with Repository.open(store) as other:
            assert read_back(other, made.cid) == halves(2)
        assert store.fired and not repo.pages.damaged_places()
    assert not [*repo.store.list("damaged/")]


def test_resolve(repo: Repository) -> None:
    made = snapshot(repo, halves(1), "a")
    other = snapshot(repo, halves(1, 1), "a/b")
    hexes = made.cid.removeprefix("sha256:")
    for rev in ("a", made.cid, hexes, made.cid[:15], hexes[:6], hexes[:20]):
        assert repo.resolve(rev) == made.cid
    assert repo.resolve("a/b") == other.cid
    for rev in (hexes[:5], hexes.upper(), "sha256:" + hexes.upper(), "sha256:" + hexes[:5], hexes + "0", "b"):
        with pytest.raises(NotFound):
            repo.resolve(rev)
    with pytest.raises(InvalidName):
        repo.resolve("")
    repo.tag("a", other.cid)
    with pytest.raises(InvalidInput, match="ambiguous"):
        repo.resolve("a")


def test_a_name_that_looks_like_a_prefix_wins_over_it(repo: Repository) -> None:
    made = snapshot(repo, halves(1), "main")
    prefix = made.cid.removeprefix("sha256:")[:8]
    other = snapshot(repo, halves(1, 1), prefix)
    assert repo.resolve(prefix) == other.cid
    assert repo.resolve("sha256:" + prefix) == made.cid
    with pytest.raises(InvalidName, match="looks like a digest"):
        repo.branch("a" * 64, made.cid)


def test_branch_tag_and_delete(repo: Repository) -> None:
    a, b = snapshot(repo, halves(1, 1), None), snapshot(repo, halves(1, 2), None)
    assert repo.branch("x", a.cid).cid == a.cid
    with pytest.raises(AlreadyExists):
        repo.branch("x", b.cid)
    assert repo.branch("x", b.cid, move=True).cid == b.cid
    assert repo.branch("new", "x", move=True).cid == b.cid
    assert repo.tag("v1", "x").cid == b.cid
    assert repo.delete_ref(RefKind.BRANCH, "x").cid == b.cid
    with pytest.raises(NotFound):
        repo.delete_ref(RefKind.BRANCH, "x")
    repo.delete_ref(RefKind.TAG, "v1")
    with pytest.raises(AlreadyExists):
        repo.tag("v1", a.cid)


def test_fork(repo: Repository) -> None:
    made = snapshot(repo, halves(4))
    before = stored(repo, "segments/")
    forks = repo.fork("main", 12, name="try")
    assert stored(repo, "segments/") == before
    assert len({fork.cid for fork in forks}) == 12
    assert {fork.parents for fork in forks} == {(made.cid,)} and {fork.manifests for fork in forks} == {made.manifests}
    assert [repo.resolve(f"try/{i}") for i in range(12)] == [fork.cid for fork in forks]
    with pytest.raises(AlreadyExists, match="try/"):
        repo.fork("main", 13, name="try")
    assert len(repo.refs.names(RefKind.BRANCH)) == 13
    repo.delete_ref(RefKind.BRANCH, "try/0")
    repo.delete_ref(RefKind.BRANCH, "try/1")
    assert [fork.name for fork in repo.fork("main", 2, name="try")] == ["try/0", "try/1"], "deleted names are free"
    assert len(repo.fork("main", 3)) == 3
    for n in (0, -1, 10_001, True, 1.0):
        with pytest.raises(InvalidInput):
            repo.fork("main", n)  # type: ignore[arg-type]


def test_a_fork_whose_last_name_is_refused_leaves_none(repo: Repository) -> None:
    snapshot(repo, halves(1))
    with pytest.raises(InvalidName):
        repo.fork("main", 11, name="x" * 198)
    assert [ref.name for ref in repo.refs.all()] == ["main"]


# -- two at once ---------------------------------------------------------------------------------------------------


def during(repo: Repository, act: Callable[[], object], at: int) -> Repository:
    """The repository as another process sees it, which ``act``s just before its ``at``-th write."""

    class Interrupted(CrashingStore):
        def _before(self) -> None:
            super()._before()
            if self.writes == at:
                act()

    return Repository.open(Interrupted(repo.store))


def test_the_second_of_two_commits_on_one_branch_conflicts(repo: Repository) -> None:
    snapshot(repo, halves(1))
    slow = during(repo, lambda: snapshot(repo, halves(1, 1)), at=4)
    with pytest.raises(Conflict, match="moved"):
        snapshot(slow, halves(1, 2))
    assert read_back(repo, "main") == halves(1, 1)
    snapshot(slow, halves(1, 2))
    assert len(repo.log("main")) == 3
    slow.pages.close()


def test_a_commit_that_makes_a_branch_which_a_rival_makes_first_conflicts(repo: Repository) -> None:
    slow = during(repo, lambda: snapshot(repo, halves(1, 1), "new"), at=3)
    with pytest.raises(Conflict, match="there was no such branch before"):
        snapshot(slow, halves(1, 2), "new")
    assert read_back(repo, "new") == halves(1, 1)
    slow.pages.close()


def test_a_ref_is_mended_unless_a_gc_takes_what_it_would_name(repo: Repository) -> None:
    made = snapshot(repo, halves(1), None)
    repo.store.put("refs/tags/v1.ref", b"damaged")
    held = lock.acquire(repo.store, lock.Condemned(objects=frozenset([snapshot_key(made.cid)])))
    with pytest.raises(Conflict, match="a gc took"):
        repo.mend_ref(RefKind.TAG, "v1", made.cid)
    with pytest.raises(DamagedObject):
        repo.refs.read(RefKind.TAG, "v1")
    lock.release(repo.store, held)
    assert repo.mend_ref(RefKind.TAG, "v1", made.cid) == repo.refs.read(RefKind.TAG, "v1")
    with pytest.raises(AlreadyExists, match="not damaged"):
        repo.mend_ref(RefKind.TAG, "v1", made.cid)


def test_two_who_mend_one_ref(repo: Repository) -> None:
    first, second = snapshot(repo, halves(1), None), snapshot(repo, halves(1, 1), None)
    repo.store.put("refs/branches/main.ref", b"damaged")
    slow = during(repo, lambda: repo.mend_ref(RefKind.BRANCH, "main", first.cid), at=1)
    with pytest.raises(Conflict):
        slow.mend_ref(RefKind.BRANCH, "main", second.cid)
    assert repo.resolve("main") == first.cid
    slow.pages.close()


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("kind", RefKind)
def test_a_gc_at_any_moment_of_naming_what_it_takes(repo: Repository, at: int, kind: RefKind) -> None:
    """Either it is named and whole, or it is not named; and a tag's name is not used up by the attempt."""
    made = snapshot(repo, halves(2), None)

    def collect() -> None:
        gc.apply(repo, gc.plan(repo, min_age=0))

    slow = during(repo, collect, at)
    try:
        ref = slow.tag("x", made.cid) if kind is RefKind.TAG else slow.branch("x", made.cid)
        assert ref.cid == made.cid and read_back(repo, "x") == halves(2)
    except (Conflict, NotFound):
        assert repo.refs.read(kind, "x") is None
        again = snapshot(repo, halves(2), None)
        (repo.tag if kind is RefKind.TAG else repo.branch)("x", again.cid)
    assert fsck.check(repo).is_clean
    slow.pages.close()


@pytest.mark.parametrize("at", range(1, 9))
def test_a_commit_at_any_moment_of_a_gc_that_takes_its_pages(repo: Repository, at: int) -> None:
    data = halves(4)
    snapshot(repo, data, None)  # nothing names it
    named: list[Snapshot] = []

    def revive() -> None:
        for _ in range(3):
            try:
                named.append(snapshot(repo, data[:4], "main", message=str(at)))
                return
            except Conflict:  # the manifest itself is going
                continue
            except MissingPage:
                continue

    slow = during(repo, revive, at)
    gc.apply(slow, gc.plan(slow, min_age=0))
    if named:
        assert read_back(repo, "main") == data[:4]
    assert fsck.check(repo).is_clean
    slow.pages.close()


def test_what_a_dead_gc_announced_hinders_nobody_and_what_a_live_one_did_is_written_anew(repo: Repository) -> None:
    data = halves(2)
    old = snapshot(repo, data, None)
    condemned = lock.Condemned(
        objects=frozenset([snapshot_key(old.cid)]), segments=frozenset(s.key for s in repo.pages.segments())
    )
    held = lock.acquire(repo.store, condemned)
    repo.put_pages(data)
    assert len(repo.pages.homes(digest(data[0]))) == 2
    new = repo.commit([manifest(data)], branch="main")
    with pytest.raises(Conflict, match="a gc took"):
        repo.branch("old", old.cid)
    assert repo.refs.read(RefKind.BRANCH, "old") is None
    lock.release(repo.store, held)
    repo.branch("old", old.cid)
    assert read_back(repo, new.cid) == data


def test_a_stale_cache_does_not_revive_what_a_gc_deleted(repo: Repository) -> None:
    other = Repository.open(repo.store)
    gone = snapshot(repo, halves(1), None)
    other.snapshot(gone.cid)
    gc.apply(repo, gc.plan(repo, min_age=0))
    for act in (
        lambda: other.tag("v1", gone.cid),
        lambda: other.branch("b", gone.cid),
        lambda: other.fork(gone.cid, 2),
        lambda: snapshot(other, halves(1, 1), "b", parents=[gone.cid]),
    ):
        with pytest.raises((NotFound, Conflict)):
            act()
    assert [*other.refs.all()] == []
    other.pages.close()


def test_a_manifest_that_is_there_already_is_made_durable_again(repo: Repository) -> None:
    """Whoever put it may not have reached the barrier."""

    class Recording(CrashingStore):
        def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
            batches.append((mode, [key for key, _ in items]))
            super().put_many(items, mode=mode)

    batches: list[tuple[str, list[str]]] = []
    made = snapshot(repo, halves(1))
    with Repository.open(Recording(repo.store)) as other:
        other.commit([manifest(halves(1))], branch="main")
    assert ("create", [manifest_key(made.manifests[0])]) in batches


# -- in place of what a branch named -----------------------------------------------------------------------------------


def test_a_replaced_tip_is_no_parent_and_its_pages_go_with_the_next_gc(repo: Repository) -> None:
    kept, lost = halves(1), halves(1, 1)
    first = snapshot(repo, kept)
    repo.put_pages(lost)
    old = repo.commit([manifest([*kept, *lost])], branch="main")
    repo.tag("first", first.cid)
    new = repo.commit([manifest(kept)], branch="main", replace=True)
    assert new.parents == () and repo.resolve("main") == new.cid
    assert repo.snapshot(old.cid) == old, "until a gc takes it"
    assert gc.apply(repo, gc.plan(repo, min_age=0)).snapshots == (old.cid,)
    assert read_back(repo, "main") == read_back(repo, "first") == kept
    assert all(repo.pages.size(digest(half)) is None for half in lost)
    assert fsck.check(repo).is_clean


def test_replacing_takes_given_parents_and_makes_a_branch_that_is_not_there(repo: Repository) -> None:
    made = snapshot(repo, halves(1), "a", replace=True)
    assert made.parents == () and repo.resolve("a") == made.cid
    other = snapshot(repo, halves(1, 1), "b")
    assert snapshot(repo, halves(1, 2), "b", replace=True, parents=[made.cid]).parents == (made.cid,)
    assert other.cid not in {each.cid for each in repo.log("b")}
    repo.delete_ref(RefKind.BRANCH, "a")
    assert snapshot(repo, halves(1, 3), "a", replace=True).parents == ()
    assert snapshot(repo, halves(1, 4), None, replace=True).parents == ()


@pytest.mark.parametrize("had_tip", [True, False])
def test_a_branch_that_moves_while_it_is_replaced_is_a_conflict(repo: Repository, had_tip: bool) -> None:
    if had_tip:
        snapshot(repo, halves(1))
    slow = during(repo, lambda: snapshot(repo, halves(1, 1)), at=4)
    with pytest.raises(Conflict):
        snapshot(slow, halves(1, 2), replace=True)
    assert read_back(repo, "main") == halves(1, 1)
    snapshot(slow, halves(1, 2), replace=True)
    assert read_back(repo, "main") == halves(1, 2) and len(repo.log("main")) == 1
    slow.pages.close()


def test_a_tip_that_was_never_finished_can_be_replaced(repo: Repository) -> None:
    tip = snapshot(repo, halves(1))
    repo.store.delete([snapshot_key(tip.cid), manifest_key(tip.manifests[0])])
    repo.objects.forget()
    with pytest.raises(NotFound):
        snapshot(repo, halves(1, 1))
    made = snapshot(repo, halves(1, 1), replace=True)
    assert repo.resolve("main") == made.cid and fsck.check(repo).is_clean


# -- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 5))
def test_a_crash_at_any_write_of_a_commit(store: Store, at: int, after: bool) -> None:
    with Repository.init(store) as repo:
        first = snapshot(repo, halves(2))
        dying = Repository.open(CrashingStore(store, at, after=after))
        with pytest.raises(SimulatedCrash):
            snapshot(dying, halves(2, 1))
        dying.pages.close()
        again = Repository.open(store)
        assert fsck.check(again).is_clean
        done = at == 4 and after
        assert read_back(again, "main") == halves(2, 1 if done else 0)
        gc.apply(again, gc.plan(again, min_age=0))
        assert {each.cid for each in again.log()} == {cid for cid, _ in again.objects.snapshots()}
        assert first.cid in {cid for cid, _ in again.objects.snapshots()}
        assert len([*store.list("segments/")]) == (2 if done else 1)
        again.pages.close()


def test_a_crash_in_the_middle_of_forks_leaves_whole_ones(store: Store) -> None:
    with Repository.init(store) as repo:
        snapshot(repo, halves(1))
        dying = Repository.open(CrashingStore(store, 6))
        with pytest.raises(SimulatedCrash):
            dying.fork("main", 4, name="f")
        dying.pages.close()
        assert [ref.name for ref in repo.refs.all()] == ["f/0", "main"]
        assert fsck.check(repo).is_clean
