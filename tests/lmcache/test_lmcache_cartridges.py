"""Cartridges under the engine of a real LMCache: a tagged request finds its document's chunks in the cartridge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity

pytestmark = pytest.mark.lmcache
Start = Callable[..., Any]

DOCUMENT = list(range(500, 521))  # two full chunks of 8, and 5
QUESTION = list(range(900, 914))
CONFIGS = {"lmcache.tag.cartridge": "doc"}


def make(directory: Path, seed: int, *, ids: bool = True) -> Cartridge:
    """A cartridge with numbers of its own, so that it can be told from what anybody would compute."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (
            torch.randn(len(DOCUMENT), 2, 4, generator=generator).to(torch.bfloat16),
            torch.randn(len(DOCUMENT), 2, 4, generator=generator).to(torch.bfloat16),
        )
        for _ in range(3)
    ]
    model = ModelIdentity(model_id="org/model", num_layers=3, num_kv_heads=2, head_dim=4, dtype="bfloat16")
    made = Cartridge.create(layers, model, cartridge_id="doc", token_ids=DOCUMENT if ids else None)
    made.save_pretrained(directory)
    return made


def options(directory: Path) -> Mapping[str, Any]:
    return {"cartridges": {"cartridges": [{"cartridge_id": "doc", "path": str(directory)}]}}


def expected(cartridge: Cartridge, end: int) -> torch.Tensor:
    layers = [torch.stack([half[:end].flatten(1) for half in cartridge.layer(layer)]) for layer in range(3)]
    return torch.stack(layers, 1)


@pytest.mark.parametrize("is_layerwise", [False, True])
def test_a_tagged_request_takes_its_document_from_the_cartridge(
    engine: Start, tmp_path: Path, is_layerwise: bool
) -> None:
    cartridge = make(tmp_path / "doc", 1)
    found = engine(options=options(tmp_path / "doc"), use_layerwise=is_layerwise)
    prompt = DOCUMENT + QUESTION
    assert found.engine.lookup(prompt, request_configs=CONFIGS) == 16
    tokens, got = found.load(prompt, request_configs=CONFIGS)
    assert tokens == 16
    assert torch.equal(got[:, :, :16], expected(cartridge, 16))


def test_the_whole_of_it_where_chunks_need_not_be_full(engine: Start, tmp_path: Path) -> None:
    cartridge = make(tmp_path / "doc", 1)
    found = engine(options=options(tmp_path / "doc"), save_unfull_chunk=True)
    tokens, got = found.load(DOCUMENT, request_configs=CONFIGS)
    assert tokens == 21
    assert torch.equal(got, expected(cartridge, 21))


def test_a_and_b_and_none_share_nothing(engine: Start, tmp_path: Path) -> None:
    a = make(tmp_path / "a", 1)
    b = make(tmp_path / "b", 2)
    source = [{"cartridge_id": name, "path": str(tmp_path / name)} for name in "ab"]
    found = engine(options={"cartridges": {"cartridges": source}})
    prompt = DOCUMENT + QUESTION
    computed = found.compute(prompt)
    for name, cartridge in (("a", a), ("b", b)):
        tokens, got = found.load(prompt, request_configs={"lmcache.tag.cartridge": name})
        assert tokens == 16
        assert torch.equal(got[:, :, :16], expected(cartridge, 16))
    tokens, got = found.load(prompt)
    assert tokens == 32
    assert torch.equal(got[:, :, :32], computed[:, :, :32])
    assert found.load(prompt, request_configs={"lmcache.tag.cartridge": "c"})[0] == 0


def test_what_comes_behind_it_is_stored_under_its_content(engine: Start, tmp_path: Path) -> None:
    cartridge = make(tmp_path / "doc", 1)
    prompt = DOCUMENT + QUESTION
    first = engine(options=options(tmp_path / "doc"))
    computed = first.compute(prompt, request_configs=CONFIGS)
    assert first.backend.chunks.metrics.stored == 2  # not the two that are the cartridge's own
    tokens, got = first.load(prompt, request_configs=CONFIGS)
    assert tokens == 32
    assert torch.equal(got[:, :, :16], expected(cartridge, 16))
    assert torch.equal(got[:, :, 16:32], computed[:, :, 16:32])
    first.stop()
    make(tmp_path / "other", 2)
    other = engine(options=options(tmp_path / "other"))
    assert other.engine.lookup(prompt, request_configs=CONFIGS) == 16
    other.stop()
    again = engine(options=options(tmp_path / "doc"))
    assert again.engine.lookup(prompt, request_configs=CONFIGS) == 32


def test_a_cartridge_without_its_document_is_not_cut_into_chunks(engine: Start, tmp_path: Path) -> None:
    make(tmp_path / "doc", 1, ids=False)
    found = engine(options=options(tmp_path / "doc"))
    for prompt in (DOCUMENT, [0] * 21):
        assert found.engine.lookup(prompt, request_configs=CONFIGS) == 0


def test_damage_is_a_miss(engine: Start, tmp_path: Path) -> None:
    make(tmp_path / "doc", 1)
    found = engine(options=options(tmp_path / "doc"))
    (shard,) = (tmp_path / "doc").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)
    assert found.load(DOCUMENT, request_configs=CONFIGS)[0] == 0
    assert found.engine.storage_manager.allocator_backend.memory_allocator.memcheck()


def test_a_cartridge_of_a_registry_comes_and_goes(engine: Start, tmp_path: Path) -> None:
    from kvist.cartridge.registry import Registry

    cartridge = make(tmp_path / "doc", 1)
    registry = Registry(str(tmp_path / "registry.db"))
    found = engine(options={"cartridges": {"registry": str(tmp_path / "registry.db")}})
    assert found.engine.lookup(DOCUMENT, request_configs=CONFIGS) == 0
    registry.register(cartridge.manifest, str(tmp_path / "doc"))
    assert found.engine.lookup(DOCUMENT, request_configs=CONFIGS) == 16
    registry.unregister("doc")
    found.backend.chunks.flush()
    assert found.engine.lookup(DOCUMENT, request_configs=CONFIGS) == 0
    registry.close()
