"""Which model a cartridge is for. Knows ``config.json``; must not know torch, transformers or engines."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from kvist.errors import InvalidInput, UnsupportedModel
from kvist.hashing.weights import hub_snapshot, revision

LAYOUT_DTYPES: Final = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""Data types of a cartridge's keys and values, by torch's names, and what `kvist.layout.Layout` calls them."""

DTYPES: Final = tuple(LAYOUT_DTYPES)
"""Torch's names alone."""

MAX_NESTING: Final = 64
"""Objects and arrays of a JSON document that may lie in one another: they are walked, and Python's stack is short."""

_DIGEST: Final = re.compile(r"blake3:[0-9a-f]{64}")
_KV_KINDS: Final = ("full_attention", "sliding_attention", "chunked_attention", "attention")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What must agree between the model that made keys and values and the one that reads them.

    Attributes:
        model_id: ``"meta-llama/Llama-3.2-3B"``, or a directory's name.
        revision: the commit of the weights, or a digest of them (`kvist.hashing.weights.revision`); ``None``: unknown.
        num_layers: that have keys and values.
        num_kv_heads: of the whole model, not of a rank.
        head_dim: elements of one head.
        dtype: of the KV cache, one of `DTYPES`.
        rope: how positions are encoded into keys, canonical (`canonical_rope`); empty where it is unknown or not done.
        tokenizer_hash: ``sha256:`` of ``tokenizer.json``, else of ``tokenizer.model``; ``None`` where there is neither.
    """

    model_id: str
    revision: str | None = None
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    rope: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_hash: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.model_id, str) and self.model_id and self.model_id.isprintable()):
            raise InvalidInput(f"a model's id must be printable text, got {self.model_id!r:.80}")
        for name in ("revision", "tokenizer_hash"):
            text = getattr(self, name)
            if not (text is None or (isinstance(text, str) and text and text.isprintable())):
                raise InvalidInput(f"a model's {name} must be printable text or None, got {text!r:.80}")
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            count = getattr(self, name)
            if type(count) is not int or not 0 < count < 2**31:
                raise InvalidInput(f"a model's {name} must be an integer in [1, 2^31), got {count!r:.80}")
        if self.dtype not in DTYPES:
            raise InvalidInput(f"a model's dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r:.80}")
        if not isinstance(self.rope, Mapping):
            raise InvalidInput(f"a model's rope must be a mapping, got {self.rope!r:.80}")

    @classmethod
    def of_directory(
        cls, path: str | Path, *, dtype: str | None = None, model_id: str | None = None, revision: str | None = None
    ) -> Self:
        """The identity of the model in a directory. Reads its configuration and tokenizer; no weights.

        Args:
            path: with ``config.json``.
            dtype: of the KV cache; default that of the weights, as the configuration names it.
            model_id: default the repository's id for a directory of the Hugging Face cache, else the directory's name.
            revision: default the commit for a directory of the Hugging Face cache, else unknown. To pin the weights of
                any directory, give `kvist.hashing.weights.revision` of it, which reads them all.

        Raises:
            InvalidInput: no such directory, no readable ``config.json``, or one that says no shapes.
            UnsupportedModel: a model that does not keep the same keys and values in every layer.
        """
        directory = Path(path).resolve()
        outer = _read_config(directory)
        config = outer["text_config"] if isinstance(outer.get("text_config"), Mapping) else outer
        _check_supported(config)
        heads = _first(config, "num_attention_heads", "n_head", "n_heads")
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        layers = _first(config, "num_hidden_layers", "n_layer", "n_layers")
        kv_heads = _first(config, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
        if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
            kv_heads = 1
        head_dim = _first(config, "head_dim") or (hidden // heads if hidden and heads else None)
        if not (layers and kv_heads and head_dim):
            raise InvalidInput(
                f"{directory / 'config.json'} says no number of layers, KV heads and head size: "
                f"got {layers!r}, {kv_heads!r}, {head_dim!r}"
            )
        named = dtype or config.get("dtype") or config.get("torch_dtype")
        named = named or outer.get("dtype") or outer.get("torch_dtype") or "float32"
        hub_id, commit = hub_snapshot(directory) or (None, None)
        return cls(
            model_id=model_id or hub_id or directory.name,
            revision=revision or commit,
            num_layers=layers,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=str(named).removeprefix("torch."),
            rope=canonical_rope(config),
            tokenizer_hash=_tokenizer_hash(directory),
        )


def revision_like(directory: str | Path, known: str | None) -> str | None:
    """The revision of a model's directory in the form in which another one is known, to compare the two.

    Args:
        directory: of the model. Where ``known`` is a digest of weights, all its weights are read.
        known: a commit, a digest of weights, or ``None``.

    Returns:
        A digest or a commit; ``None`` where the directory cannot say it in that form.
    """
    path = Path(directory).resolve()
    if (hub := hub_snapshot(path)) is not None:
        return hub[1]
    return revision(path) if known is not None and _DIGEST.fullmatch(known) else None


def canonical_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding that a configuration describes, the same for every way in which it can be written.

    Transformers 5 writes ``rope_parameters``, one or one a layer type; before, ``rope_theta``, ``rope_scaling`` and,
    for local layers, ``rope_local_base_freq``. All numbers become floats, and what is not given is left out.

    Returns:
        ``{"rope_theta": ..., "rope_type": ..., ...}``, or one such mapping a layer type; empty where nothing is said.

    Raises:
        InvalidInput: a description that is not made of mappings, text and numbers.
    """
    given = config.get("rope_parameters")
    if given and not isinstance(given, Mapping):
        raise InvalidInput(f"rope_parameters must be a mapping, got {given!r:.80}")
    if given and all(isinstance(part, Mapping) for part in given.values()):
        return {kind: _one_rope(part, config) for kind, part in sorted(given.items())}
    if given:
        return _one_rope({"rope_theta": config.get("rope_theta"), **given}, config)
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise InvalidInput(f"rope_scaling must be a mapping, got {scaling!r:.80}")
    theta, local = config.get("rope_theta"), config.get("rope_local_base_freq")
    if not scaling and theta is None:
        return {}
    whole = _one_rope({"rope_theta": theta, **scaling}, config)
    if local is None:
        return whole
    return {"full_attention": whole, "sliding_attention": _one_rope({"rope_theta": local}, config)}


