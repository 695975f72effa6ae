"""The durable prefix cache: several servers on one branch, crashes, eviction, damage and gc."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvist.blocks.policy import Lru
from kvist.errors import (
    Conflict,
    DamagedPage,
    InvalidInput,
    InvalidManifest,
    KvistError,
    LayoutMismatch,
    MissingPage,
    NotFound,
    RepositoryNotFound,
    StoreError,
    StoreFull,
)
from kvist.hashing import Buffer
from kvist.ids import check_name
from kvist.layout import Layout
from kvist.pager import prefix
from kvist.pager.chain import Chain, Halves, Tip
from kvist.pager.prefix import PrefixCache
from kvist.repo import Manifest, PageEntry, RefKind, Repository, fsck, gc
from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.store import LocalStore, MemoryStore, MeteredStore, PutMode, Store, WrapperStore
from kvist.testing.faults import CrashingStore, SimulatedCrash

LAYOUT = Layout(page_size_tokens=4, n_layers=1, n_heads=1, head_dim=4, dtype="f16")
BLOCK = 2 * LAYOUT.page_bytes
TWO = [
    replace(LAYOUT, n_groups=2),
    replace(LAYOUT, n_groups=2, group=1, n_layers=2, attention="sliding:8"),
]


def name(number: int) -> str:
    return f"{number:08x}"


def half(number: int, part: str, layout: Layout = LAYOUT) -> bytes:
    return f"{number} {part} ".encode().ljust(layout.page_bytes, b".")


def entry(number: int, layout: Layout = LAYOUT, version: int = 0) -> tuple[str, bytes, bytes]:
    return name(number), half(number, f"k{version}", layout), half(number, f"v{version}", layout)


def entries(*numbers: int) -> list[tuple[str, bytes, bytes]]:
    return [entry(number) for number in numbers]


def server(
    store: Store, max_bytes: int | None = None, layouts: Sequence[Layout] = (LAYOUT,), *, known: bool = True
) -> PrefixCache:
    cache = PrefixCache(
        Repository.open(store, create=True), layouts, max_bytes=max_bytes, policy=Lru(), wait=lambda _: None
    )
    if known:
        cache.refresh()
    return cache


def repo_of(cache: PrefixCache) -> Repository:
    return cache._repo


def held(cache: PrefixCache) -> list[int]:
    return sorted(int(block, 16) for _, block in cache._blocks)


def read(cache: PrefixCache, number: int, group: int = 0, layout: Layout = LAYOUT) -> tuple[bytes, bytes] | None:
    halves = cache.find(group, name(number))
    if halves is None:
        return None
    outs = [bytearray(layout.page_bytes) for _ in halves]
    repo_of(cache).get_pages(halves, [memoryview(out) for out in outs])
    return bytes(outs[0]), bytes(outs[1])


def collect(store: Store) -> None:
    repo = Repository.open(store)
    gc.apply(repo, gc.plan(repo, min_age=0))


def damage(cache: PrefixCache, number: int) -> None:
    """Flip a bit of a block's K half in every segment."""
    store = repo_of(cache).store
    for info in list(store.list(SEGMENTS)):
        data = store.get(info.key)
        bad = data.replace(half(number, "k0"), half(number, "X0"))
        if bad != data:
            store.put(info.key, bad)


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store", durable=False)


# -- one server ------------------------------------------------------------------------------------------------------


def test_an_empty_cache(store: Store) -> None:
    cache = server(store)
    assert cache.refresh() == 0
    assert cache.find(0, name(1)) is None
    assert cache.flush() == prefix.Flushed(None, 0, 0, 0, False, 1)
    assert repo_of(cache).refs.read(RefKind.BRANCH, cache.branch) is None
    assert (len(cache), cache.nbytes, cache.pending_bytes) == (0, 0, 0)


def test_a_flushed_block_is_found_after_a_restart(store: Store) -> None:
    cache = server(store)
    assert cache.add(0, entries(1, 2, 3)) == 3
    assert cache.pending_bytes == 3 * BLOCK
    assert (0, name(1)) not in cache
    done = cache.flush()
    assert (done.blocks, done.new_bytes, done.evicted, done.attempts) == (3, 3 * BLOCK, 0, 1)
    assert (len(cache), cache.nbytes, cache.pending_bytes) == (3, 3 * BLOCK, 0)
    again = server(store, known=False)
    assert again.find(0, name(2)) is None
    assert again.refresh() == 3
    assert (0, name(2)) in again
    assert read(again, 2) == (half(2, "k0"), half(2, "v0"))
    assert again.refresh() == 0


