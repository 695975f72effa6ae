"""Capture and restore over the synthetic engine: cost, atomicity, damage."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import (
    Conflict,
    DamagedPage,
    InvalidInput,
    LayoutMismatch,
    MissingPage,
    NotFound,
    PoolExhausted,
    StoreFull,
)
from kvist.layout import Layout
from kvist.pager import CachePager, LogicalSeq, PageBytes, SyntheticCachePager, capture, restore
from kvist.repo import Repository
from kvist.repo.objects import manifest_key
from kvist.store import LocalStore, MemoryStore, MeteredStore, Store
from kvist.testing.pager import contents

LAYOUT = Layout(page_size_tokens=4, n_layers=2, n_heads=2, head_dim=16, dtype="bf16", model="m", revision="1")


class BlockPager(SyntheticCachePager):
    """A synthetic engine with block hashes: a sequence's full pages are known by seed and position."""

    def __init__(self, layout: Layout = LAYOUT, *, slots: int | None = None) -> None:
        super().__init__(layout, slots=slots)
        self.blocks: dict[int, str] = {}
        self.read: list[int] = []

    def grow(self, name: str, pages: int) -> None:
        """Add full pages, with hashes, to a sequence."""
        seq = self._pool.sequences.get(name, LogicalSeq(name, ()))
        added = []
        for n in range(len(seq.page_ixs), len(seq.page_ixs) + pages):
            made = self.populate(1, seed=hash((name, n)) & 0xFFFF, sequence_id="tmp", fill=0)
            del self._pool.sequences["tmp"]
            added += made.page_ixs
            self.blocks[made.page_ixs[0]] = f"{name.encode().hex():0<16}{n:08x}"
        self._pool.sequences[name] = dataclasses.replace(seq, page_ixs=(*seq.page_ixs, *added))

    def page_blocks(self, ixs: Sequence[int]) -> list[str | None]:
        return [self.blocks.get(ix) for ix in ixs]

    def read_pages(self, ixs: Sequence[int], out: memoryview) -> None:
        assert self.is_paused
        self.read += ixs
        super().read_pages(ixs, out)

    def write_pages(self, ixs: Sequence[int], data: memoryview, blocks: Sequence[str | None]) -> None:
        assert self.is_paused
        super().write_pages(ixs, data, blocks)
        self.blocks.update((ix, block) for ix, block in zip(ixs, blocks, strict=True) if block is not None)

    def share_pages(self, blocks: Sequence[str | None]) -> list[int | None]:
        where = {block: ix for ix, block in self.blocks.items()}
        return [where.get(block) if block is not None else None for block in blocks]


def repository(store: Store | None = None) -> Repository:
    return Repository.init(store or MemoryStore())


def test_the_engine_runs_while_pages_are_hashed_and_written() -> None:
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(3, seed=1)
    seen = []

    class Watching(MemoryStore):
        def put(self, key: str, data: bytes, **kwargs: object) -> str:  # type: ignore[override]
            seen.append((key, pager.is_paused))
            return super().put(key, data, **kwargs)  # type: ignore[arg-type]

    capture(pager, repository(Watching()), branch="main")
    assert {key.partition("/")[0] for key, _ in seen} >= {"segments", "manifests", "snapshots", "refs"}
    assert not any(paused for _, paused in seen)
    assert pager.calls["pause"] == pager.calls["resume"] == 1


