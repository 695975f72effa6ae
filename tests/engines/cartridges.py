"""Cartridges for tests: taken from an engine's pages, made by plain transformers, or of random numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from kvist.cartridge.cartridge import Cartridge
from kvist.engines.hf import Engine

from .driving import params, prompt, run

Layers = list[tuple[Tensor, Tensor]]


def rows_of(engine: Engine, sequence_id: str) -> Layers:
    """Keys and values of a sequence, canonical: ``[tokens, heads, head_dim]`` each."""
    with engine.exclusive() as scheduler:
        seq = scheduler.find(sequence_id)
        assert seq is not None
        data = engine.pool.data[seq.table].clone()
    pages, _, layers, size, heads, width = data.shape
    flat = data.permute(1, 2, 0, 3, 4, 5).reshape(2, layers, pages * size, heads, width)[:, :, : seq.computed]
    return [(flat[0, layer].contiguous(), flat[1, layer].contiguous()) for layer in range(layers)]


def captured(engine: Engine, ids: list[int], name: str = "doc", *, with_ids: bool = True) -> Cartridge:
    """The prefill of ``ids`` by this engine, of which nothing stays behind in it."""
    run(engine, ids, 0, sequence_id="to-capture")
    layers = rows_of(engine, "to-capture")
    engine.drop("to-capture")
    engine.clear_prefix_cache()
    return Cartridge.create(
        layers, engine.model.identity, cartridge_id=name, token_ids=ids if with_ids else None, training_steps=0
    )


def noise(engine: Engine, tokens: int, seed: int, name: str = "noise") -> Cartridge:
    """Keys and values that no text has, as training makes them; without token ids."""
    layout, generator = engine.layout, torch.Generator().manual_seed(seed)
    dtype = engine.pool.data.dtype
    shape = (tokens, layout.n_heads, layout.head_dim)
    layers = [
        (torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype))
        for _ in range(layout.n_layers)
    ]
    return Cartridge.create(layers, engine.model.identity, cartridge_id=name, training_steps=7)


def prefilled(engine: Engine, model_dir: Path, ids: list[int], name: str = "doc") -> Cartridge:
    """The prefill of ``ids`` by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=engine.pool.data.dtype).eval()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    layers = [
        (layer.keys[0].transpose(0, 1).clone(), layer.values[0].transpose(0, 1).clone()) for layer in cache.layers
    ]
    return Cartridge.create(layers, engine.model.identity, cartridge_id=name, token_ids=ids)


def document(length: int, seed: int) -> list[int]:
    return prompt(length, seed=1000 + seed)


def changed_model(cartridge: Cartridge, **changes: object) -> Cartridge:
    """The same numbers, said to be of another model."""
    manifest = dataclasses.replace(cartridge.manifest, **changes)
    return Cartridge(manifest, cartridge._tensors, None)


__all__ = ["captured", "changed_model", "document", "noise", "params", "prefilled", "rows_of"]