def test_the_branch_is_an_ordinary_one(store: Store) -> None:
    cache = server(store)
    for number in range(3):
        cache.add(0, entries(number))
        cache.flush()
    repo = Repository.open(store)
    check_name(cache.branch)
    assert cache.branch.startswith("cache/")
    log = repo.log(cache.branch)
    assert [len(snapshot.parents) for snapshot in log] == [1, 1, 0]
    assert [page.block for page in repo.manifest(log[0].manifests[0]).pages] == [name(2)]
    assert [page.ix for page in repo.manifest(log[0].manifests[0]).pages] == [0]
    assert log[0].message == "prefix cache: 1 blocks, 1 new"
    report = fsck.check(repo)
    assert not report.findings
    assert gc.plan(repo, min_age=0).is_empty


def test_what_is_known_or_waits_is_not_added_again() -> None:
    cache = server(MemoryStore())
    assert cache.add(0, entries(1, 1, 2)) == 2
    assert cache.add(0, entries(2, 3)) == 1
    cache.flush()
    assert cache.add(0, entries(1, 4)) == 1
    assert cache.missing(0, [name(n) for n in (1, 4, 5)]) == [name(5)]
    assert cache.flush().blocks == 1


def test_nothing_new_costs_one_read_of_the_ref() -> None:
    store = MeteredStore(MemoryStore())
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()
    store.reset()
    assert cache.refresh() == 0
    assert {kind: traffic.calls for kind, traffic in store.traffic().items()} == {"head": 1, "get": 1}
    store.reset()
    assert cache.flush().cid is None
    assert {kind: traffic.calls for kind, traffic in store.traffic().items()} == {"head": 1, "get": 1}


def test_a_restart_forgets_only_what_was_not_flushed(store: Store) -> None:
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()
    cache.add(0, entries(2))
    assert held(server(store)) == [1]


def test_discard_lets_go_of_what_waits() -> None:
    cache = server(MemoryStore())
    cache.add(0, entries(1, 2))
    assert cache.discard() == 2
    assert cache.pending_bytes == 0
    assert cache.flush().cid is None
    assert cache.add(0, entries(1)) == 1


@pytest.mark.parametrize(
    ("group", "offered"),
    [
        (1, entries(1)),
        (-1, entries(1)),
        (0, [entry(1), ("xyz", half(1, "k"), half(1, "v"))]),
        (0, [entry(1), ("AB" * 8, half(1, "k"), half(1, "v"))]),
        (0, [entry(1), (name(2), half(1, "k"), half(1, "v")[1:])]),
    ],
)
def test_wrong_additions_are_refused_before_anything_changes(
    group: int, offered: list[tuple[str, Buffer, Buffer]]
) -> None:
    cache = server(MemoryStore())
    with pytest.raises(InvalidInput):
        cache.add(group, offered)
    assert cache.pending_bytes == 0


def test_wrong_makings_are_refused() -> None:
    repo = Repository.init(MemoryStore())
    used: Lru[tuple[int, str]] = Lru()
    used.insert([(0, "aa")])
    bad = [
        ([], None, Lru()),
        ([TWO[0]], None, Lru()),
        (TWO[::-1], None, Lru()),
        ([TWO[0], replace(TWO[1], tp_size=2)], None, Lru()),
        ([replace(LAYOUT, n_layers=0)], None, Lru()),
        ([LAYOUT], BLOCK - 1, Lru()),
        ([LAYOUT], None, used),
    ]
    for layouts, max_bytes, policy in bad:
        with pytest.raises(InvalidInput):
            PrefixCache(repo, layouts, max_bytes=max_bytes, policy=policy)


# -- groups and layouts ----------------------------------------------------------------------------------------------


def test_groups_have_their_own_blocks() -> None:
    store = MemoryStore()
    cache = server(store, layouts=TWO)
    cache.add(0, [entry(1, TWO[0])])
    cache.add(1, [entry(1, TWO[1]), entry(2, TWO[1])])
    cache.flush()
    again = server(store, layouts=TWO)
    assert again.nbytes == 2 * sum(layout.page_bytes * n for layout, n in zip(TWO, (1, 2), strict=True))
    assert again.find(0, name(2)) is None
    assert read(again, 1, 1, TWO[1]) == (half(1, "k0", TWO[1]), half(1, "v0", TWO[1]))
    manifests = [again._repo.manifest(cid) for cid in again._repo.snapshot(cache.branch).manifests]
    assert [manifest.layout.group for manifest in manifests] == [0, 1]


