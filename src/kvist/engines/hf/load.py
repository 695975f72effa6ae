"""Opening a model directory: the weights, what its cache looks like, what pins it, and what we refuse.

Knows transformers' loading and configurations. Must not know pools or sequences. Nothing is ever unpickled and no
code from the directory is run: safetensors only, ``trust_remote_code=False``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from kvist.cartridge.loading import parse_device
from kvist.errors import InvalidInput, KvistError, NotFound, UnsupportedModel

_DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What a model's cache looks like, as a forward pass showed it.

    Attributes:
        layers: layers with a cache; all of them alike.
        heads: KV heads.
        head_dim: elements of one head, the same for keys and values.
        dtype: as `kvist.layout` names it.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: str


def parse_dtype(name: str | None) -> torch.dtype | str:
    """``"f32"``, ``"float32"``, ``"torch.float32"`` and so on; ``None`` is ``"auto"``: what the weights are stored as.

    Raises:
        InvalidInput: another name.
    """
    if name is None or name == "auto":
        return "auto"
    for short, dtype in _DTYPES.items():
        if name in (short, str(dtype), str(dtype).removeprefix("torch.")):
            return dtype
    raise InvalidInput(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r:.80}")


def open_model(directory: Path, device: str, dtype: str | None) -> Any:
    """Load a causal LM in evaluation mode.

    Mixture-of-experts layers run as one batched product of fixed shape (``batched_mm``): the kernel that groups
    tokens by expert makes a row's bits depend on the other rows.

    Raises:
        NotFound: there is no ``config.json``.
        InvalidInput: there is no such device or dtype.
        UnsupportedModel: transformers has no causal LM for it without running its own code, its safetensors are not
            there, damaged or not all that the model needs, or its positions or cache cannot be paged.
    """
    if not (directory / "config.json").is_file():
        raise NotFound(f"expected a model directory with a config.json, found none in {str(directory)!r}")
    target = parse_device(device)
    logging.disable_progress_bar()
    wanted = parse_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{config.model_type}: encoder-decoder models have a second, fixed cache")
        model, loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=wanted,
            experts_implementation="batched_mm",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # Told apart below, where they can be named.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except KvistError:
        raise
    except Exception as error:  # files that came from anywhere fail in any way: half a file, another type, no such key
        raise UnsupportedModel(f"transformers cannot load {str(directory)!r}: {error}") from error
    _refuse_incomplete(directory, loaded)
    _refuse_signature(model)
    # A tile's dead rows are id 0, which some models take for unmasked padding and warn about.
    model.config.pad_token_id = None
    return model.to(target).eval().requires_grad_(False)


def _refuse_incomplete(directory: Path, loaded: Mapping[str, Any]) -> None:
    """Transformers fills what the files lack with random numbers, and only warns. Tied weights do not count as lacking.

    Args:
        directory: for the message.
        loaded: what ``output_loading_info`` told.
    """
    for what, problem in (
        ("missing_keys", "lacks weights"),
        ("mismatched_keys", "has weights of another shape than its config says"),
        ("error_msgs", "has weights that cannot be read"),
    ):
        found = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loaded.get(what) or ())
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UnsupportedModel(f"{str(directory)!r} {problem}: {', '.join(found[:3])}{more}")


def _refuse_signature(model: Any) -> None:
    kind = model.config.model_type
    names = inspect.signature(model.forward).parameters
    if "past_key_values" not in names:
        raise UnsupportedModel(f"{kind}: forward() takes no past_key_values, so its state is not a KV cache")
    if "position_ids" not in names:
        raise UnsupportedModel(f"{kind}: forward() takes no position_ids, so a tile cannot be placed")
    for rope in _rope_parameters(model.config):
        if "dynamic" in str(rope.get("rope_type")):
            raise UnsupportedModel(
                f"{kind}: rope_type {rope['rope_type']!r} rescales by the longest sequence seen, so one sequence "
                "would change the keys of another"
            )


def max_positions(config: Any) -> int | None:
    """Positions the model can take, or ``None`` where nothing bounds them.

    Under ``longrope`` only its first, short range: past it the model wants all keys rotated anew.
    """
    text = config.get_text_config(decoder=True)
    ropes = [rope for rope in _rope_parameters(config) if rope.get("rope_type") == "longrope"]
    bounds = [
        getattr(text, "max_position_embeddings", None),
        *(rope.get("original_max_position_embeddings") for rope in ropes),
    ]
    return min((int(bound) for bound in bounds if bound), default=None)


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rope settings: one mapping, or one for each kind of layer."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    if isinstance(parameters, Mapping):
        yield parameters
        yield from (value for value in parameters.values() if isinstance(value, Mapping))


def probe(model: Any) -> Geometry:
    """Run two tokens and look at the cache that comes out.

    Raises:
        UnsupportedModel: naming the layer that is not plain attention, or differs from the others.
    """
    kind = model.config.model_type
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModel(f"{kind}: layer {index} caches a {type(layer).__name__}, not keys and values")
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        try:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UnsupportedModel(f"{kind}: a forward pass of two tokens failed: {error}") from error
    shapes = []
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
            raise UnsupportedModel(f"{kind}: layer {index} has no keys and values of its own")
        if layer.keys.shape != layer.values.shape:
            keys, values = tuple(layer.keys.shape), tuple(layer.values.shape)
            raise UnsupportedModel(f"{kind}: layer {index} has keys of shape {keys} and values of {values}")
        shapes.append((int(layer.keys.shape[1]), int(layer.keys.shape[3]), layer.keys.dtype))
    if not shapes:
        raise UnsupportedModel(f"{kind}: no layer has a KV cache")
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise UnsupportedModel(
                f"{kind}: layer {index} has (heads, head size, dtype) {shape}, and layer 0 has {shapes[0]}"
            )
    heads, head_dim, dtype = shapes[0]
    if dtype not in _NAMES:
        raise UnsupportedModel(f"{kind}: keys and values are {dtype}, expected one of {', '.join(_DTYPES)}")
    return Geometry(layers=len(shapes), heads=heads, head_dim=head_dim, dtype=_NAMES[dtype])