@pytest.mark.parametrize("method", ["logical_seqs", "page_blocks", "read_pages"])
def test_it_resumes_whatever_fails_under_the_pause(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(3, seed=1)
    repo = repository()

    def fail(*_: object) -> None:
        raise RuntimeError("the engine broke")

    monkeypatch.setattr(pager, method, fail)
    with pytest.raises(RuntimeError, match="the engine broke"):
        capture(pager, repo, branch="main")
    assert not pager.is_paused
    assert repo.log() == []


def test_a_full_store_leaves_the_engine_and_the_repository_as_they_were() -> None:
    class Full(MemoryStore):
        full = False

        def put(self, key: str, data: bytes, **kwargs: object) -> str:  # type: ignore[override]
            if self.full:
                raise StoreFull("no space left")
            return super().put(key, data, **kwargs)  # type: ignore[arg-type]

    store = Full()
    repo = repository(store)
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(3, seed=1)
    first = capture(pager, repo, branch="main").snapshot
    pager.populate(3, seed=2)
    store.full = True
    with pytest.raises(StoreFull):
        capture(pager, repo, branch="main")
    assert not pager.is_paused
    assert [snapshot.cid for snapshot in repo.log()] == [first.cid]


def test_the_second_capture_of_a_grown_session_copies_only_what_is_new() -> None:
    store = MeteredStore(MemoryStore())
    repo = repository(store)
    pager = BlockPager()
    pager.grow("s", 100)
    first = capture(pager, repo, sequences=["s"], branch="s")
    assert (first.pages, first.pages_copied) == (100, 100)
    pager.grow("s", 2)
    pager.read.clear()
    second = capture(pager, repo, sequences=["s"], parents=[first.snapshot.cid], branch="s")
    assert (second.pages, second.pages_copied) == (102, 2)
    assert second.new_bytes == 2 * 2 * LAYOUT.page_bytes
    assert len(pager.read) == 2
    fresh = BlockPager()
    restore(fresh, repo, second.snapshot.cid)
    assert contents(fresh) == contents(pager)


@pytest.mark.parametrize("change", [{"revision": "2"}, {"model": "other"}, {"memory_order": "LHND"}])
def test_block_hashes_of_another_layout_are_not_trusted(change: dict[str, str]) -> None:
    repo = repository()
    pager = BlockPager()
    pager.grow("s", 4)
    first = capture(pager, repo, branch="s")
    other = BlockPager(dataclasses.replace(LAYOUT, **change))
    other.grow("s", 4)
    assert capture(other, repo, parents=[first.snapshot.cid]).pages_copied == 4


def test_a_damaged_known_page_is_copied_again_and_so_healed() -> None:
    store = MemoryStore()
    repo = repository(store)
    pager = BlockPager()
    pager.grow("s", 4)
    first = capture(pager, repo, branch="s")
    (segment,) = store.list("segments/")
    data = bytearray(store.get(segment.key))
    data[0] ^= 1
    store.put(segment.key, data)
    with pytest.raises(DamagedPage, match="blake3:"):
        restore(BlockPager(), repo, "s")
    second = capture(pager, repo, parents=[first.snapshot.cid], branch="s")
    assert second.pages_copied == 1
    fresh = BlockPager()
    restore(fresh, repo, first.snapshot.cid)
    assert contents(fresh) == contents(pager)


def test_a_known_page_that_another_process_found_damaged_is_copied_again_at_once() -> None:
    store = MemoryStore()
    repo, other = repository(store), Repository.open(store)
    pager = BlockPager()
    pager.grow("s", 4)
    first = capture(pager, repo, branch="s")
    (segment,) = store.list("segments/")
    data = bytearray(store.get(segment.key))
    data[0] ^= 1
    store.put(segment.key, data)
    with pytest.raises(DamagedPage):
        restore(BlockPager(), other, "s")
    assert capture(pager, repo, parents=[first.snapshot.cid], branch="s").pages_copied == 1
    fresh = BlockPager()
    restore(fresh, repo, first.snapshot.cid)
    assert contents(fresh) == contents(pager)


def test_restored_pages_lie_in_allocated_slots_and_shared_ones_are_not_loaded() -> None:
    repo = repository()
    pager = BlockPager()
    pager.grow("s", 5)
    capture(pager, repo, branch="s")
    busy = BlockPager()
    busy.populate(7, seed=9)
    restored = restore(busy, repo, "s")
    assert restored.pages_loaded == 5
    installed = next(seq for seq in busy.logical_seqs() if seq.id == "s")
    assert installed.page_ixs == tuple(range(7, 12))
    again = restore(busy, repo, "s", rename=lambda name: f"{name}/2")
    assert (again.pages, again.pages_loaded) == (5, 0)
    assert contents(busy)["s"] == contents(busy)["s/2"] == contents(pager)["s"]


def test_a_restore_that_does_not_fit_is_refused_whole() -> None:
    repo = repository()
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(5, seed=1)
    capture(pager, repo, branch="main")
    small = SyntheticCachePager(LAYOUT, slots=4)
    with pytest.raises(PoolExhausted):
        restore(small, repo, "main")
    assert small.occupied_pages() == []
    assert len(small.allocate_pages(4)) == 4
    assert not small.is_paused


@pytest.mark.parametrize("broken_after", [0, 1, 3])
def test_an_engine_that_fails_in_the_middle_gets_its_slots_back(broken_after: int) -> None:
    repo = repository()
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(5, seed=1)
    capture(pager, repo, branch="main")

    class Breaking(SyntheticCachePager):
        def write_page(self, ix: int, page: PageBytes) -> None:
            if self.calls["write_page"] == broken_after:
                raise RuntimeError("the engine broke")
            super().write_page(ix, page)

    target = Breaking(LAYOUT, slots=5)
    with pytest.raises(RuntimeError):
        restore(target, repo, "main")
    assert target.occupied_pages() == []
    assert not target.is_paused
    assert len(target.allocate_pages(5)) == 5


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"head_dim": 8}, ["head_dim 16 there, 8 here"]),
        ({"dtype": "f16"}, ["dtype 'bf16' there, 'f16' here"]),
        ({"page_size_tokens": 8}, ["page_size_tokens 4 there, 8 here"]),
        ({"model": "n", "revision": "2"}, ["model 'm' there, 'n' here", "revision '1' there, '2' here"]),
        ({"tp_size": 2}, ["tp_size 1 there, 2 here"]),
        ({"tp_size": 2, "tp_rank": 1}, ["tp_rank 0 there, 1 here"]),
    ],
)
def test_mismatched_layouts_are_refused_with_both_values(change: dict[str, object], names: list[str]) -> None:
    repo = repository()
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(2, seed=1)
    capture(pager, repo, branch="main")
    target = SyntheticCachePager(dataclasses.replace(LAYOUT, **change))  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch) as refusal:
        restore(target, repo, "main")
    assert all(name in str(refusal.value) for name in names)
    assert target.calls["pause"] == 0


