"""How many bytes a token's keys and values take, by the shape of the model. Reads Hugging Face's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvist.errors import InvalidInput, NotFound, UnsupportedModel
from kvist.layout import DTYPE_BYTES
from kvist.sim.config import require_one_of, require_positive

_DTYPES: Final = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float8_e4m3fn": "fp8e4m3"}
"""Names of torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """The KV cache of one token.

    Attributes:
        layers: that have a cache; all of them see every token.
        kv_heads: of one layer. With latent attention 1.
        head_size: elements of one head's key, and of its value; with latent attention half of the latent vector and
            its rotary part together.
        dtype: one of `kvist.layout.DTYPE_BYTES`.
        is_latent: whether one vector serves all heads (MLA): every GPU of a tensor-parallel group holds it whole.
    """

    layers: int
    kv_heads: int
    head_size: float
    dtype: str = "bf16"
    is_latent: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "layers", "kv_heads", "head_size")
        require_one_of(self, "dtype", tuple(DTYPE_BYTES))

    def bytes_per_token(self, gpus: int = 1) -> int:
        """On all the GPUs of one tensor-parallel group together; heads that do not divide among them are held twice."""
        if gpus < 1:
            raise InvalidInput(f"gpus must be 1 or more; got {gpus}")
        heads = self.kv_heads if self.is_latent else -(-self.kv_heads // gpus)
        return int(gpus * self.layers * 2 * heads * self.head_size * DTYPE_BYTES[self.dtype])


def read_shape(path: Path, *, dtype: str | None = None) -> KvShape:
    """The shape that a model's ``config.json`` tells.

    Args:
        path: of the file, or of the directory that holds it.
        dtype: of the cache; if ``None``, the model's.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is no JSON object, or lacks a field; the message names it.
        UnsupportedModel: not all its layers see every token, so a token has no fixed size.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise NotFound(f"there is no model config {file}") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{file} must be a JSON object")
    whole = config
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    _require_full_attention(config, file)
    named = config.get("dtype", config.get("torch_dtype", whole.get("dtype", whole.get("torch_dtype"))))
    if dtype is None and named not in _DTYPES:
        raise InvalidInput(f"{file}: dtype must be one of {', '.join(_DTYPES)}; got {named!r}")
    layers = _whole(config, "num_hidden_layers", file)
    kept = dtype or _DTYPES[named]
    if config.get("kv_lora_rank") is not None:
        width = _whole(config, "kv_lora_rank", file) + _whole(config, "qk_rope_head_dim", file)
        return KvShape(layers=layers, kv_heads=1, head_size=width / 2, dtype=kept, is_latent=True)
    heads = _whole(config, "num_attention_heads", file)
    kv_heads = heads if config.get("num_key_value_heads") is None else _whole(config, "num_key_value_heads", file)
    size = config.get("head_dim")
    head_size = _whole(config, "hidden_size", file) // heads if size is None else _whole(config, "head_dim", file)
    return KvShape(layers=layers, kv_heads=kv_heads, head_size=head_size, dtype=kept)


def _require_full_attention(config: Mapping[str, Any], file: Path) -> None:
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if not config.get("layer_types") and config.get("sliding_window") and config.get("use_sliding_window", True):
        kinds = {"sliding_attention"}
    if kinds:
        raise UnsupportedModel(
            f"{file} has layers of {', '.join(sorted(kinds))}: a token has a fixed size only where every layer sees "
            "all tokens",
            hint="say it by --kv-bytes-per-token",
        )


def _whole(config: Mapping[str, Any], name: str, file: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise InvalidInput(f"{file}: {name} must be an integer, 1 or more; got {value!r}")
    return value
