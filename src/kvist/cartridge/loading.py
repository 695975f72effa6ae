"""Opening a model's directory with transformers, for `kvist.cartridge.causal`; and what is refused.

Nothing is ever unpickled and no code from the directory is run: safetensors only, ``trust_remote_code=False``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvist.errors import InvalidInput, NotFound, UnsupportedModel

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(directory: Path, device: str, dtype: str | None) -> tuple[Any, Any]:
    """The model, frozen and in evaluation mode, and its tokenizer, ``None`` where there is none.

    Raises:
        NotFound, InvalidInput, UnsupportedModel: see `CausalModel.open`.
    """
    if not (directory / "config.json").is_file():
        raise NotFound(f"expected a model directory with a config.json, found none in {str(directory)!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise InvalidInput(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r:.80}")
    target = parse_device(device)
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype is None else _DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
        tokenizer = _load_tokenizer(directory)
    except Exception as error:  # files that came from anywhere fail in any way: half a file, another type, no such key
        raise UnsupportedModel(f"transformers cannot load {str(directory)!r}: {error}") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        # transformers would fill them with random numbers, and only warn
        if loaded.get(what):
            named = ", ".join(sorted(map(str, loaded[what]))[:3])
            raise UnsupportedModel(f"{str(directory)!r}: {what.replace('_', ' ')}: {named}")
    _refuse_dynamic(config)
    return model.to(target).eval().requires_grad_(False), tokenizer


def _load_tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _refuse_dynamic(config: Any) -> None:
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    if any("dynamic" in str(part.get("rope_type")) for part in parts):
        raise UnsupportedModel(
            f"{config.model_type}: its rotary embedding rescales by the longest sequence seen, so keys laid down for "
            "one prompt would not be those of another"
        )


def parse_device(name: str) -> torch.device:
    """The device that a name stands for.

    Raises:
        InvalidInput: torch finds none of that name.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise InvalidInput(f"device must be cpu, or cuda where torch finds one, got {name!r:.80}")
    return device


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer, wherever the directory says so."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return frozenset(found)
