"""Finds out what a checkpoint is, and reads it.

Knows which family has which keys, and what a checkpoint's file is called in a directory. The rest is in the families'
modules and the containers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kvist.cartridge.formats.imported import Imported
from kvist.cartridge.formats.past_key_values import is_pairs, read_dynamic_cache, read_past_key_values
from kvist.cartridge.formats.peft import CONFIG, read_prompt_embeddings
from kvist.cartridge.formats.safetensors_file import open_safetensors_file
from kvist.cartridge.formats.torch_file import open_torch_file
from kvist.cartridge.formats.trainable import read_reasoncache, read_trainable
from kvist.errors import InvalidCartridge, NotFound

_ADAPTERS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_FILES: Final = ("cartridge.pt", "cache_last.pt")
"""What directories of Tokasaurus and knlp, and of HazyResearch's training, hold."""

_WRAPPERS_MAX: Final = 2


def read_checkpoint(path: str | Path, *, dtype: str | None = None) -> Imported:
    """Read a checkpoint of another project. Nothing in it is run, whatever it holds.

    Args:
        path: a file of `torch.save` or of safetensors; or a directory of PEFT, knlp, Tokasaurus or HazyResearch.
        dtype: to convert to, of `kvist.cartridge.model.DTYPES`; ``None``: as it is.

    Raises:
        NotFound: no such file.
        UnsafeCheckpoint: it could only be read by running it.
        InvalidCartridge: it is of no known family, or not as that family writes it, or holds numbers that are none.
        DamagedCartridge: bytes that do not have the checksum in the file.
        InvalidInput: a ``dtype`` that is none.
    """
    file = checkpoint_file(path)
    with _open(file) as tree:
        return _read(tree, file, dtype)


def checkpoint_file(path: str | Path) -> Path:
    """The file of a checkpoint that may be named by its directory.

    Raises:
        NotFound: there is none.
        InvalidCartridge: it is neither a file nor a directory.
    """
    path = Path(path)
    if path.is_dir():
        names = _ADAPTERS if (path / CONFIG).is_file() else _FILES
        for name in names:
            if (path / name).is_file():
                return path / name
        raise NotFound(f"{path} holds no checkpoint: expected one of {', '.join(names)}")
    if not path.exists():
        raise NotFound(f"no such checkpoint: {path}")
    if not path.is_file():
        raise InvalidCartridge(f"{path} is neither a file nor a directory")
    return path


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    opener = open_safetensors_file if path.suffix == ".safetensors" else open_torch_file
    with opener(path) as tree:
        yield tree


def _read(tree: Any, path: Path, dtype: str | None) -> Imported:
    for _ in range(_WRAPPERS_MAX):
        if isinstance(tree, dict) and isinstance(tree.get("cache"), dict | list | tuple):
            tree = tree["cache"]
    try:
        if is_pairs(tree):
            return read_past_key_values(tree, path, dtype=dtype)
        if not isinstance(tree, dict):
            raise InvalidCartridge(f"unrecognised checkpoint: expected a dict or a list, got a {type(tree).__name__}")
        if isinstance(tree.get("reasoncache"), dict):
            return read_reasoncache(tree["reasoncache"], dtype=dtype)
        if "trainable_keys" in tree or "trainable_values" in tree:
            return read_trainable(tree, dtype=dtype)
        if "prompt_embeddings" in tree:
            return read_prompt_embeddings(tree, path, dtype=dtype)
        if "key_cache" in tree or "layers" in tree:
            return read_dynamic_cache(tree, dtype=dtype)
    except InvalidCartridge as error:
        raise type(error)(f"{path}: {str(error).removeprefix(f'{path}: ')}", hint=error.hint) from None
    found = ", ".join(sorted(str(name) for name in tree))[:200]
    raise InvalidCartridge(
        f"{path}: unrecognised checkpoint with the keys {found or '(none)'}; expected trainable_keys, reasoncache, "
        "prompt_embeddings, key_cache, layers, or a list of (keys, values)"
    )