def _one_rope(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"partial_rotary_factor": config.get("partial_rotary_factor"), **given}
    kind = fields.pop("type", None)
    fields["rope_type"] = fields.get("rope_type") or kind or "default"
    if fields["partial_rotary_factor"] == 1:
        del fields["partial_rotary_factor"]
    return {name: _value(name, value) for name, value in sorted(fields.items()) if value is not None}


def _value(name: str, value: object) -> Any:
    items = [_scalar(item) for item in value] if isinstance(value, list | tuple) else [_scalar(value)]
    if not name.isprintable() or None in items:
        raise InvalidInput(f"rope's {name!r:.80} must be text, a number or a list of them, got {value!r:.80}")
    return items if isinstance(value, list | tuple) else items[0]


def _scalar(value: object) -> bool | float | str | None:
    """Text, or a number as a float, or ``None`` for what is neither."""
    if isinstance(value, bool) or (isinstance(value, str) and value.isprintable()):
        return value
    if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
        return float(value)
    return None


def nesting(value: object) -> int:
    """How many objects and arrays of a JSON value lie in one another at most; 0 for a scalar."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, Mapping | list | tuple)]:
        depth += 1
        level = [item for part in level for item in (part.values() if isinstance(part, Mapping) else part)]
    return depth


def _read_config(directory: Path) -> Mapping[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{directory} is no model's directory: cannot read its config.json: {error}") from None
    if not isinstance(config, Mapping):
        raise InvalidInput(f"{path} must hold one object, got {type(config).__name__}")
    if (depth := nesting(config)) > MAX_NESTING:
        raise InvalidInput(f"{path}: expected at most {MAX_NESTING} objects and arrays in one another, got {depth}")
    return config


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if config.get("kv_lora_rank"):
        raise UnsupportedModel(f"{kind}: keeps latent vectors (MLA), not keys and values; no cartridge holds them")
    if config.get("num_kv_shared_layers"):
        raise UnsupportedModel(f"{kind}: its last layers share the keys and values of others; no cartridge holds that")
    kinds = config.get("layer_types")
    strange = sorted({str(kind) for kind in kinds} - set(_KV_KINDS)) if isinstance(kinds, list) else []
    if strange:
        raise UnsupportedModel(f"{kind}: has layers that keep no keys and values: {', '.join(strange)}")


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these that is set."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or value < 1:
                raise InvalidInput(f"config.json: {name} must be a positive integer, got {value!r:.80}")
            return value
    return None


def _tokenizer_hash(directory: Path) -> str | None:
    for name in _TOKENIZERS:
        path = directory / name
        if path.is_file():
            return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    return None