def test_other_layouts_have_another_branch() -> None:
    store = MemoryStore()
    server(store).add(0, entries(1))
    layouts = [LAYOUT], [replace(LAYOUT, revision="other")], [replace(LAYOUT, tp_size=2)], TWO
    assert len({server(store, layouts=each).branch for each in layouts}) == 4
    assert server(store).branch == server(MemoryStore()).branch


def test_pages_of_another_layout_are_refused() -> None:
    cache = server(MemoryStore())
    cache.add(0, entries(1))
    cache.flush()
    repo_of(cache).commit([Manifest(replace(LAYOUT, revision="other"))], branch=cache.branch)
    with pytest.raises(LayoutMismatch, match="other"):
        cache.refresh()
    assert (0, name(1)) in cache


def test_a_branch_that_is_no_chain_is_refused() -> None:
    cache = server(MemoryStore())
    repo = repo_of(cache)
    parents = [repo.commit([Manifest(LAYOUT)], message=text).cid for text in "ab"]
    repo.commit([Manifest(LAYOUT)], parents=parents, branch=cache.branch)
    with pytest.raises(InvalidManifest, match="2 parents"):
        cache.refresh()


# -- several servers -------------------------------------------------------------------------------------------------


def test_what_one_server_commits_the_other_finds(store: Store) -> None:
    one, two = server(store), server(store)
    one.add(0, entries(1, 2))
    two.add(0, entries(3))
    one.flush()
    assert two.flush().attempts == 1  # it looks first
    assert held(two) == [1, 2, 3]
    assert one.refresh() == 1
    assert held(one) == [1, 2, 3]


