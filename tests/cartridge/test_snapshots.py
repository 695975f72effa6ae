"""Cartridges as snapshots, and pages of every known order as cartridges."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.placing import VIRTUAL
from kvist.cartridge.shards import tensor_bytes
from kvist.cartridge.snapshots import STATE, from_repository, to_repository
from kvist.errors import (
    DamagedCartridge,
    InvalidCartridge,
    InvalidInput,
    InvalidName,
    KvistError,
    LayoutMismatch,
    NotFound,
    UnsupportedModel,
)
from kvist.layout import Layout
from kvist.pager.sharding import rank_heads
from kvist.repo import LogicalSeq, Manifest, PageEntry, RefKind, Repository
from kvist.repo import fsck as checking
from kvist.store import MemoryStore

from .making import MODEL, make_cartridge, make_layers, models, same

SIZE = 16


@pytest.fixture
def repo() -> Iterator[Repository]:
    with Repository.init(MemoryStore()) as made:
        yield made


# -- there and back ----------------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(model=models, tokens=st.integers(1, 50), ids=st.booleans(), size=st.sampled_from([1, 5, 16, 64]))
def test_a_cartridge_comes_back(model: ModelIdentity, tokens: int, ids: bool, size: int) -> None:
    """Bit for bit, whatever the page size; with all that was said of it."""
    made = make_cartridge(
        tokens, ids=ids, model=model, labels={"a": "b"}, provenance={"x": [1, 0.5]}, training_steps=0 if ids else 9
    )
    with Repository.init(MemoryStore()) as repo:
        snapshot = to_repository(made, repo, name="x/y", page_size_tokens=size)
        assert snapshot.tokens == tokens and repo.resolve("cartridge/x/y") == snapshot.cid
        assert checking.check(repo).is_clean
        back = from_repository(repo, "cartridge/x/y")
        assert same(back, made) and back.manifest == made.manifest and back.identity == made.identity
        assert from_repository(repo, snapshot.cid, model=model).identity == made.identity


def test_the_same_again_is_no_new_snapshot(repo: Repository) -> None:
    made = make_cartridge()
    first = to_repository(made, repo, name="x")
    assert to_repository(made, repo, name="x") == first
    second = to_repository(make_cartridge(seed=1), repo, name="x")
    assert second.parents == (first.cid,)
    assert from_repository(repo, first.cid).identity == made.identity


def test_versions_share_pages(repo: Repository) -> None:
    """One token changed: the other pages are stored once."""
    layers = make_layers(64)
    to_repository(Cartridge.create(layers, MODEL, cartridge_id="x"), repo, name="x")
    stored = sum(segment.data_bytes for segment in repo.pages.segments())
    layers[0][0][20] = 1
    to_repository(Cartridge.create(layers, MODEL, cartridge_id="x"), repo, name="x")
    page = 2 * MODEL.num_layers * SIZE * 2 * 8
    assert sum(segment.data_bytes for segment in repo.pages.segments()) - stored < 2 * page


def test_saved_from_a_snapshot(repo: Repository, tmp_path: Any) -> None:
    made = make_cartridge()
    to_repository(made, repo, name="x")
    from_repository(repo, "cartridge/x", directory=tmp_path / "c", cartridge_id="other", labels={"k": "v"})
    with Cartridge.from_pretrained(tmp_path / "c") as opened:
        assert same(opened, made) and opened.identity == made.identity
        assert (opened.manifest.cartridge_id, opened.manifest.labels) == ("other", {"k": "v"})


@pytest.mark.parametrize("name", ["", "../x", "a b"])
def test_names_of_branches(repo: Repository, name: str) -> None:
    with pytest.raises(InvalidName):
        to_repository(make_cartridge(), repo, name=name)
    assert repo.refs.names(RefKind.BRANCH) == []


def test_a_manifest_in_the_state_that_does_not_fit_its_pages_is_refused(repo: Repository) -> None:
    to_repository(make_cartridge(), repo, name="x")
    (manifest,) = (repo.manifest(cid) for cid in repo.snapshot("cartridge/x").manifests)
    (seq,) = manifest.sequences
    for changes in (
        {"checksum": "0" * 64},
        {"num_tokens_raw": 36},
        {"has_token_ids": False},
        {"num_layers": 2, "layers": [{"num_kv_heads": 2, "head_dim": 8}] * 2},
        {"schema_version": 7},
        {"x": 1},
    ):
        state = {STATE: dict(seq.state[STATE]) | changes}
        repo.commit([dataclasses.replace(manifest, sequences=(dataclasses.replace(seq, state=state),))], branch="bad")
        with pytest.raises((InvalidCartridge, DamagedCartridge)):
            from_repository(repo, "bad")


# -- an engine's snapshot ----------------------------------------------------------------------------------------

FULL = ModelIdentity(
    model_id="org/tiny",
    revision="r1",
    num_layers=3,
    num_kv_heads=4,
    head_dim=8,
    dtype="float32",
    rope={"rope_theta": 1e4, "rope_type": "default"},
    tokenizer_hash="sha256:1",
)
ORDERS = ("LNHD", "LHND", "vllm-cpu-vec", "vllm-cpu-vec16")


def page_of(keys: Tensor, values: Tensor, order: str) -> tuple[bytes, bytes]:
    """Halves of a page of ``[layers, tokens, heads, head_dim]``, as `kvist.engines.vllm.pages` reads them."""
    if order == "LNHD":
        halves = (keys, values)
    elif order == "LHND":
        halves = (keys.transpose(1, 2), values.transpose(1, 2))
    else:
        halves = (keys.permute(0, 2, 3, 1), values.transpose(1, 2))
    k, v = (bytes(tensor_bytes(half.contiguous())) for half in halves)
    return k, v


def snapshot_of(
    repo: Repository,
    layers: Sequence[tuple[Tensor, Tensor]],
    *,
    order: str = "LNHD",
    tp: int = 1,
    cached: int | None = None,
    ids: Sequence[int] | None = None,
    heads: int = 4,
    missing: Sequence[int] = (),
    **changes: Any,
) -> str:
    """What an engine would capture: one manifest a rank, one sequence, pages in no order of their own."""
    keys, values = (torch.stack(list(part)) for part in zip(*layers, strict=True))
    tokens = cached or keys.shape[1]
    manifests = []
    for rank in range(tp):
        if rank in missing:
            continue
        mine = rank_heads(heads, tp, rank)
        geometry: dict[str, Any] = {"page_size_tokens": SIZE, "n_layers": 3, "n_heads": len(mine), "head_dim": 8}
        geometry |= {"dtype": "f32", "model": "org/tiny", "revision": "r1", "memory_order": order}
        layout = Layout(**(geometry | {"tp_rank": rank, "tp_size": tp} | changes))
        count = -(-tokens // SIZE)
        entries = []
        for page in range(count):
            half = torch.zeros((2, 3, SIZE, len(mine), 8))
            rows = slice(page * SIZE, min((page + 1) * SIZE, keys.shape[1]))
            for side, whole in enumerate((keys, values)):
                half[side, :, : rows.stop - rows.start] = whole[:, rows, mine.start : mine.stop]
            put = repo.put_pages(page_of(half[0], half[1], order))
            entries.append(PageEntry(5 + 3 * ((page * 7) % count if count % 7 else page), *put.digests))
        seq = LogicalSeq("doc", tuple(e.ix for e in entries), tokens % SIZE, tuple(ids or range(7, 7 + tokens)))
        manifests.append(Manifest(layout, tuple(entries), (seq,), {"engine": "test"}))
    return repo.commit(manifests).cid


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_every_order_and_every_rank(repo: Repository, order: str, tp: int, tokens: int) -> None:
    layers = make_layers(tokens, FULL)
    cid = snapshot_of(repo, layers, order=order, tp=tp)
    made = from_repository(repo, cid, model=FULL, cartridge_id="doc/1", labels={"a": "b"})
    assert same(made, Cartridge.create(layers, FULL, cartridge_id="x", token_ids=range(7, 7 + tokens)))
    manifest = made.manifest
    assert manifest.model == FULL and manifest.cartridge_id == "doc/1" and manifest.labels == {"a": "b"}
    assert manifest.provenance["from"] == {"snapshot": cid, "sequence": "doc", "numerics": {"engine": "test"}}
    assert manifest.source_format == "snapshot" and manifest.training_steps == 0


def test_the_model_is_known_as_far_as_the_snapshot_says(repo: Repository) -> None:
    manifest = from_repository(repo, snapshot_of(repo, make_layers(20, FULL))).manifest
    assert (manifest.model_id, manifest.model_revision, manifest.rope) == ("org/tiny", "r1", {})
    assert manifest.validate_against_model(FULL) == []


def test_ranks_that_hold_copies_of_heads(repo: Repository) -> None:
    """More ranks than heads: vLLM's rule gives neighbours the same head."""
    model = dataclasses.replace(FULL, num_kv_heads=2)
    layers = make_layers(20, model)
    cid = snapshot_of(repo, layers, tp=4, heads=2)
    assert same(
        from_repository(repo, cid, model=model),
        Cartridge.create(layers, model, cartridge_id="x", token_ids=range(7, 27)),
    )


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
def test_only_its_first_tokens(repo: Repository, tokens: int) -> None:
    layers = make_layers(40, FULL)
    cid = snapshot_of(repo, layers, order="vllm-cpu-vec")
    made = from_repository(repo, cid, tokens=tokens)
    assert made.num_tokens == tokens and made.token_ids == tuple(range(7, 7 + tokens))
    assert all(torch.equal(made.layer(n)[0], layers[n][0][:tokens]) for n in range(3))


