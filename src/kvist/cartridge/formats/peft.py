"""Adapters of PEFT: a ``CARTRIDGE``, or a ``PREFIX_TUNING`` without projection.

One tensor ``prompt_embeddings``, ``[tokens, layers * 2 * heads * head_dim]``, which PEFT's ``get_prompt`` views as
``[tokens, layers * 2, heads, head_dim]``: keys of a layer at ``2 * layer``, values after them. ``adapter_config.json``
says how many of each; its ``num_attention_heads`` and ``token_dim`` are those of keys and values. Knows this layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvist.cartridge.formats.imported import Imported, require_finite, target_dtype
from kvist.cartridge.formats.sidecar import read_json
from kvist.cartridge.formats.stored import StoredTensor
from kvist.errors import InvalidCartridge

CONFIG: Final = "adapter_config.json"
_TYPES: Final = ("CARTRIDGE", "PREFIX_TUNING")


def read_prompt_embeddings(tree: Mapping[str, Any], path: Path, *, dtype: str | None) -> Imported:
    """The tensor, by the configuration beside the file.

    Raises:
        InvalidCartridge: there is no configuration, it is of another kind of adapter, or the tensor is not as it says.
    """
    config = read_json(path.with_name(CONFIG), dict)
    where = str(path.with_name(CONFIG))
    if config.get("peft_type") not in _TYPES or config.get("prefix_projection"):
        raise InvalidCartridge(
            f"{where}: expected a peft_type of {' or '.join(_TYPES)}, without prefix_projection, "
            f"got {config.get('peft_type')!r:.80}"
        )
    tokens, layers, heads, width = (
        _count(config, name, where) for name in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    )
    if config.get("num_transformer_submodules") not in (None, 1) or width % heads:
        raise InvalidCartridge(f"{where}: expected one transformer submodule, and heads that divide token_dim")
    frozen = config.get("num_frozen_tokens", 0)
    if type(frozen) is not int or not 0 <= frozen <= tokens:
        raise InvalidCartridge(f"{where}: num_frozen_tokens must be in [0, {tokens}], got {frozen!r:.80}")
    stored = tree["prompt_embeddings"]
    expected = (tokens, layers * 2 * width)
    if not isinstance(stored, StoredTensor) or stored.shape != expected:
        got = list(stored.shape) if isinstance(stored, StoredTensor) else type(stored).__name__
        raise InvalidCartridge(f"{path}: prompt_embeddings must have the shape {list(expected)}, got {got}")
    whole = stored.read().to(target_dtype([stored], dtype)).view(tokens, layers, 2, heads, width // heads)
    pairs = [(whole[:, layer, 0], whole[:, layer, 1]) for layer in range(layers)]
    require_finite(pairs)
    base = config.get("base_model_name_or_path")
    return Imported(
        layers=pairs,
        num_frozen_tokens=frozen,
        source_format="peft",
        resource_kind="cartridge" if config["peft_type"] == "CARTRIDGE" else "kv_prefix",
        model_id=base if isinstance(base, str) and base else None,
        meta={"peft_type": config["peft_type"]},
    )


def _count(config: Mapping[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 2**31:
        raise InvalidCartridge(f"{where}: {name} must be an integer in [1, 2^31), got {value!r:.80}")
    return value