class Meddling(WrapperStore):
    """Lets somebody else act just before a branch moves."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.acts: list[Callable[[], object]] = []

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        if key.startswith("refs/branches/cache/") and self.acts:
            self.acts.pop(0)()
        return super().put(key, data, mode=mode)


def meddled(store: Store, acts: Sequence[Callable[[], object]], max_bytes: int | None = None) -> PrefixCache:
    meddling = Meddling(store)
    cache = server(meddling, max_bytes)
    meddling.acts += acts
    return cache


def test_a_lost_race_is_run_again() -> None:
    store = MemoryStore()
    other = server(store)
    other.add(0, entries(1))
    cache = meddled(store, [other.flush])
    cache.add(0, entries(2))
    assert cache.flush().attempts == 2
    other.refresh()
    assert held(cache) == held(other) == held(server(store)) == [1, 2]


def test_a_block_that_both_computed_is_committed_once() -> None:
    store = MemoryStore()
    other = server(store)
    other.add(0, [entry(1, version=7)])
    cache = meddled(store, [other.flush])
    cache.add(0, entries(1))
    done = cache.flush()
    assert (done.cid, done.attempts) == (None, 2)
    assert read(cache, 1) == (half(1, "k7"), half(1, "v7"))
    assert cache.pending_bytes == 0


def test_a_base_never_cuts_off_what_another_has_just_appended() -> None:
    store = MemoryStore()
    first = server(store)
    first.add(0, entries(*range(8)))
    first.flush()
    other = server(store)
    other.add(0, entries(100))
    cache = meddled(store, [other.flush], max_bytes=8 * BLOCK)
    cache.add(0, entries(200))
    done = cache.flush()
    assert done.is_base
    assert done.attempts == 2
    assert {100, 200} <= set(held(server(store)))


def test_two_servers_evict_at_once() -> None:
    store = MemoryStore()
    first = server(store)
    first.add(0, entries(*range(16)))
    first.flush()
    other = server(store, max_bytes=16 * BLOCK)
    other.add(0, entries(100))
    cache = meddled(store, [other.flush], max_bytes=16 * BLOCK)
    cache.add(0, entries(200))
    done = cache.flush()
    assert not done.is_base  # the other has made room
    assert held(cache) == held(server(store))
    assert {100, 200} <= set(held(cache))
    assert cache.nbytes <= 16 * BLOCK


def test_who_always_loses_is_told() -> None:
    store = MemoryStore()
    other = server(store)

    def append(number: int) -> None:
        other.add(0, entries(number))
        other.flush()

    cache = meddled(store, [lambda n=n: append(n) for n in range(prefix.ATTEMPTS)])
    cache.add(0, entries(100))
    with pytest.raises(Conflict, match="8 attempts"):
        cache.flush()
    assert cache.pending_bytes == BLOCK
    assert cache.flush().blocks == 1
    assert held(server(store)) == [*range(prefix.ATTEMPTS), 100]


def test_threads_on_two_servers_lose_nothing(store: Store) -> None:
    caches = [server(store), server(store)]
    errors: list[BaseException] = []
    stop = threading.Event()

    def write(who: int) -> None:
        try:
            for round_ in range(12):
                caches[who].add(0, entries(*range(100 * who + 4 * round_, 100 * who + 4 * round_ + 4)))
                while True:
                    try:
                        caches[who].flush()
                        break
                    except Conflict:
                        continue
        except BaseException as error:
            errors.append(error)

    def look(who: int) -> None:
        try:
            while not stop.is_set():
                caches[who].refresh()
                caches[who].touch([(0, name(n)) for n in range(20)])
                for number in range(5):
                    assert read(caches[who], number) in (None, (half(number, "k0"), half(number, "v0")))
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(who,)) for who in (0, 1)]
    readers = [threading.Thread(target=look, args=(who,)) for who in (0, 1)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not errors
    assert held(server(store)) == [*range(48), *range(100, 148)]


# -- the chain -------------------------------------------------------------------------------------------------------


def test_a_chain_stays_short_and_writes_little() -> None:
    store = MemoryStore()
    cache = server(store)
    written = longest = 0
    for number in range(400):
        cache.add(0, entries(number))
        cache.flush()
        written += cache._tip.links[-1].blocks
        longest = max(longest, len(cache._tip.links))
    assert longest <= prefix.LINKS + 9
    assert written < 400 * 9
    assert held(server(store)) == list(range(400))
    assert [snapshot.cid for snapshot in repo_of(cache).log(cache.branch)][::-1] == [x.cid for x in cache._tip.links]


def test_another_server_follows_a_merged_chain() -> None:
    store = MemoryStore()
    cache, other = server(store), server(store)
    for number in range(60):
        cache.add(0, entries(number))
        cache.flush()
        if number % 7 == 0:
            other.refresh()
            assert held(other) == held(cache)
            assert other._tip.links == cache._tip.links
    collect(store)
    repo_of(other).objects.forget()  # what it knew of the merged links is gone from the store
    other.refresh()
    assert held(other) == list(range(60))
    assert other._bytes == cache._bytes


def test_a_branch_moved_back_takes_its_blocks_with_it() -> None:
    cache = server(MemoryStore())
    for number in range(3):
        cache.add(0, entries(number))
        cache.flush()
    repo_of(cache).branch(cache.branch, cache._tip.links[1].cid, move=True)
    assert cache.refresh() == 0
    assert held(cache) == [0, 1]
    assert list(cache._policy) == [(0, name(0)), (0, name(1))]


# -- eviction --------------------------------------------------------------------------------------------------------


def test_the_bound_holds_after_every_flush() -> None:
    store = MemoryStore()
    cache = server(store, max_bytes=10 * BLOCK)
    bases = 0
    for number in range(50):
        cache.add(0, entries(number))
        bases += cache.flush().is_base
        assert cache.nbytes <= 10 * BLOCK
        assert held(cache)[-1] == number
        assert held(server(store)) == held(cache)
    assert bases < 30
    collect(store)
    pages = {digest for segment in Repository.open(store).pages.segments() for digest in segment.digests}
    assert len(pages) <= 2 * 2 * 10


def test_used_blocks_stay_and_tails_go_first() -> None:
    cache = server(MemoryStore(), max_bytes=8 * BLOCK)
    cache.add(0, entries(1, 2, 3, 4))
    cache.add(0, entries(11, 12, 13, 14))
    cache.flush()
    cache.touch([(0, name(n)) for n in (1, 2, 3, 99)])
    cache.add(0, entries(21))
    done = cache.flush()
    assert done.evicted == 2
    assert held(cache) == [1, 2, 3, 11, 12, 13, 21]


def test_a_base_tells_others_what_is_hot() -> None:
    store = MemoryStore()
    cache = server(store, max_bytes=8 * BLOCK)
    cache.add(0, entries(1, 2, 3, 4))
    cache.add(0, entries(11, 12, 13, 14))
    cache.touch([(0, name(n)) for n in (1, 2)])
    cache.add(0, entries(21))
    assert cache.flush().evicted == 2
    assert cache._policy
    assert list(server(store)._policy) == list(cache._policy)


def test_groups_are_evicted_evenly_after_a_restart() -> None:
    store = MemoryStore()
    cache = server(store, layouts=TWO)
    cache.add(0, [entry(n, TWO[0]) for n in range(4)])
    cache.add(1, [entry(n, TWO[1]) for n in range(4)])
    cache.flush()
    order = list(server(store, layouts=TWO)._policy)
    assert {group for group, _ in order[:2]} == {0, 1}


def test_equal_halves_count_once() -> None:
    cache = server(MemoryStore(), max_bytes=4 * BLOCK)
    same = half(0, "k0")
    cache.add(0, [(name(n), same, same) for n in range(3)])
    cache.flush()
    assert cache.nbytes == BLOCK // 2
    cache.drop(0, name(0))
    assert cache.nbytes == BLOCK // 2
    cache.drop(0, name(1))
    cache.drop(0, name(2))
    assert cache.nbytes == 0


def test_more_than_the_bound_in_one_flush_keeps_the_newest() -> None:
    cache = server(MemoryStore(), max_bytes=4 * BLOCK)
    cache.add(0, entries(*range(10)))
    done = cache.flush()
    assert (done.blocks, done.evicted, done.new_bytes) == (3, 7, 3 * BLOCK)
    assert held(cache) == [0, 1, 2]  # one chain: its root


def test_one_block_fits_its_own_bound() -> None:
    cache = server(MemoryStore(), max_bytes=BLOCK)
    for number in range(3):
        cache.add(0, entries(number))
        cache.flush()
        assert held(cache) == [number]


def test_evicted_pages_are_garbage() -> None:
    store = MemoryStore()
    cache = server(store, max_bytes=2 * BLOCK)
    cache.add(0, entries(1))
    cache.flush()
    gone = cache.find(0, name(1))
    assert gone is not None
    for number in (2, 3, 4):
        cache.add(0, entries(number))
        cache.flush()
    collect(store)
    repo = Repository.open(store)
    with pytest.raises(MissingPage):
        repo.pages.get(gone[0])
    assert not fsck.check(repo).findings
    assert held(server(store)) == held(cache)


# -- damage, gc and other people -------------------------------------------------------------------------------------


def test_a_damaged_block_is_dropped_and_healed(store: Store) -> None:
    cache, other = server(store), server(store)
    cache.add(0, entries(1, 2))
    cache.flush()
    other.refresh()
    damage(cache, 1)
    with pytest.raises(DamagedPage):
        read(cache, 1)
    assert cache.drop(0, name(1))
    assert not cache.drop(0, name(1))
    assert cache.find(0, name(1)) is None
    assert cache.refresh() == 0
    assert cache.flush().is_base
    assert not cache.flush().is_base
    assert held(server(store)) == [2]
    assert not fsck.check(Repository.open(store)).findings
    other.refresh()
    assert held(other) == [2]
    other.add(0, entries(1))
    other.flush()
    assert cache.refresh() == 1
    assert read(cache, 1) == (half(1, "k0"), half(1, "v0"))


def test_a_dropped_block_stays_dropped_when_its_chain_is_read_anew(store: Store) -> None:
    cache = server(store)
    repo = repo_of(cache)
    cache.add(0, entries(1, 2))
    cache.flush()
    same = repo.commit([repo.manifest(repo.snapshot(cache.branch).manifests[0])], message="the same, by hand")
    damage(cache, 1)
    with pytest.raises(DamagedPage):
        read(cache, 1)
    cache.drop(0, name(1))
    ref = repo.refs.read(RefKind.BRANCH, cache.branch)
    assert ref is not None
    repo.refs.move(ref, same.cid)
    assert cache.refresh() == 0
    assert held(cache) == [2]
    assert cache.flush().is_base
    assert held(server(store)) == [2]


def test_a_base_leaves_out_what_another_server_found_damaged(store: Store) -> None:
    cache, other = server(store), server(store, max_bytes=4 * BLOCK)
    cache.add(0, entries(1, 2, 3, 4))
    cache.flush()
    other.refresh()
    other.touch([(0, name(1))])
    damage(cache, 1)
    with pytest.raises(DamagedPage):
        read(cache, 1)
    other.add(0, entries(5))
    done = other.flush()
    assert (done.is_base, done.attempts) == (True, 2)
    assert held(other) == held(server(store)) == [2, 5]
    assert not fsck.check(Repository.open(store)).findings


def test_a_damaged_block_comes_back_once_it_is_healed_elsewhere(store: Store) -> None:
    cache, other = server(store), server(store)
    cache.add(0, entries(1, 2))
    cache.flush()
    other.refresh()
    damage(cache, 1)
    with pytest.raises(DamagedPage):
        read(cache, 1)
    cache.drop(0, name(1))
    repo_of(other).put_pages([half(1, "k0"), half(1, "v0")])
    other.add(0, entries(3))
    for number in range(20):  # until it writes a base
        other.add(0, entries(10 + number))
        other.flush()
    assert other._tip.links[0].blocks > 2
    cache.refresh()
    assert 1 in held(cache)
    assert read(cache, 1) == (half(1, "k0"), half(1, "v0"))
    assert not cache._dropped


def test_pages_lost_from_the_store_are_left_out(store: Store) -> None:
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()
    before = {info.key for info in store.list(SEGMENTS)}
    cache.add(0, entries(2))
    cache.flush()
    store.delete({info.key for info in store.list(SEGMENTS)} - before)
    again = server(store)
    assert held(again) == [1, 2]
    again.add(0, entries(3))
    done = again.flush()
    assert (done.is_base, done.attempts) == (True, 2)
    assert held(again) == held(server(store)) == [1, 3]
    assert not fsck.check(Repository.open(store)).findings


def test_a_chain_that_no_link_may_follow_is_begun_anew() -> None:
    """Its last link lacks a page that nobody's memory holds."""
    store = MemoryStore()
    cache = server(store)
    repo = repo_of(cache)
    old = repo.put_pages([half(1, "k0"), half(1, "v0")]).digests
    segments = [info.key for info in store.list(SEGMENTS)]
    new = repo.put_pages([half(1, "k1"), half(1, "v1")]).digests
    pages = PageEntry(0, *old, name(1)), PageEntry(1, *new, name(1))
    repo.commit([Manifest(LAYOUT, pages)], branch=cache.branch)
    store.delete(segments)
    again = server(store)
    again.add(0, entries(2))
    done = again.flush()
    assert (done.is_base, done.attempts) == (True, 3)
    assert held(server(store)) == [1, 2]
    assert not fsck.check(Repository.open(store)).findings


