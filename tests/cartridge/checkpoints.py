"""Checkpoints as other projects write them, each from the same keys and values.

Sources: HazyResearch/cartridges `cache.py` (June 2025, and later), Tokasaurus `generate_fake_cartridges.py`,
mcgrof/vllm `test_cartridge_manifest.py`, mcgrof/knlp `pia_build_cartridge.py` and `train_cartridge.py`, PEFT
`tuners/cartridge`, transformers `cache_utils.py` and `integrations/executorch.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kvist.cartridge.formats import Imported
from kvist.cartridge.model import ModelIdentity

from .making import MODEL, make_layers

TOKENS = 32
FROZEN = 2
Layers = list[tuple[Tensor, Tensor]]


def batched(tensor: Tensor) -> Tensor:
    """``[tokens, heads, head_dim]`` as transformers has it: ``[1, heads, tokens, head_dim]``."""
    return tensor.transpose(0, 1)[None].contiguous()


def halves(layers: Layers, first: int = 0, end: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    keys, values = zip(*((batched(key[first:end]), batched(value[first:end])) for key, value in layers), strict=True)
    return list(keys), list(values)


def parameters(tensors: list[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])


def trainable(
    layers: Layers, frozen: int = FROZEN, sink: str = "frozen", kind: Callable[..., Any] = list
) -> dict[str, Any]:
    """What ``TrainableCache.save`` writes."""
    keys, values = halves(layers, frozen)
    first_keys, first_values = halves(layers, 0, frozen) if frozen else ([], [])
    names = ("trainable_keys", "trainable_values", f"{sink}_keys", f"{sink}_values")
    return dict(zip(names, map(kind, (keys, values, first_keys, first_values)), strict=True))


def hazy(directory: Path, layers: Layers) -> Path:
    torch.save(trainable(layers, kind=parameters), directory / "cache-step100.pt")
    return directory / "cache-step100.pt"


def fixed(directory: Path, layers: Layers) -> Path:
    torch.save(trainable(layers, sink="fixed", kind=parameters), directory / "cartridge.pt")
    return directory / "cartridge.pt"


def wrapped(directory: Path, layers: Layers) -> Path:
    torch.save({"cache": trainable(layers), "step": 7}, directory / "wrapped.pt")
    return directory / "wrapped.pt"


def parameter_dict(directory: Path, layers: Layers) -> Path:
    """As a module whose ``cache`` is an ``nn.ParameterDict`` would be, were it saved by its parts."""
    tree = trainable(layers, kind=parameters)
    torch.save(
        {"cache": {**tree, "scales": nn.ParameterDict({"one": nn.Parameter(torch.ones(1))})}}, directory / "d.pt"
    )
    return directory / "d.pt"


def no_sink(directory: Path, layers: Layers) -> Path:
    tree = trainable(layers, frozen=0)
    torch.save(tree | {"frozen_keys": None, "frozen_values": None}, directory / "01.pt")
    return directory / "01.pt"


def reasoncache(directory: Path, layers: Layers) -> Path:
    keys, values = halves(layers)
    torch.save({"reasoncache": {"prefix_keys": keys, "prefix_values": values}}, directory / "reason.pt")
    return directory / "reason.pt"


def knlp(directory: Path, layers: Layers, **meta: Any) -> Path:
    pairs = [(batched(key), batched(value)) for key, value in layers]
    torch.save(pairs, directory / "cartridge.pt")
    ids = list(range(100, 100 + len(layers[0][0])))
    known = {
        "model": "org/tiny",
        "dtype": str(pairs[0][0].dtype).removeprefix("torch."),
        "n_layers": len(pairs),
        "budget_tokens": len(ids),
        "block_size": 16,
        "prefix_token_ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
    }
    (directory / "meta.json").write_text(json.dumps(known | meta, indent=2))
    (directory / "prefix_token_ids.json").write_text(json.dumps(ids))
    return directory


def legacy_cache(directory: Path, layers: Layers) -> Path:
    torch.save(tuple((batched(key), batched(value)) for key, value in layers), directory / "past.pt")
    return directory / "past.pt"


def iterated_cache(directory: Path, layers: Layers) -> Path:
    """``list(DynamicCache)`` of transformers 5."""
    torch.save([(batched(key), batched(value), None) for key, value in layers], directory / "iterated.pt")
    return directory / "iterated.pt"


def cache_dict(directory: Path, layers: Layers) -> Path:
    keys, values = halves(layers)
    torch.save({"key_cache": keys, "value_cache": values}, directory / "exported.pt")
    return directory / "exported.pt"


def cache_layers(directory: Path, layers: Layers) -> Path:
    items = [{"keys": batched(key), "values": batched(value), "is_initialized": True} for key, value in layers]
    torch.save({"layers": items}, directory / "layers.pt")
    return directory / "layers.pt"


def cache_safetensors(directory: Path, layers: Layers) -> Path:
    keys, values = halves(layers)
    names = {f"key_cache.{n}": key for n, key in enumerate(keys)}
    save_file(names | {f"value_cache.{n}": value for n, value in enumerate(values)}, directory / "cache.safetensors")
    return directory / "cache.safetensors"


def trainable_safetensors(directory: Path, layers: Layers) -> Path:
    named = {f"{name}.{n}": one for name, tensors in trainable(layers).items() for n, one in enumerate(tensors)}
    save_file(named, directory / "trained.safetensors")
    return directory / "trained.safetensors"


def prompt_embeddings(layers: Layers) -> Tensor:
    """As PEFT's ``prompt_embeddings_from_past_key_values`` packs it."""
    tokens, heads, head_dim = layers[0][0].shape
    packed = torch.empty(tokens, 2 * len(layers), heads, head_dim, dtype=layers[0][0].dtype)
    for number, (key, value) in enumerate(layers):
        packed[:, 2 * number] = batched(key)[0].transpose(0, 1)
        packed[:, 2 * number + 1] = batched(value)[0].transpose(0, 1)
    return packed.reshape(tokens, -1)


