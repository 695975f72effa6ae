"""Cartridges of random numbers, and hypothesis strategies for them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.manifest import CartridgeManifest, LayerShape
from kvist.cartridge.model import DTYPES, ModelIdentity

MODEL = ModelIdentity(
    model_id="org/tiny",
    revision="r1",
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
    dtype="bfloat16",
    rope={"rope_theta": 10000.0, "rope_type": "default"},
    tokenizer_hash="sha256:" + "7" * 64,
)


def make_layers(tokens: int, model: ModelIdentity = MODEL, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[tokens, heads, head_dim]`` of each layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (model.num_layers, 2, tokens, model.num_kv_heads, model.head_dim)
    data = torch.randn(shape, generator=generator).to(getattr(torch, model.dtype))
    return [(layer[0], layer[1]) for layer in data]


def make_cartridge(tokens: int = 37, *, ids: bool = True, seed: int = 0, **said: Any) -> Cartridge:
    said = {"cartridge_id": "patient/01"} | said
    model = said.pop("model", MODEL)
    token_ids = list(range(100, 100 + tokens)) if ids else None
    return Cartridge.create(make_layers(tokens, model, seed), model, token_ids=token_ids, **said)


def make_manifest(**changes: Any) -> CartridgeManifest:
    """A manifest that names no files."""
    fields: dict[str, Any] = {
        "cartridge_id": "patient_01",
        "model_id": "meta-llama/Llama-3.2-3B",
        "num_layers": 2,
        "num_kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "num_tokens_raw": 632,
        "num_tokens_aligned": 624,
        "block_size": 16,
        "num_blocks": 39,
        "has_frozen_prefix": True,
        "num_frozen_tokens": 1,
        "checksum": "ab" * 32,
        "layers": (LayerShape(num_kv_heads=8, head_dim=128),) * 2,
    }
    return CartridgeManifest(**(fields | changes))


def same(left: Cartridge, right: Cartridge) -> bool:
    """Bit for bit, whatever the files."""
    pairs = [(left.layer(n), right.layer(n)) for n in range(left.num_layers)]
    return left.token_ids == right.token_ids and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for one, other in pairs
        for a, b in zip(one, other, strict=True)
    )


models = st.builds(
    ModelIdentity,
    model_id=st.sampled_from(["org/tiny", "tiny", "some model"]),
    revision=st.none() | st.sampled_from(["r1", "blake3:" + "0" * 64]),
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 5),
    head_dim=st.sampled_from([1, 3, 8, 20]),
    dtype=st.sampled_from(DTYPES),
    rope=st.sampled_from([{}, {"rope_theta": 1e4, "rope_type": "default"}]),
    tokenizer_hash=st.none() | st.just("sha256:" + "1" * 64),
)