def test_a_gc_between_pages_and_commit_costs_only_time() -> None:
    """A page that is stored and that nobody names may go; its buffer is still there."""
    store = MemoryStore()
    cache = server(store)
    repo = repo_of(cache)
    cache.add(0, entries(1))
    cache.flush()
    cache.add(0, entries(2))
    commit, acts = repo.commit, [lambda: collect(store)]

    def interrupted(*args: object, **more: object) -> object:
        if acts:
            acts.pop()()
        return commit(*args, **more)  # type: ignore[arg-type]

    repo.commit = interrupted  # type: ignore[method-assign, assignment]
    done = cache.flush()
    assert done.attempts == 2
    assert not done.is_base
    assert read(server(store), 2) == (half(2, "k0"), half(2, "v0"))


def test_a_gc_before_the_branch_moves_is_noticed() -> None:
    """The snapshot that was written but not named yet is gone: it is written again."""
    store = MemoryStore()
    cache = meddled(store, [lambda: collect(store)])
    cache.add(0, entries(1))
    assert cache.flush().attempts == 2
    assert not fsck.check(Repository.open(store)).findings
    assert read(server(store), 1) == (half(1, "k0"), half(1, "v0"))


def test_a_conflict_with_a_gc_puts_the_branch_back() -> None:
    store = MemoryStore()
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()
    before = repo_of(cache).resolve(cache.branch)
    meddling = Meddling(store)
    late = Chain(Repository.open(meddling), [LAYOUT])
    change = late.look(Tip())
    assert change is not None
    meddling.acts.append(lambda: collect(store))
    with pytest.raises(Conflict, match="gc took"):
        late.publish(change.tip, 0, {}, "")
    assert repo_of(cache).resolve(cache.branch) == before
    cache.add(0, entries(2))
    assert cache.flush().attempts == 1
    assert held(server(store)) == [1, 2]


