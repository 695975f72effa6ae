"""Trained cartridges: HazyResearch's ``TrainableCache``, and reason caches, which are written much alike.

``TrainableCache.save`` writes ``{"trainable_keys", "trainable_values", "frozen_keys", "frozen_values"}``, each an
``nn.ParameterList`` with one ``[1, heads, tokens, head_dim]`` a layer; in June 2025, and for Tokasaurus, the frozen
ones are called ``fixed_*``. They come first: they are the attention sink. Other writers save lists, ``None`` or nothing
in place of an empty one, or wrap the dict as ``{"cache": ...}``.

Knows these layouts. Must not know containers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvist.cartridge.formats.imported import Imported, read_layers, tensors_of
from kvist.cartridge.formats.stored import StoredTensor
from kvist.errors import InvalidCartridge


def read_trainable(tree: Mapping[str, Any], *, dtype: str | None) -> Imported:
    """The dict of a ``TrainableCache``.

    Raises:
        InvalidCartridge: keys or values are missing, or a list has another number of layers than the others; and as
            `read_layers`.
    """
    for name in ("trainable_keys", "trainable_values"):
        if tree.get(name) is None:
            raise InvalidCartridge(f"cannot find {name} in the checkpoint, which has {_names(tree)}")
    keys, values = (tensors_of(tree[name], name) for name in ("trainable_keys", "trainable_values"))
    frozen_keys, frozen_values = _frozen(tree, "keys"), _frozen(tree, "values")
    counts = {len(part) for part in (frozen_keys, frozen_values)}
    if counts == {0}:
        return Imported(
            layers=read_layers([[key] for key in keys], [[value] for value in values], dtype=dtype),
            source_format="trainable_cache",
            resource_kind="cartridge",
        )
    if counts | {len(keys), len(values)} != {len(keys)}:
        raise InvalidCartridge(
            f"expected a tensor a layer in each list: {len(keys)} trainable keys, {len(values)} trainable values, "
            f"{len(frozen_keys)} frozen keys, {len(frozen_values)} frozen values"
        )
    layers = read_layers(
        list(zip(frozen_keys, keys, strict=True)), list(zip(frozen_values, values, strict=True)), dtype=dtype
    )
    frozen = {tensor.shape[2] for tensor in (*frozen_keys, *frozen_values)}
    if len(frozen) != 1:
        raise InvalidCartridge(f"expected as many frozen tokens in every layer, got {sorted(frozen)}")
    return Imported(
        layers=layers,
        num_frozen_tokens=frozen.pop(),
        source_format="trainable_cache",
        resource_kind="cartridge",
    )


def read_reasoncache(tree: Mapping[str, Any], *, dtype: str | None) -> Imported:
    """``{"prefix_keys": [...], "prefix_values": [...]}``, the content of ``{"reasoncache": ...}``.

    Raises:
        InvalidCartridge: either is missing; and as `read_layers`.
    """
    for name in ("prefix_keys", "prefix_values"):
        if tree.get(name) is None:
            raise InvalidCartridge(f"cannot find {name} in the reasoncache, which has {_names(tree)}")
    keys, values = (tensors_of(tree[name], name) for name in ("prefix_keys", "prefix_values"))
    return Imported(
        layers=read_layers([[key] for key in keys], [[value] for value in values], dtype=dtype),
        source_format="reasoncache",
        resource_kind="reasoncache",
    )


def _frozen(tree: Mapping[str, Any], half: str) -> list[StoredTensor]:
    names = [name for name in (f"frozen_{half}", f"fixed_{half}") if tensors_of(tree.get(name), name)]
    if len(names) > 1:
        raise InvalidCartridge(f"expected one of {' and '.join(names)}, got both")
    return tensors_of(tree[names[0]], names[0]) if names else []


def _names(tree: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(name) for name in tree))[:200] or "nothing"
