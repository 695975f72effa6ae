"""Conversions against a plain reference, and what they leave behind when they fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from converting import LAYOUT, ORDERS, Grown, Made, flip_page, ranks_of
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kvist.errors import (
    Conflict,
    DamagedPage,
    InvalidInput,
    InvalidName,
    KvistError,
    LayoutMismatch,
    NotFound,
    PrunedSnapshot,
    StoreFull,
    UnsupportedModel,
)
from kvist.layout import Layout
from kvist.pager import SyntheticCachePager, convert, restore
from kvist.pager.carry import CONVERTED
from kvist.pager.repage import Repager, runs_of
from kvist.repo import LogicalSeq, Manifest, RefKind, Repository, Snapshot, gc, marks
from kvist.repo.objects import manifest_key
from kvist.store import MemoryStore, open_store

orders = st.sampled_from(sorted(ORDERS))
divided = st.sampled_from(
    [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (6, 3)]
)
"""KV heads of a model, and ranks."""


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, list[Layout], list[Layout]]:
    """KV heads, and the ranks of two layouts of one model."""
    heads, tp_size = draw(divided)
    _, other = draw(divided.filter(lambda pair: pair[0] == heads))
    base = replace(
        LAYOUT,
        n_layers=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["bf16", "f16", "f32"])),
    )
    sizes = st.integers(1, 9)
    first, second = (replace(base, page_size_tokens=draw(sizes), memory_order=draw(orders)) for _ in range(2))
    return heads, ranks_of(first, heads, tp_size), ranks_of(second, heads, other)


@st.composite
def sequences(draw: st.DrawFn) -> list[Grown]:
    grown: list[Grown] = []
    for number in range(draw(st.integers(1, 3))):
        like = draw(st.none() | st.integers(0, number - 1)) if number else None
        grown.append(Grown(draw(st.integers(0, 23)), like, draw(st.integers(0, 9))))
    return grown


def tells_heads(source: Layout, target: Layout) -> bool:
    try:
        Repager(source, target)
    except LayoutMismatch as error:
        assert "decides which rank holds which" in str(error)
        return False
    return True


def converted(repo: Repository, rev: str, wanted: Sequence[Layout], branch: str | None = None, **how: Any) -> str:
    return convert.apply(repo, convert.plan(repo, rev, wanted, branch=branch), **how).cid


def ask(**changes: Any) -> list[Layout]:
    return [replace(LAYOUT, **changes)]


# -- every element ---------------------------------------------------------------------------------------------------


@given(pairs(), sequences(), st.sampled_from([1, 300, convert.WINDOW]))
@settings(deadline=None, max_examples=100)
def test_every_element_arrives_and_there_and_back_is_identity(
    pair: tuple[int, list[Layout], list[Layout]], grown: list[Grown], window: int
) -> None:
    heads, source, target = pair
    assume(source != target and tells_heads(source[0], target[0]))
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, source, heads, grown)
        there = converted(repo, "main", target[-1:], "there", window=window)
        made.require(repo, there)
        assert [manifest.layout for manifest in repo.manifests(there)] == target
        back = converted(repo, "there", source, "back", window=window)
        for old, new in zip(repo.manifests("main"), repo.manifests(back), strict=True):
            assert bytes_of(new) == bytes_of(old)


def bytes_of(manifest: Manifest) -> dict[str, list[tuple[str, str]]]:
    entries = {page.ix: (page.k, page.v) for page in manifest.pages}
    return {seq.id: [entries[ix] for ix in seq.page_ixs] for seq in manifest.sequences}


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
@example(16, 8, 4)
def test_runs_cover_every_token_once(tokens: int, size: int, into: int) -> None:
    found = list(runs_of(range(-(-tokens // size)), tokens, size=size, into=into))
    rows = [run.sources[at // size] * size + at % size for run in found for at in range(run.skip, run.skip + run.rows)]
    assert rows == list(range(tokens))
    assert all(run.rows == into for run in found[:-1])
    assert all(len(run.sources) == -(-(run.skip + run.rows) // size) for run in found), "no page is read for nothing"


def test_what_sequences_share_they_share_again() -> None:
    """Twelve forks of 64 tokens, each with 5 of its own: 16 pages of 4, and then 8 of 8, and one more a fork."""
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, [LAYOUT], 2, [Grown(64), *(Grown(69, 0, 16) for _ in range(12))])
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        assert (len(plan.sources), len(plan.runs)) == (16 + 12 * 2, 8 + 12)
        assert plan.made_bytes == 2 * 20 * plan.layout.page_bytes
        done = convert.apply(repo, plan)
        assert done.new_bytes == plan.made_bytes
        made.require(repo, done.cid)


def test_pages_are_read_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, ranks_of(LAYOUT, 4, 2), 4, [Grown(199), Grown(150, 0, 12)])
        in_hand, steps = [], []
        get, put = repo.get_pages, repo.put_pages

        def get_pages(digests: Sequence[str], outs: Sequence[memoryview]) -> None:
            in_hand.append(sum(map(len, outs)))
            get(digests, outs)

        def put_pages(pages: Sequence[memoryview]) -> Any:
            in_hand[-1] += sum(map(len, pages))
            return put(pages)

        monkeypatch.setattr(repo, "get_pages", get_pages)
        monkeypatch.setattr(repo, "put_pages", put_pages)
        plan = convert.plan(repo, "main", ask(n_heads=4, page_size_tokens=6, memory_order="LHND"))
        done = convert.apply(repo, plan, window=10_000, progress=lambda now, of: steps.append((now, of)))
        assert len(in_hand) > 5 and max(in_hand) <= 10_000
        assert plan.read_bytes + plan.made_bytes <= sum(in_hand) < 1.2 * (plan.read_bytes + plan.made_bytes)
        assert steps[-1] == (plan.made_bytes, plan.made_bytes) and len(steps) == len(in_hand)
        made.require(repo, done.cid)


def test_copies_of_heads_are_read_once() -> None:
    copies = ranks_of(LAYOUT, 2, 4)
    assert Repager(copies[0], replace(LAYOUT, n_heads=2)).ranks == (0, 2)
    assert Repager(copies[0], replace(copies[0], page_size_tokens=8)).ranks == (0, 1, 2, 3), (
        "who knows whether they are"
    )


# -- what it says ----------------------------------------------------------------------------------------------------


def test_it_says_that_it_was_converted() -> None:
    numerics = {"engine": "one", "threads": 2}
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, [LAYOUT], 2, [Grown(9)], numerics=numerics)
        cid = converted(repo, "main", ask(page_size_tokens=16, memory_order="vllm-cpu-vec"))
        snapshot = repo.snapshot(f"converted/{made.snapshot.cid[7:19]}")
        assert snapshot.cid == cid and snapshot.parents == (made.snapshot.cid,)
        assert (snapshot.name, snapshot.tokens) == ("story", 9)
        assert snapshot.message == (
            f"converted from {made.snapshot.cid[7:19]}, not bit-exact: page_size_tokens 4 to 16, "
            "memory_order LNHD to vllm-cpu-vec"
        )
        (manifest,) = repo.manifests(cid)
        assert manifest.numerics == numerics | {CONVERTED: [LAYOUT.fingerprint]}
        assert all(page.block is None for page in manifest.pages), "another engine names blocks in its own way"
        again = converted(repo, cid, ask(page_size_tokens=2), "again")
        (manifest,) = repo.manifests(again)
        both = [LAYOUT.fingerprint, ask(page_size_tokens=16, memory_order="vllm-cpu-vec")[0].fingerprint]
        assert manifest.numerics == numerics | {CONVERTED: both}
        pager = SyntheticCachePager(manifest.layout)
        restored = restore(pager, repo, again)
        assert not restored.same_numerics and restored.tokens == 9
        (seq,) = pager.logical_seqs()
        halves = [half for ix in seq.page_ixs for half in (pager.read_page(ix).k, pager.read_page(ix).v)]
        assert halves == [repo.pages.get(digest) for page in bytes_of(manifest)["s00"] for digest in page]


def test_what_of_a_state_goes_on() -> None:
    cartridge = {"id": "a", "identity": "blake3:1", "tokens": 4, "placed": True}
    state = {
        "sampling": {"temperature": 0.8, "seed": 7},
        "prompt_tokens": 4,
        "finished": False,
        "cartridge": cartridge,
        "salt": "0011",
        "not_carried": ["stop texts"],
        "rng": "AAAA",
        "draws": 3,
        "grammar": {"at": 7},
    }
    lost = [
        "its draws start anew: the generator's state is its engine's own",
        "grammar: what it means is known to its engine only",
    ]
    with Repository.init(MemoryStore()) as repo:
        Made(repo, [LAYOUT], 2, [Grown(9)], state=state)
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        assert plan.lost == {"s00": lost} and plan.to_json()["sequences"][0]["not_carried"] == lost
        (seq,) = plan.sequences
        kept = {name: state[name] for name in ("sampling", "prompt_tokens", "finished", "cartridge", "salt")}
        assert seq.state == kept | {"not_carried": ["stop texts", *lost]}
        done = convert.apply(repo, plan)
        twice = convert.plan(repo, done.cid, ask(page_size_tokens=2))
        assert twice.sequences[0].state == seq.state and not twice.lost


@pytest.mark.parametrize(
    "state",
    [{"sampling": {"temperature": 0.0, "seed": 7}, "draws": 3}, {"sampling": {"temperature": 1.0}, "draws": 0}, {}],
)
def test_nothing_is_lost_where_nothing_was_drawn(state: dict[str, Any]) -> None:
    with Repository.init(MemoryStore()) as repo:
        Made(repo, [LAYOUT], 2, [Grown(9)], state=state)
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        assert not plan.lost and "draws" not in plan.sequences[0].state


def test_states_and_numerics_that_nobody_can_read_do_no_harm() -> None:
    with Repository.init(MemoryStore()) as repo:
        Made(repo, [LAYOUT], 2, [Grown(3)], state={"not_carried": 5, "odd": 1, "sampling": []}, numerics={CONVERTED: 7})
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        assert plan.sequences[0].state["not_carried"] == plan.lost["s00"]
        assert plan.numerics == {CONVERTED: [LAYOUT.fingerprint]}


def test_pages_of_no_sequence_are_left_out_and_counted() -> None:
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, [LAYOUT], 2, [Grown(9)], loose=5)
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        assert plan.left_out == 5 and len(plan.sources) == 3
        made.require(repo, convert.apply(repo, plan).cid)


# -- again -----------------------------------------------------------------------------------------------------------


def test_again_is_nothing_new_unless_something_is_damaged() -> None:
    store = MemoryStore()
    with Repository.init(store) as repo:
        made = Made(repo, [LAYOUT], 2, [Grown(33)])
        cid = converted(repo, "main", ask(page_size_tokens=8))
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        assert plan.existing == cid and convert.apply(repo, plan).cid == cid
        assert convert.plan(repo, "main", ask(page_size_tokens=8), branch="other").existing is None
        with pytest.raises(Conflict, match="does not continue"):
            convert.plan(repo, "main", ask(page_size_tokens=2))
        (manifest,) = repo.manifests(cid)
        flip_page(repo.store, manifest.pages[1].k)
        assert repo.pages.verify([manifest.pages[1].k])
        again = convert.plan(repo, "main", ask(page_size_tokens=8))
        assert again.existing == cid and again.mends and not plan.mends
        assert convert.apply(repo, again) == convert.Converted(cid, again.layout.page_bytes)
        made.require(repo, cid)


def test_a_branch_at_the_source_moves() -> None:
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, [LAYOUT], 2, [Grown(9)])
        cid = converted(repo, "main", ask(page_size_tokens=8), "main")
        tip = repo.refs.read(RefKind.BRANCH, "main")
        assert tip is not None and tip.cid == cid and repo.snapshot("main").parents == (made.snapshot.cid,)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "org/n"}, LayoutMismatch, "model 'org/m' there, 'org/n' wanted"),
        ({"revision": None}, LayoutMismatch, "revision 'r1' there, None wanted"),
        ({"dtype": "f16", "page_size_tokens": 8}, LayoutMismatch, "dtype 'bf16' there, 'f16' wanted"),
        ({"n_layers": 3}, LayoutMismatch, "n_layers 2 there, 3 wanted"),
        ({"head_dim": 8}, LayoutMismatch, "head_dim 4 there, 8 wanted"),
        ({"attention": "mla", "n_heads": 1}, LayoutMismatch, "attention 'full' there, 'mla' wanted"),
        ({"attention": "sliding:8"}, LayoutMismatch, "attention 'full' there, 'sliding:8' wanted"),
        ({"n_groups": 2}, LayoutMismatch, "n_groups 1 there, 2 wanted"),
        ({"n_heads": 4}, LayoutMismatch, "2 KV heads on each of 1 ranks there, 4 on each of 1 wanted"),
        (
            {"memory_order": "vllm-cpu-amx"},
            UnsupportedModel,
            "wanted holds pages in the order vllm-cpu-amx,",
        ),
        ({}, InvalidInput, "has that layout already"),
    ],
)
def test_refused_by_what_is_wanted(changes: dict[str, Any], error: type[KvistError], says: str) -> None:
    with Repository.init(MemoryStore()) as repo:
        Made(repo, [LAYOUT], 2, [Grown(9)])
        with pytest.raises(error, match=says):
            convert.plan(repo, "main", ask(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention": "mla", "n_heads": 1}, "holds mla attention, only full"),
        ({"attention": "sliding:8"}, "holds sliding:8 attention, only full"),
        ({"dtype": "fp8e4m3"}, "holds fp8e4m3, whose scales"),
        ({"memory_order": "vllm-cpu-amx"}, "the order vllm-cpu-amx, which only their engine can read"),
    ],
)
def test_refused_by_what_there_is(changes: dict[str, Any], says: str) -> None:
    layout = replace(LAYOUT, **changes)
    with Repository.init(MemoryStore()) as repo:
        repo.commit([Manifest(layout, (), (LogicalSeq("s", ()),))], branch="main")
        with pytest.raises(UnsupportedModel, match=says):
            convert.plan(repo, "main", [replace(layout, page_size_tokens=8)])


def test_refused_with_groups_ranks_or_sequences_that_do_not_fit() -> None:
    empty = (LogicalSeq("s", ()),)
    two = ranks_of(LAYOUT, 2, 2)
    with Repository.init(MemoryStore()) as repo:
        groups = [replace(LAYOUT, group=group, n_groups=2) for group in range(2)]
        repo.commit([Manifest(layout, (), empty) for layout in groups], branch="groups")
        with pytest.raises(UnsupportedModel, match="layers in 2 groups"):
            convert.plan(repo, "groups", [replace(groups[0], page_size_tokens=8)])
        repo.commit([Manifest(two[0], (), empty)], branch="ranks")
        with pytest.raises(NotFound, match=r"lacks ranks \[1\] of 2"):
            convert.plan(repo, "ranks", [LAYOUT])
        repo.commit([Manifest(two[0], (), empty), Manifest(two[1], (), (LogicalSeq("t", ()),))], branch="names")
        with pytest.raises(LayoutMismatch, match="different sequences"):
            convert.plan(repo, "names", [LAYOUT])
        repo.commit([Manifest(two[0], (), empty), Manifest(two[1])], branch="counts")
        with pytest.raises(LayoutMismatch, match="different sequences"):
            convert.plan(repo, "counts", [LAYOUT])
        odd = [two[0], replace(two[1], page_size_tokens=8)]
        repo.commit([Manifest(layout, (), empty) for layout in odd], branch="odd")
        with pytest.raises(LayoutMismatch, match="differ in their layouts"):
            convert.plan(repo, "odd", [LAYOUT])
        repo.commit([Manifest(LAYOUT)], branch="none")
        with pytest.raises(InvalidInput, match="holds no sequences"):
            convert.plan(repo, "none", ask(page_size_tokens=8))
        with pytest.raises(InvalidName):
            convert.plan(repo, "none", ask(page_size_tokens=8), branch="../x")


def test_ranks_that_are_in_no_order_are_refused() -> None:
    """No commit records such a snapshot, but somebody else's tool may: heads would lie in each other's place."""
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, ranks_of(LAYOUT, 4, 2), 4, [Grown(9)]).snapshot
        odd = Snapshot(tuple(reversed(made.manifests)), tokens=made.tokens)
        repo.objects.put_snapshots([odd])
        with pytest.raises(InvalidInput, match="must ascend by rank"):
            convert.plan(repo, odd.cid, ask(n_heads=4))


def test_refused_where_it_cannot_be_told_which_rank_holds_which_head() -> None:
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, ranks_of(LAYOUT, 2, 4), 2, [Grown(9)])
        two = ranks_of(LAYOUT, 2, 2)
        with pytest.raises(LayoutMismatch, match="whether the model has 1 or 2 KV heads") as caught:
            convert.plan(repo, "main", two)
        assert caught.value.hint is not None and "one rank first" in caught.value.hint
        converted(repo, "main", ask(n_heads=2), "one")
        made.require(repo, converted(repo, "one", two, "two"))


def test_a_pruned_snapshot_is_named() -> None:
    store = MemoryStore()
    with Repository.init(store) as repo:
        made = Made(repo, [LAYOUT], 2, [Grown(9)])
        Made(repo, [LAYOUT], 2, [Grown(9)], seed=1)
        marks.record_pruned(store, [made.snapshot.cid])
        store.delete([manifest_key(made.snapshot.manifests[0])])
    with Repository.open(store) as repo, pytest.raises(PrunedSnapshot):
        convert.plan(repo, made.snapshot.cid, ask(page_size_tokens=8))


def keys(repo: Repository) -> set[str]:
    """All that is stored but pages and marks of damage."""
    return {info.key for info in repo.store.list("") if not info.key.startswith(("segments/", "marks/", "damaged/"))}


def test_a_damaged_page_is_named_and_nothing_is_half_written() -> None:
    with Repository.init(MemoryStore()) as repo:
        Made(repo, [LAYOUT], 2, [Grown(80)])
        last = repo.manifests("main")[0].pages[-1]
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        flip_page(repo.store, last.v)
        before = keys(repo)
        with pytest.raises(DamagedPage, match=last.v):
            convert.apply(repo, plan, window=1)
        assert keys(repo) == before


def test_a_gc_beside_it_takes_nothing() -> None:
    """Neither the source, which no ref reaches any more, nor pages that are stored and not named yet."""
    with Repository.init(MemoryStore()) as repo:
        made = Made(repo, [LAYOUT], 2, [Grown(80)])
        plan = convert.plan(repo, "main", ask(page_size_tokens=8))
        repo.delete_ref(RefKind.BRANCH, "main")

        def collect(*_: int) -> None:
            gc.apply(repo, gc.plan(repo, min_age=0))

        made.require(repo, convert.apply(repo, plan, window=1, progress=collect).cid)
        assert not list(repo.store.list("leases/"))


def test_a_full_store_leaves_nothing_named(tmp_path: Any) -> None:
    with Repository.init(open_store((tmp_path / "store").as_uri() + "?durable=0")) as repo:
        Made(repo, [LAYOUT], 2, [Grown(80)])
        plan, before, calls = convert.plan(repo, "main", ask(page_size_tokens=8)), keys(repo), []
        put = repo.put_pages

        def full(pages: Sequence[Any]) -> Any:
            calls.append(len(pages))
            if len(calls) == 3:
                raise StoreFull("no space")
            return put(pages)

        repo.put_pages = full  # type: ignore[method-assign]
        with pytest.raises(StoreFull):
            convert.apply(repo, plan, window=1)
        assert len(calls) == 3 and keys(repo) == before


# -- the layout that is wanted -----------------------------------------------------------------------------------------


def test_layouts_come_as_one_or_as_a_list() -> None:
    fields = dataclasses.asdict(LAYOUT)
    ranks = ranks_of(LAYOUT, 2, 2)
    listed = {"layouts": [dataclasses.asdict(layout) for layout in ranks], "numerics": {"engine": "x"}}
    assert convert.layouts_of(json.dumps(fields).encode(), "here") == [LAYOUT]
    assert convert.layouts_of(json.dumps(listed).encode(), "here") == ranks
    told = {"layouts": [fields | {"fingerprint": LAYOUT.fingerprint}]}
    assert convert.layouts_of(json.dumps(told).encode(), "here") == [LAYOUT]
    with pytest.raises(InvalidInput, match="expected fingerprint"):
        convert.layouts_of(json.dumps(fields | {"fingerprint": "sha256:0"}).encode(), "here")
    odd = json.dumps(fields | {"x": 1})
    for wrong in ("", "[]", "{}", '{"layouts": []}', '{"layouts": {}}', '{"layouts": [1]}', odd):
        with pytest.raises(InvalidInput):
            convert.layouts_of(wrong.encode(), "here")


def test_a_layout_that_could_be_converted_is_refused_with_the_command() -> None:
    with pytest.raises(LayoutMismatch) as caught:
        LAYOUT.require(replace(LAYOUT, page_size_tokens=8), of="snapshot x", into="the engine")
    assert caught.value.hint is not None and caught.value.hint.startswith("kvist convert REV --to-layout FILE")
    two = ranks_of(LAYOUT, 2, 2)
    fp8 = replace(LAYOUT, dtype="fp8e4m3")
    for here, there in (
        *((LAYOUT, replace(LAYOUT, **changes)) for changes in ({"model": "n"}, {"attention": "mla"})),
        (LAYOUT, replace(LAYOUT, page_size_tokens=8, dtype="f32")),
        (two[0], two[1]),
        (fp8, replace(fp8, page_size_tokens=8)),
    ):
        with pytest.raises(LayoutMismatch) as caught:
            here.require(there, of="snapshot x", into="the engine")
        assert caught.value.hint is None