def test_a_deleted_branch_is_an_empty_cache(store: Store) -> None:
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()
    cache.add(0, entries(2))
    repo_of(cache).delete_ref(RefKind.BRANCH, cache.branch)
    collect(store)
    assert cache.refresh() == 0
    assert (held(cache), cache.nbytes) == ([], 0)
    cache.flush()
    assert held(server(store)) == [2]
    assert not fsck.check(Repository.open(store)).findings


def test_a_branch_deleted_in_the_last_moment_is_not_brought_back() -> None:
    store = MemoryStore()
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()

    late = meddled(store, [lambda: repo_of(cache).delete_ref(RefKind.BRANCH, cache.branch)])
    late.add(0, entries(2))
    assert late.flush().attempts == 2
    assert held(late) == held(server(store)) == [2]


def test_a_branch_that_names_nothing_is_an_error_and_memory_stays() -> None:
    store = MemoryStore()
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()
    ref = repo_of(cache).refs.read(RefKind.BRANCH, cache.branch)
    assert ref is not None
    repo_of(cache).refs.move(ref, "sha256:" + "0" * 64)
    cache.add(0, entries(2))
    with pytest.raises(NotFound):
        cache.refresh()
    with pytest.raises(NotFound):
        cache.flush()
    assert held(cache) == [1]
    assert cache.pending_bytes == BLOCK