PARTS = [
    dataclasses.replace(LAYOUT, tp_rank=rank, tp_size=2, group=group, n_groups=2, attention=attention, n_layers=layers)
    for rank in range(2)
    for group, (attention, layers) in enumerate([("full", 2), ("sliding:6", 3)])
]


def snapshot_of_parts(repo: Repository) -> dict[Layout, SyntheticCachePager]:
    """Every rank and group of one engine as a pager of its own, and `main`, a snapshot of all of them."""
    pagers = {layout: SyntheticCachePager(layout) for layout in PARTS}
    manifests = []
    for n, (layout, pager) in enumerate(pagers.items()):
        made = pager.populate(4 - 2 * layout.group, seed=n, sequence_id="tmp", fill=3)
        del pager._pool.sequences["tmp"]
        pager.install_logical_seqs([dataclasses.replace(made, id="s", first_page=2 * layout.group)])
        (cid,) = capture(pager, repo).snapshot.manifests
        manifests.append(repo.manifest(cid))
    repo.commit(manifests, branch="main")
    return pagers


@pytest.mark.parametrize("layout", PARTS, ids=lambda layout: f"rank{layout.tp_rank}-group{layout.group}")
def test_a_pager_of_one_group_gets_the_manifest_of_its_rank_and_group(layout: Layout) -> None:
    repo = repository()
    pagers = snapshot_of_parts(repo)
    target = SyntheticCachePager(layout)
    restored = restore(target, repo, "main")
    assert contents(target) == contents(pagers[layout])
    (seq,) = target.logical_seqs()
    assert (seq.first_page, seq.cached_tokens(4)) == (2 * layout.group, 15)
    assert (restored.pages, restored.tokens) == ((2, 7) if layout.group else (4, 15))
    again = capture(target, repo).snapshot
    assert again.manifests[0] in repo.snapshot("main").manifests


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"revision": "2"}, ["revision '1' there, '2' here"]),
        ({"attention": "sliding:7"}, ["attention 'full' there, 'sliding:7' here"]),
        ({"group": 1}, ["attention 'sliding:6' there, 'full' here", "n_layers 3 there, 2 here"]),
        ({"tp_rank": 1, "group": 1, "n_layers": 5}, ["n_layers 3 there, 5 here"]),
        ({"n_groups": 3, "group": 2}, ["group 0 there, 2 here", "n_groups 2 there, 3 here"]),
        ({"group": 0, "n_groups": 1}, ["n_groups 2 there, 1 here"]),
        ({"memory_order": "vllm-nhd"}, ["memory_order 'LNHD' there, 'vllm-nhd' here"]),
    ],
    ids=str,
)
def test_a_pager_that_no_part_fits_is_refused_with_the_nearest(change: dict[str, object], names: list[str]) -> None:
    repo = repository()
    snapshot_of_parts(repo)
    target = SyntheticCachePager(dataclasses.replace(PARTS[0], **change))  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch) as refusal:
        restore(target, repo, "main")
    assert all(name in str(refusal.value) for name in names), refusal.value
    assert target.calls["pause"] == 0
    assert "tp_rank" not in str(refusal.value)


def test_an_engine_of_one_group_refuses_a_snapshot_of_several() -> None:
    repo = repository()
    snapshot_of_parts(repo)
    with pytest.raises(LayoutMismatch, match="n_groups 2 there, 1 here"):
        restore(SyntheticCachePager(LAYOUT), repo, "main")