def test_a_cut_of_a_cartridge_is_another_cartridge(repo: Repository) -> None:
    made = make_cartridge(40)
    to_repository(made, repo, name="x")
    cut = from_repository(repo, "cartridge/x", tokens=32)
    assert cut.num_tokens == 32 and cut.identity != made.identity and cut.token_ids == tuple(range(100, 132))


@pytest.mark.parametrize("tokens", [1, 2, 36, 37])
def test_a_cut_keeps_what_decides_its_keys_and_all_that_is_said(repo: Repository, tokens: int) -> None:
    said: dict[str, Any] = {"first_position": 100, "training_steps": 5, "license": "MIT", "labels": {"a": "b"}}
    said |= {"provenance": {"made_by": "x"}, "source_document": "d", "source_format": "y", "chat_template_hash": "z"}
    made = make_cartridge(37, ids=False, num_frozen_tokens=2, block_size=8, resource_kind="kv_prefix", **said)
    to_repository(made, repo, name="x")
    cut = from_repository(repo, "cartridge/x", tokens=tokens)
    if tokens == 37:
        assert cut.manifest == made.manifest
        return
    manifest = cut.manifest
    assert manifest.model == made.manifest.model and manifest.num_frozen_tokens == min(2, tokens)
    expected = said | {"provenance": {"made_by": "x", "cut": {"tokens": tokens, "of": made.identity}}}
    assert {name: getattr(manifest, name) for name in said} == expected
    assert (manifest.block_size, manifest.resource_kind, manifest.has_token_ids) == (8, "kv_prefix", False)
    assert all(torch.equal(cut.layer(n)[1], made.layer(n)[1][:tokens]) for n in range(3))
    other = dataclasses.replace(MODEL, rope={"rope_theta": 5e5, "rope_type": "default"})
    with pytest.raises(LayoutMismatch, match="rope"):
        from_repository(repo, "cartridge/x", tokens=tokens, model=other)