def test_a_repository_that_vanished_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store", durable=False)
    cache = server(store)
    cache.add(0, entries(1))
    cache.flush()
    cache.add(0, entries(2))
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    (tmp_path / "store").mkdir()
    for call in (cache.refresh, cache.flush):
        with pytest.raises(RepositoryNotFound):
            call()
    assert held(cache) == [1]
    assert not list((tmp_path / "store").iterdir())
    (tmp_path / "store").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    cache.flush()
    assert held(server(store)) == [1, 2]


@pytest.mark.parametrize("error", [StoreError("down"), StoreFull("full")])
def test_a_failing_store_passes_through_and_nothing_is_forgotten(error: KvistError) -> None:
    store = MemoryStore()

    def fail() -> None:
        raise error

    cache = meddled(store, [fail], max_bytes=4 * BLOCK)
    cache.add(0, entries(1))
    with pytest.raises(type(error)):
        cache.flush()
    assert cache.pending_bytes == BLOCK
    assert cache.flush().blocks == 1


def test_an_eviction_that_failed_is_made_up_for() -> None:
    store = MemoryStore()
    server(store).refresh()
    cache = server(store, max_bytes=2 * BLOCK)
    cache.add(0, entries(1, 2))
    cache.flush()

    def fail() -> None:
        raise StoreError("down")

    late = meddled(store, [fail], max_bytes=2 * BLOCK)
    late.add(0, entries(3))
    with pytest.raises(StoreError):
        late.flush()
    assert late.flush().is_base
    assert held(late) == held(server(store)) == [3]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("max_bytes", [None, 4 * BLOCK])
def test_a_crash_at_any_write_leaves_all_or_nothing(after: bool, max_bytes: int | None) -> None:
    for at in range(1, 30):
        store = MemoryStore()
        first = server(store, max_bytes)
        first.add(0, entries(1, 2, 3, 4))
        first.flush()
        dying = CrashingStore(store)
        cache = server(dying, max_bytes)
        cache.add(0, entries(5))
        dying.arm(at, after=after)
        try:
            cache.flush()
        except SimulatedCrash:
            pass
        else:
            assert at > 3
            return
        again = server(store, max_bytes)
        assert held(again) in ([1, 2, 3, 4], [1, 2, 3, 4, 5] if max_bytes is None else [1, 2, 5])
        for number in held(again):
            assert read(again, number) == (half(number, "k0"), half(number, "v0"))
        assert not fsck.check(Repository.open(store)).findings
    raise AssertionError("a flush has fewer writes than that")


# -- any sequence of calls -------------------------------------------------------------------------------------------

_who = st.integers(0, 1)
_numbers = st.lists(st.integers(0, 15), max_size=6)


