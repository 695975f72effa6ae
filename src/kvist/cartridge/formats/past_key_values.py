"""Caches of transformers that were saved as tensors, and knlp's, which are such a list with two files beside it.

Knows the shapes in which a ``DynamicCache`` is written without its class: a list of ``(keys, values)`` a layer (its
legacy form; today's iteration adds a third item, the sliding window or ``None``), ``{"key_cache": [...], "value_cache":
[...]}`` (its attributes before transformers 4.56, and its form in exported programs), and ``{"layers": [{"keys",
"values"}, ...]}`` or that list alone. Must not know containers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvist.cartridge.formats.imported import Imported, read_layers, tensors_of
from kvist.cartridge.formats.sidecar import read_json
from kvist.cartridge.formats.stored import StoredTensor
from kvist.errors import InvalidCartridge

_LOSSLESS: Final = ("first_k", "sci_chunk")
"""knlp's ways to begin whose keys and values are the prefill of exactly the token ids beside them. A script that knows
no other says none. What was ``sci`` before there were canonical names is ``strided_rope`` now, and no prefill."""


def is_pairs(tree: object) -> bool:
    """Whether it is a list with one item a layer."""
    return isinstance(tree, list | tuple) and bool(tree) and isinstance(tree[0], list | tuple | dict)


def read_dynamic_cache(tree: Mapping[str, Any], *, dtype: str | None) -> Imported:
    """The two lists of a cache, or its layers.

    Raises:
        InvalidCartridge: as `read_layers`.
    """
    if "layers" in tree:
        return _read_pairs(tree["layers"], "dynamic_cache", dtype)
    keys, values = (tensors_of(tree.get(name), name) for name in ("key_cache", "value_cache"))
    return Imported(
        layers=read_layers([[key] for key in keys], [[value] for value in values], dtype=dtype),
        source_format="dynamic_cache",
        resource_kind="kv_prefix",
    )


def read_past_key_values(tree: Any, path: Path, *, dtype: str | None) -> Imported:
    """A list of pairs, with knlp's ``meta.json`` and ``prefix_token_ids.json`` where these are beside the file.

    Raises:
        InvalidCartridge: as `read_layers`; an item that is no pair, or with a sliding window; or files beside it that
            contradict it.
    """
    imported = _read_pairs(tree, "past_key_values", dtype)
    if not path.with_name("meta.json").is_file():
        return imported
    meta = read_json(path.with_name("meta.json"), dict)
    expected = {"n_layers": len(imported.layers), "budget_tokens": imported.num_tokens}
    for name, count in expected.items():
        if name in meta and meta[name] != count:
            raise InvalidCartridge(f"{path}: meta.json says {name} {meta[name]!r:.80}, the checkpoint has {count}")
    model = meta.get("model")
    return Imported(
        layers=imported.layers,
        source_format=imported.source_format,
        resource_kind=imported.resource_kind,
        token_ids=_token_ids(path, meta, imported.num_tokens),
        model_id=model if isinstance(model, str) and model else None,
        meta={name: value for name, value in meta.items() if isinstance(value, str | int | float | bool)},
    )


def _read_pairs(tree: Any, source_format: str, dtype: str | None) -> Imported:
    if not isinstance(tree, list | tuple):
        raise InvalidCartridge(f"layers must be a list, got {type(tree).__name__}")
    pairs = [_pair(item, number) for number, item in enumerate(tree)]
    return Imported(
        layers=read_layers([[key] for key, _ in pairs], [[value] for _, value in pairs], dtype=dtype),
        source_format=source_format,
        resource_kind="kv_prefix",
    )


def _pair(item: Any, number: int) -> tuple[StoredTensor, StoredTensor]:
    match item:
        case {"sliding_window": int() | StoredTensor()} | (StoredTensor(), StoredTensor(), StoredTensor()):
            raise InvalidCartridge(f"layer {number} has a sliding window, so that it may lack its first tokens")
        case {"keys": StoredTensor() as keys, "values": StoredTensor() as values}:
            return keys, values
        case (StoredTensor() as keys, StoredTensor() as values, *third) if third in ([], [None]):
            return keys, values
    raise InvalidCartridge(f"layer {number}: expected a tensor of keys and one of values, got a {type(item).__name__}")


def _token_ids(path: Path, meta: Mapping[str, Any], tokens: int) -> tuple[int, ...] | None:
    """The ids beside a checkpoint, if its keys and values are what a prefill of them gives."""
    beside = path.with_name("prefix_token_ids.json")
    if not beside.is_file():
        return None
    ids = read_json(beside, list)
    if len(ids) != tokens or not all(type(token) is int and 0 <= token < 2**32 for token in ids):
        raise InvalidCartridge(f"{beside}: expected a token id for each of {tokens} tokens, got {len(ids)} items")
    stated = meta.get("prefix_token_ids_sha256")
    if stated is not None and stated != (found := hashlib.sha256(json.dumps(ids).encode()).hexdigest()):
        raise InvalidCartridge(f"{beside}: expected the SHA-256 {stated!r:.80}, as meta.json says, got {found}")
    method = meta.get("init_method_canonical", meta.get("init_method", "first_k"))
    return tuple(ids) if method in _LOSSLESS else None