def test_a_cut_of_what_is_damaged_is_refused(repo: Repository) -> None:
    to_repository(make_cartridge(), repo, name="x")
    (manifest,) = (repo.manifest(cid) for cid in repo.snapshot("cartridge/x").manifests)
    (seq,) = manifest.sequences
    state = {STATE: dict(seq.state[STATE]) | {"checksum": "0" * 64}}
    repo.commit([dataclasses.replace(manifest, sequences=(dataclasses.replace(seq, state=state),))], branch="bad")
    with pytest.raises(DamagedCartridge):
        from_repository(repo, "bad", tokens=16)


def test_ranks_of_different_sequences_are_not_put_together(repo: Repository) -> None:
    """They would be the prefill of neither."""
    layers = make_layers(40, FULL)
    one, other, shorter = (
        [repo.manifest(cid) for cid in repo.snapshot(snapshot_of(repo, layers, tp=2, **changes)).manifests]
        for changes in ({}, {"ids": range(900, 940)}, {"cached": 32})
    )
    for ranks in ([one[0], other[1]], [one[0], shorter[1]]):
        for tokens in (None, 16):
            with pytest.raises(LayoutMismatch, match="different sequences"):
                from_repository(repo, repo.commit(ranks).cid, tokens=tokens)


@pytest.mark.parametrize("ids", [[VIRTUAL] * 5 + [3] * 15, None])
def test_ids_that_are_not_known(repo: Repository, ids: list[int] | None) -> None:
    layers = make_layers(20, FULL)
    cid = snapshot_of(repo, layers, ids=ids or ())
    if ids is None:
        (manifest,) = (repo.manifest(m) for m in repo.snapshot(cid).manifests)
        seq = dataclasses.replace(manifest.sequences[0], token_ids=())
        cid = repo.commit([dataclasses.replace(manifest, sequences=(seq,))]).cid
    made = from_repository(repo, cid)
    assert made.token_ids is None and torch.equal(made.layer(1)[1], layers[1][1])