class PrefixMachine(RuleBasedStateMachine):
    """Two servers on one store, against what the branch says, read by a third.

    What is committed is never lost except to an eviction, a drop, or the deletion of the branch; no server holds what
    was never added; the bound holds; and the store is whole at every moment.
    """

    @initialize(bound=st.none() | st.integers(1, 12))
    def start(self, bound: int | None) -> None:
        self.store = MemoryStore()
        self.bound = None if bound is None else bound * BLOCK
        self.meddling = [Meddling(self.store), Meddling(self.store)]
        self.caches = [server(each, self.bound) for each in self.meddling]
        self.pending: list[set[int]] = [set(), set()]
        self.version: dict[int, int] = {}
        self.committed: set[int] = set()

    @rule(who=_who, numbers=_numbers)
    def add(self, who: int, numbers: list[int]) -> None:
        new = {n for n in numbers if name(n) in self.caches[who].missing(0, [name(n)])}
        assert self.caches[who].add(0, [entry(n, version=who) for n in numbers]) == len(new)
        self.pending[who] |= new

    @rule(who=_who, other=st.none() | _numbers)
    def flush(self, who: int, other: list[int] | None) -> None:
        """Perhaps the other server flushes in the last moment."""
        if other is not None:

            def meddle() -> None:
                self.add(1 - who, other)
                self._flush(1 - who)

            self.meddling[who].acts = [meddle]
        self._flush(who)
        self.meddling[who].acts = []

    def _flush(self, who: int) -> None:
        cache = self.caches[who]
        done = cache.flush()
        now = set(held(server(self.store)))
        if self.bound is not None:
            assert cache.nbytes <= self.bound
        if not done.evicted and done.attempts == 1 and not done.is_base:
            assert self.committed | self.pending[who] == now
        assert now <= self.committed | self.pending[who]
        if self.bound is None:
            assert now == self.committed | self.pending[who]
        self.committed = now
        self.pending[who] = set()
        assert cache.pending_bytes == 0
        assert set(held(cache)) == now

    @rule(who=_who)
    def refresh(self, who: int) -> None:
        cache = self.caches[who]
        before = set(held(cache))
        new = self._refresh(who)
        after = set(held(cache))
        assert new == len(after - before)
        assert after <= self.committed
        if not cache._has_evicted and not cache._dropped:
            assert after == self.committed
        assert cache.refresh() == 0

    def _refresh(self, who: int) -> int:
        """What another has committed waits no more."""
        new = self.caches[who].refresh()
        waits = {int(block, 16) for _, block in self.caches[who]._pending}
        assert waits <= self.pending[who] <= waits | self.committed
        self.pending[who] = waits
        return new

    @rule(who=_who, numbers=_numbers)
    def touch(self, who: int, numbers: list[int]) -> None:
        self.caches[who].touch([(0, name(n)) for n in numbers])

    @rule(who=_who, number=st.integers(0, 15))
    def drop(self, who: int, number: int) -> None:
        """The page is good, but this server could not read it: the next flush takes it off the branch."""
        cache = self.caches[who]
        if self._refresh(who) or not cache.drop(0, name(number)):
            return
        self._flush_after_drop(who)

    def _flush_after_drop(self, who: int) -> None:
        pending = self.pending[who]
        done = self.caches[who].flush()
        assert done.is_base
        now = set(held(server(self.store)))
        assert now <= self.committed | pending
        self.committed, self.pending[who] = now, set()

    @rule(who=_who, numbers=_numbers)
    def crash(self, who: int, numbers: list[int]) -> None:
        self.add(who, numbers)
        self.caches[who] = server(self.meddling[who], self.bound)
        self.pending[who] = set()

    @rule(who=_who)
    def crash_in_a_flush(self, who: int) -> None:
        dying = CrashingStore(self.store)
        cache = server(dying, self.bound)
        numbers = range(who, 16, 3)
        cache.add(0, [entry(n, version=who) for n in numbers])
        dying.arm(4, after=True)
        with contextlib.suppress(SimulatedCrash):
            cache.flush()
        now = set(held(server(self.store)))
        assert now <= self.committed | set(numbers)
        if self.bound is None:
            assert now >= self.committed
        self.committed = now

    @rule()
    def collect(self) -> None:
        collect(self.store)

    @rule()
    def delete_the_branch(self) -> None:
        repo = Repository.open(self.store)
        try:
            repo.delete_ref(RefKind.BRANCH, self.caches[0].branch)
        except NotFound:
            assert not self.committed
        repo.close()
        self.committed = set()

    @invariant()
    def is_whole(self) -> None:
        if not hasattr(self, "store"):
            return
        assert not fsck.check(Repository.open(self.store)).findings
        third = server(self.store)
        assert set(held(third)) == self.committed
        for number in held(third):
            assert read(third, number) in [(half(number, f"k{v}"), half(number, f"v{v}")) for v in (0, 1)]
        for cache in self.caches:
            assert set(cache._policy) == cache._blocks.keys() | cache._pending.keys()
            assert not cache._blocks.keys() & cache._pending.keys()
            halves: set[str] = {digest for pair in cache._blocks.values() for digest in pair}
            assert cache.nbytes == len(halves) * LAYOUT.page_bytes
            assert sum(cache._uses.values()) == 2 * len(cache)


def run(examples: int, steps: int) -> None:
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=[*HealthCheck]
    )
    run_state_machine_as_test(PrefixMachine, settings=chosen)


def test_any_sequence_of_calls() -> None:
    run(12, 25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_sequence_of_calls_for_long() -> None:
    run(100, 50)


def test_halves_are_what_the_repository_names() -> None:
    cache = server(MemoryStore())
    cache.add(0, entries(1))
    cache.flush()
    halves: Halves | None = cache.find(0, name(1))
    assert halves is not None
    assert repo_of(cache).pages.get(halves[1]) == half(1, "v0")