def peft_config(layers: Layers, **changes: Any) -> dict[str, Any]:
    tokens, heads, head_dim = layers[0][0].shape
    known = {
        "peft_type": "CARTRIDGE",
        "base_model_name_or_path": "org/tiny",
        "num_virtual_tokens": tokens,
        "num_frozen_tokens": FROZEN,
        "num_layers": len(layers),
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    return known | changes


def peft(directory: Path, layers: Layers, **changes: Any) -> Path:
    save_file({"prompt_embeddings": prompt_embeddings(layers)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(peft_config(layers, **changes)))
    return directory


def peft_bin(directory: Path, layers: Layers) -> Path:
    torch.save({"prompt_embeddings": prompt_embeddings(layers)}, directory / "adapter_model.bin")
    (directory / "adapter_config.json").write_text(json.dumps(peft_config(layers)))
    return directory


Writer = Callable[[Path, Layers], Path]

WRITERS: dict[str, Writer] = {
    writer.__name__: writer
    for writer in (
        hazy,
        fixed,
        wrapped,
        parameter_dict,
        no_sink,
        reasoncache,
        knlp,
        legacy_cache,
        iterated_cache,
        cache_dict,
        cache_layers,
        cache_safetensors,
        trainable_safetensors,
        peft,
        peft_bin,
    )
}
"""Every form that is read, by name."""

SINKS = ("hazy", "fixed", "wrapped", "parameter_dict", "trainable_safetensors", "peft", "peft_bin")
"""Those that say that the first tokens are frozen."""


def sample(tokens: int = TOKENS, model: ModelIdentity = MODEL, seed: int = 0) -> Layers:
    return make_layers(tokens, model, seed)


def is_same(imported: Imported, layers: Layers) -> bool:
    """Bit for bit."""
    return len(imported.layers) == len(layers) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for one, other in zip(imported.layers, layers, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def sidecar(path: Path, layers: Layers, **changes: Any) -> dict[str, Any]:
    """The manifest that mcgrof/vllm's ``CartridgeManifest.from_cartridge`` writes of a file."""
    tokens, heads, head_dim = layers[0][0].shape
    data = path.read_bytes()
    known: dict[str, Any] = {
        "cartridge_id": "patient_04",
        "model_id": "org/tiny",
        "num_layers": len(layers),
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "dtype": str(layers[0][0].dtype).removeprefix("torch."),
        "num_tokens_raw": tokens,
        "num_tokens_aligned": tokens // 16 * 16,
        "block_size": 16,
        "num_blocks": tokens // 16,
        "has_frozen_prefix": True,
        "num_frozen_tokens": FROZEN,
        "resource_kind": "cartridge",
        "source_format": "trainable_cache",
        "kv_layout": "",
        "checksum": hashlib.sha256(data).hexdigest(),
        "file_size_bytes": len(data),
        "created_at": "",
        "training_steps": 2694,
        "source_document": "patient_04 medical record",
        "labels": {"doc_type": "medical_record"},
    }
    return known | changes