def test_a_missing_segment_is_a_missing_page() -> None:
    store = MemoryStore()
    repo = repository(store)
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(2, seed=1)
    capture(pager, repo, branch="main")
    store.delete([info.key for info in store.list("segments/")])
    target = SyntheticCachePager(LAYOUT)
    with pytest.raises(MissingPage):
        restore(target, repo, "main")
    assert contents(target) == {}


def test_unknown_snapshots_and_missing_manifests_are_not_found() -> None:
    store = MemoryStore()
    repo = repository(store)
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(2, seed=1)
    snapshot = capture(pager, repo, branch="main").snapshot
    for rev in ("sha256:" + "0" * 64, "nobody", "abcdef0123"):
        with pytest.raises(NotFound):
            restore(SyntheticCachePager(LAYOUT), repo, rev)
    store.delete([manifest_key(snapshot.manifests[0])])
    with pytest.raises(NotFound, match="manifest"):
        restore(SyntheticCachePager(LAYOUT), Repository.open(store), "main")


def test_a_branch_that_moved_meanwhile_is_a_conflict() -> None:
    repo = repository()
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(2, seed=1)
    capture(pager, repo, branch="main")

    class Racing(SyntheticCachePager):
        def resume(self) -> None:
            super().resume()
            capture(pager, repo, branch="main")

    racer = Racing(LAYOUT)
    racer.populate(2, seed=2)
    with pytest.raises(Conflict, match="does not continue"):
        capture(racer, repo, branch="main")
    assert [snapshot.tokens for snapshot in repo.log("main")] == [6, 6]


def test_twelve_forks_cost_records_only(tmp_path: object) -> None:
    store = MeteredStore(LocalStore(tmp_path))  # type: ignore[arg-type]
    repo = repository(store)
    big = dataclasses.replace(LAYOUT, n_layers=16, head_dim=128)
    pager = SyntheticCachePager(big)
    pager.populate(64, seed=1)
    capture(pager, repo, branch="main")
    before = sum(info.size for info in store.list())
    forks = repo.fork("main", 12)
    after = sum(info.size for info in store.list())
    assert len({fork.cid for fork in forks}) == 12
    assert after / before <= 1.004
    for fork in forks:
        target = SyntheticCachePager(big)
        restore(target, repo, fork.cid)
        assert contents(target) == contents(pager)


@settings(max_examples=100, deadline=None)
@given(pages=st.lists(st.integers(0, 8), max_size=4), seed=st.integers(0, 2**64 - 1), chosen=st.none() | st.just([0]))
def test_any_engine_comes_back_equal(pages: list[int], seed: int, chosen: Collection[int] | None) -> None:
    pager = SyntheticCachePager(LAYOUT)
    for n, count in enumerate(pages):
        pager.populate(count, seed=seed ^ n, sequence_id=f"s{n}")
    names = None if chosen is None or not pages else [f"s{n}" for n in chosen]
    repo = repository()
    capture(pager, repo, sequences=names, branch="main")
    target: CachePager = SyntheticCachePager(LAYOUT)
    restore(target, repo, "main")
    assert contents(target) == {n: c for n, c in contents(pager).items() if names is None or n in names}


def test_page_order_and_fill_survive() -> None:
    pager = SyntheticCachePager(LAYOUT)
    pager.populate(4, seed=1, sequence_id="z")
    pager.install_logical_seqs([LogicalSeq("a", (3, 2, 1, 0), 2)])
    repo = repository()
    snapshot = capture(pager, repo, branch="main").snapshot
    manifest = repo.manifest(snapshot.manifests[0])
    assert [(seq.id, seq.page_ixs, seq.fill_in_last_page) for seq in manifest.sequences] == [
        ("a", (3, 2, 1, 0), 2),
        ("z", (0, 1, 2, 3), 2),
    ]
    target = SyntheticCachePager(LAYOUT)
    restore(target, repo, "main")
    assert contents(target) == contents(pager)


def test_identical_captures_add_no_page_bytes_and_a_changed_page_adds_one() -> None:
    store = MemoryStore()
    repo = repository(store)

    def page_bytes() -> int:
        return sum(segment.data_bytes for segment in repo.pages.segments())

    for _ in range(2):
        pager = SyntheticCachePager(LAYOUT)
        pager.populate(8, seed=3)
        capture(pager, repo, branch="main")
    assert page_bytes() == 8 * 2 * LAYOUT.page_bytes
    pager._pool.pages[3] = PageBytes(bytes(LAYOUT.page_bytes), b"\1" * LAYOUT.page_bytes)
    capture(pager, repo, branch="main")
    assert page_bytes() == 9 * 2 * LAYOUT.page_bytes
    with pytest.raises(InvalidInput):
        pager.read_page(99)
