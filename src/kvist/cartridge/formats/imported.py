"""What a checkpoint of another project comes to, and the checks that all families share.

Knows tensors' shapes. Must not know files, families or models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from kvist.cartridge.formats.stored import READABLE, StoredTensor
from kvist.cartridge.model import DTYPES
from kvist.cartridge.shards import not_finite
from kvist.errors import InvalidCartridge, InvalidInput

Pair = tuple[Tensor, Tensor]
Parts = Sequence[Sequence[StoredTensor]]
"""One sequence a layer; its tensors, each ``[1, heads, tokens, head_dim]``, follow one another along the tokens."""

_AXES: Final = "[1, heads, tokens, head_dim]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A checkpoint in canonical form.

    Attributes:
        layers: keys, rotated to positions 0, 1, 2 and so on, and values, each ``[tokens, heads, head_dim]``: all of one
            shape and data type, on the CPU, finite; not always contiguous. The caller's own.
        num_frozen_tokens: how many of the first tokens training did not change.
        source_format: ``trainable_cache``, ``reasoncache``, ``past_key_values``, ``dynamic_cache`` or ``peft``.
        resource_kind: ``cartridge``, ``reasoncache`` or ``kv_prefix``, as a manifest has it.
        token_ids: of the text, where this is the lossless prefill of it; else ``None``.
        model_id: which model the checkpoint says it is for, if it says so.
        meta: what else is known of it; JSON.
    """

    layers: list[Pair]
    num_frozen_tokens: int = 0
    source_format: str
    resource_kind: str
    token_ids: tuple[int, ...] | None = None
    model_id: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of each layer."""
        return self.layers[0][0].shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of each layer."""
        return self.layers[0][0].shape[1]

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.layers[0][0].shape[2]

    @property
    def dtype(self) -> str:
        """Of all tensors, by torch's name."""
        return str(self.layers[0][0].dtype).removeprefix("torch.")


def tensors_of(value: object, name: str) -> list[StoredTensor]:
    """The tensors of a list; an absent list is empty.

    Raises:
        InvalidCartridge: something else.
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InvalidCartridge(f"{name} must be a list with a tensor a layer, got {type(value).__name__}")
    for number, item in enumerate(value):
        if not isinstance(item, StoredTensor):
            raise InvalidCartridge(f"{name}[{number}] must be a tensor, got {type(item).__name__}")
    return list(value)


def read_layers(keys: Parts, values: Parts, *, dtype: str | None) -> list[Pair]:
    """Check all shapes, then read: what does not fit is refused before its bytes are touched.

    Args:
        keys: of each layer, in parts.
        values: likewise.
        dtype: to convert to; ``None``: all must have one that a cartridge can have.

    Returns:
        As `Imported.layers`.

    Raises:
        InvalidCartridge: no layers, other axes, layers or halves that differ, no tokens, or numbers that are none.
        DamagedCartridge: bytes whose checksum is wrong.
    """
    if not keys or len(keys) != len(values):
        raise InvalidCartridge(f"expected as many keys as values, and at least one; got {len(keys)} and {len(values)}")
    shapes = [(_shape(key, f"layer {n} K"), _shape(value, f"layer {n} V")) for n, (key, value) in _layers(keys, values)]
    first = shapes[0][0]
    for number, pair in enumerate(shapes):
        for half, shape in zip("KV", pair, strict=True):
            if shape != first:
                raise InvalidCartridge(
                    f"layer {number} {half} shape {list(shape)} differs from that of layer 0 K, {list(first)}: "
                    "expected one [heads, tokens, head_dim] for all"
                )
    if 0 in first:
        raise InvalidCartridge(f"expected at least one head, token and element, got shape {list(first)}")
    wanted = target_dtype(itertools.chain.from_iterable((*keys, *values)), dtype)
    layers = [(_join(key, wanted), _join(value, wanted)) for _, (key, value) in _layers(keys, values)]
    require_finite(layers)
    return layers


def target_dtype(tensors: Iterable[StoredTensor], dtype: str | None) -> torch.dtype:
    """The data type that all of a cartridge's tensors will have.

    Raises:
        InvalidCartridge: one that is no cartridge's, or several, and none is asked for.
        InvalidInput: the one asked for is no cartridge's.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r:.80}")
    there = sorted({tensor.dtype for tensor in tensors})
    allowed = tuple(READABLE) if dtype else DTYPES
    if any(name not in allowed for name in there) or (dtype is None and len(there) != 1):
        raise InvalidCartridge(
            f"expected tensors of one of {', '.join(allowed)}, got {', '.join(there)}",
            hint="convert it: `kvist cartridge import ... --dtype bfloat16`" if set(there) <= set(READABLE) else None,
        )
    return READABLE[dtype or there[0]]


def require_finite(layers: Sequence[Pair]) -> None:
    """Refuse numbers that are none.

    Raises:
        InvalidCartridge: naming the layer.
    """
    named = {f"layer {n} {half}": pair[i] for n, pair in enumerate(layers) for i, half in enumerate("KV")}
    if (name := not_finite(named)) is not None:
        raise InvalidCartridge(f"{name} holds a NaN or an infinity")


def _layers(keys: Parts, values: Parts) -> Iterable[tuple[int, tuple[Sequence[StoredTensor], Sequence[StoredTensor]]]]:
    return enumerate(zip(keys, values, strict=True))


def _shape(parts: Sequence[StoredTensor], what: str) -> tuple[int, int, int]:
    """Heads, tokens of all parts, head size."""
    for part in parts:
        if len(part.shape) != 4 or part.shape[0] != 1:
            raise InvalidCartridge(f"{what}: expected {_AXES}, got shape {list(part.shape)}")
        if (part.shape[1], part.shape[3]) != (parts[0].shape[1], parts[0].shape[3]):
            raise InvalidCartridge(
                f"{what}: frozen and trained tokens differ in heads or head size: "
                f"{list(parts[0].shape)} and {list(part.shape)}"
            )
    return parts[0].shape[1], sum(part.shape[2] for part in parts), parts[0].shape[3]


def _join(parts: Sequence[StoredTensor], dtype: torch.dtype) -> Tensor:
    """``[tokens, heads, head_dim]``."""
    tensors = [part.read().to(dtype)[0].transpose(0, 1) for part in parts if part.shape[2]]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