@pytest.mark.parametrize(
    ("changes", "said", "error"),
    [
        ({"attention": "mla"}, "mla", UnsupportedModel),
        ({"attention": "sliding:32"}, "sliding:32", UnsupportedModel),
        ({"n_groups": 2}, "2 groups", UnsupportedModel),
        ({"memory_order": "vllm-cpu-amx"}, "vllm-cpu-amx", UnsupportedModel),
        ({"dtype": "fp8e4m3", "head_dim": 32}, "fp8e4m3", UnsupportedModel),
        ({"tp": 2, "missing": [1]}, r"\[1\]", NotFound),
        ({"model": None}, "model", InvalidInput),
    ],
    ids=str,
)
def test_what_no_cartridge_holds_is_refused_by_name(
    repo: Repository, changes: dict[str, Any], said: str, error: type[KvistError]
) -> None:
    cid = snapshot_of(repo, make_layers(20, FULL), **changes)
    with pytest.raises(error, match=said):
        from_repository(repo, cid)


def test_which_sequence(repo: Repository) -> None:
    cid = snapshot_of(repo, make_layers(20, FULL))
    (manifest,) = (repo.manifest(m) for m in repo.snapshot(cid).manifests)
    two = (*manifest.sequences, dataclasses.replace(manifest.sequences[0], id="other"))
    both = repo.commit([dataclasses.replace(manifest, sequences=two)]).cid
    none = repo.commit([dataclasses.replace(manifest, sequences=())]).cid
    with pytest.raises(InvalidInput, match="other"):
        from_repository(repo, both)
    assert from_repository(repo, both, sequence="other").manifest.cartridge_id == "other"
    for rev in (both, none):
        with pytest.raises(NotFound, match="third"):
            from_repository(repo, rev, sequence="third")
    with pytest.raises(InvalidInput, match="0 sequences"):
        from_repository(repo, none)


@pytest.mark.parametrize("tokens", [0, -1, 21])
def test_more_or_fewer_tokens_than_there_are(repo: Repository, tokens: int) -> None:
    with pytest.raises(InvalidInput, match="20 cached"):
        from_repository(repo, snapshot_of(repo, make_layers(20, FULL)), tokens=tokens)


@pytest.mark.parametrize(
    "changes", [{"revision": "r2"}, {"head_dim": 16}, {"dtype": "bfloat16"}, {"num_layers": 4}, {"model_id": "org/big"}]
)
def test_another_model_is_refused(repo: Repository, changes: dict[str, Any], tmp_path: Any) -> None:
    cid = snapshot_of(repo, make_layers(20, FULL))
    with pytest.raises(LayoutMismatch):
        from_repository(repo, cid, model=dataclasses.replace(FULL, **changes), directory=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_unknown_snapshot(repo: Repository) -> None:
    with pytest.raises(NotFound):
        from_repository(repo, "none")
