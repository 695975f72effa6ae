"""A snapshot of the embedded engine as a cartridge: its keys and values are those in the engine's pool, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.snapshots import from_repository, model_of, to_repository
from kvist.engines.hf import Engine, HfPager
from kvist.errors import LayoutMismatch
from kvist.hashing.weights import revision
from kvist.pager import capture
from kvist.repo import Repository
from kvist.store import MemoryStore

from .driving import prompt, run

Load = Callable[..., Engine]


@pytest.fixture
def repo() -> Iterator[Repository]:
    with Repository.init(MemoryStore()) as made:
        yield made


def in_pool(engine: Engine, name: str, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a sequence's first tokens, ``[tokens, heads, head_dim]``, from the pool itself."""
    (seq,) = HfPager(engine, [name]).logical_seqs()
    halves = [engine.pool.data[list(seq.page_ixs), half, layer].flatten(0, 1)[:tokens] for half in (0, 1)]
    return halves[0], halves[1]


@pytest.mark.parametrize(("family", "dtype"), [("llama", None), ("gemma3", "bf16"), ("gpt2", "f16"), ("qwen3", "bf16")])
@pytest.mark.parametrize("length", [1, 16, 41])
def test_bit_for_bit(load: Load, repo: Repository, tmp_path: Path, family: str, dtype: str | None, length: int) -> None:
    engine = load(family, dtype=dtype)
    run(engine, prompt(20, seed=5), 2, sequence_id="other")
    run(engine, prompt(length), 1, sequence_id="doc")
    cid = capture(HfPager(engine), repo).snapshot.cid
    made = from_repository(repo, cid, sequence="doc", tokens=length, directory=tmp_path / "c")
    with Cartridge.from_pretrained(tmp_path / "c") as opened:
        assert opened.token_ids == tuple(prompt(length)) and opened.num_layers == engine.layout.n_layers
        for layer in range(opened.num_layers):
            for mine, theirs in zip(opened.layer(layer), in_pool(engine, "doc", layer, length), strict=True):
                assert torch.equal(mine.view(torch.uint8), theirs.contiguous().view(torch.uint8))
    assert made.manifest.provenance["from"]["numerics"] == engine.numerics()
    assert made.manifest.model_revision == engine.layout.revision


def test_the_prefill_is_the_same_whatever_came_before(load: Load, repo: Repository) -> None:
    """Captured from a session that went on, or alone: the same cartridge, by identity."""
    engine, other = load(), load()
    run(engine, prompt(40), 9, sequence_id="doc")
    run(other, [*prompt(40), 5, 6], 1, sequence_id="doc")
    identities = set()
    for one in (engine, other):
        cid = capture(HfPager(one, ["doc"]), repo).snapshot.cid
        identities.add(from_repository(repo, cid, tokens=40).identity)
        assert from_repository(repo, cid).num_tokens > 40
    assert len(identities) == 1


def test_a_cartridges_snapshot_shares_the_engines_pages(load: Load, repo: Repository) -> None:
    engine = load()
    run(engine, prompt(48), 1, sequence_id="doc")
    cid = capture(HfPager(engine, ["doc"]), repo).snapshot.cid
    made = from_repository(repo, cid)
    before = len(repo.pages.segments())
    back = to_repository(made, repo, name="doc", page_size_tokens=16)
    assert len(repo.pages.segments()) == before
    assert from_repository(repo, back.cid).identity == made.identity


def test_whose_it_is(load: Load, repo: Repository, model_dir: Callable[..., Path]) -> None:
    engine = load("llama")
    run(engine, prompt(20), 1, sequence_id="doc")
    cid = capture(HfPager(engine, ["doc"]), repo).snapshot.cid
    model = model_of(repo, cid, model_dir("llama"))
    assert model.revision == revision(model_dir("llama")) == engine.layout.revision
    manifest = from_repository(repo, cid, model=model).manifest
    assert manifest.rope == model.rope != {}
    served = ModelIdentity.of_directory(
        model_dir("llama"), dtype=manifest.dtype, model_id="tiny", revision=model.revision
    )
    assert manifest.validate_against_model(served) == []
    with pytest.raises(LayoutMismatch, match="model_revision"):
        from_repository(repo, cid, model=model_of(repo, cid, model_dir("llama", seed=1)))
