"""Where a configured cartridge comes from, and its directory: as it is, or made once in a cache.

Knows directories, checkpoints of other projects, repositories and the hub. Must not know engines, registries or ids of
requests.

What is made is named by the digest of all that decides it, so that it is never stale; and made below a lock, so that
the processes of one server make it once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kvist.cartridge.formats.importing import file_sha256, import_checkpoint
from kvist.cartridge.formats.reading import checkpoint_file
from kvist.cartridge.formats.sidecar import find_sidecar
from kvist.cartridge.hub import resolve
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.manifest_file import MANIFEST, read_manifest
from kvist.cartridge.model import ModelIdentity
from kvist.errors import InvalidCartridge, InvalidInput, InvalidName, NotFound, StoreError
from kvist.ids import check_name
from kvist.repo.manifest import canonical_json

log = logging.getLogger("kvist.cartridge")

_KEYS: Final = {
    "path": {"manifest_path", "cartridge_id"},
    "store": {"rev", "sequence", "cartridge_id"},
    "hub": {"revision", "subfolder"},
}
"""What a source says, by the key that tells its kind, and what it may say besides."""

_BESIDE: Final = ("adapter_config.json", "meta.json", "prefix_token_ids.json")
"""Files beside a checkpoint that have a say in what it comes to."""

_PLAIN: Final = ("cartridge", "cache_last", "adapter_model")
"""Names of files that say nothing: the directory's says more."""


def materialize(source: str | Path | Mapping[str, Any], *, cache_dir: str | Path, model: ModelIdentity | None) -> Path:
    """The directory of a cartridge.

    A directory that holds one is returned as it is, and not looked into. A checkpoint of another project is converted
    into ``cache_dir``, a repository's snapshot written there; a second call finds what the first one made.

    Args:
        source: a path; or ``{"path": ..., "manifest_path"?, "cartridge_id"?}``, ``{"store": url, "rev": rev,
            "sequence"?, "cartridge_id"?}`` or ``{"hub": "org/name", "revision"?, "subfolder"?}``.
        cache_dir: made if it is not there. Nothing in it is ever cleared: it can be removed while no server starts.
        model: that will use it. A checkpoint that does not say whose it is is taken for this one's, with a warning, if
            its shapes and data type are; nothing is converted to another data type.

    Raises:
        InvalidInput: a source that says something else, or neither it nor ``model`` says which model it is for.
        NotFound: it is not there.
        InvalidCartridge, UnsafeCheckpoint, DamagedCartridge, LayoutMismatch: it cannot become one.
        StoreError: the cache, the repository or the hub cannot be used.
    """
    told = _told(source)
    cache = Path(cache_dir)
    if "hub" in told:
        return resolve(told["hub"], revision=told.get("revision"), subfolder=told.get("subfolder"))
    if "store" in told:
        return _of_repository(told, cache, model)
    path = Path(told["path"])
    if (path / MANIFEST).is_file() and "manifest_path" not in told:
        return path
    return _of_checkpoint(path, told, cache, model)


def _told(source: str | Path | Mapping[str, Any]) -> dict[str, str]:
    if isinstance(source, str | Path):
        return {"path": str(source)}
    kinds = [kind for kind in _KEYS if kind in source]
    if len(kinds) != 1 or set(source) - _KEYS[kinds[0]] - set(kinds):
        raise InvalidInput(f"expected a source with one of {', '.join(_KEYS)}, got the keys {sorted(map(str, source))}")
    for key, value in source.items():
        if not (isinstance(value, str) and value and "\0" not in value):
            raise InvalidInput(f"a source's {key} must be text, got {value!r:.80}")
    if kinds == ["store"] and "rev" not in source:
        raise InvalidInput("a source in a store must say rev, the snapshot")
    return dict(source)


# -- checkpoints of other projects -------------------------------------------------------------------------------


def _of_checkpoint(path: Path, told: Mapping[str, str], cache: Path, model: ModelIdentity | None) -> Path:
    file = checkpoint_file(path)
    sidecar = Path(told["manifest_path"]) if "manifest_path" in told else find_sidecar(file)
    beside = [file.with_name(name) for name in _BESIDE]
    recipe = {
        "checkpoint": _digest(file),
        "manifest": _digest(sidecar) if sidecar is not None else None,
        "beside": {one.name: _digest(one) for one in beside if one.is_file()},
        "name": told.get("cartridge_id") or _id_of(file),
        "model": dataclasses.asdict(model) if model is not None else None,
    }

    def make(directory: Path) -> None:
        name = told.get("cartridge_id")
        imported = import_checkpoint(file, model, cartridge_id=name, default_id=_id_of(file), manifest_path=sidecar)
        imported.save_pretrained(directory)
        log.info("converted %s into %s", file, directory)

    directory = _made(cache, recipe, make)
    origin = read_manifest(directory).provenance.get("from")
    if model is not None and isinstance(origin, Mapping) and origin.get("model") is None:
        log.warning(
            "%s does not say which model it is for; its shapes are those of %s, and it is taken for one of it",
            file,
            model.model_id,
        )
    return directory


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except OSError as error:
        raise InvalidCartridge(f"cannot read {path}: {error.strerror}") from None


def _id_of(file: Path) -> str:
    """A cartridge's id from a file's name."""
    stem = file.resolve().parent.name if file.stem in _PLAIN else file.stem
    name = re.sub(r"[^A-Za-z0-9._+@-]+", "-", stem).lstrip("._+@-")
    try:
        return check_name(name)
    except InvalidName:
        return "cartridge"


# -- repositories ------------------------------------------------------------------------------------------------


def _of_repository(told: Mapping[str, str], cache: Path, model: ModelIdentity | None) -> Path:
    from kvist.cartridge.snapshots import from_repository
    from kvist.repo import Repository

    with Repository.open(told["store"]) as repo:
        cid = repo.resolve(told["rev"])  # once: a branch may move meanwhile
        recipe = {
            "snapshot": cid,
            "sequence": told.get("sequence"),
            "name": told.get("cartridge_id"),
            "model": dataclasses.asdict(model) if model is not None else None,
        }

        def make(directory: Path) -> None:
            from_repository(
                repo,
                cid,
                sequence=told.get("sequence"),
                model=model,
                directory=directory,
                cartridge_id=told.get("cartridge_id"),
            )

        return _made(cache, recipe, make)


# -- the cache ---------------------------------------------------------------------------------------------------


def _made(cache: Path, recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The directory that ``recipe`` names, made by ``make`` unless it is there and whole."""
    digest = hashlib.sha256(b"kvist cartridge source v1\0" + canonical_json(recipe)).hexdigest()
    directory = cache / digest[:32]
    if _is_whole(directory):
        return directory
    with _locked(cache, cache / f"{digest[:32]}.lock"):
        if _is_whole(directory):
            return directory
        if directory.exists():
            log.warning("%s is not what was written there; it is made anew", directory)
            shutil.rmtree(directory)
        make(directory)
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether all files are there, of the right size; their bytes are compared when the cartridge is loaded."""
    try:
        manifest: CartridgeManifest = read_manifest(directory)
        return all((directory / entry.name).stat().st_size == entry.size for entry in manifest.files)
    except (NotFound, InvalidCartridge, OSError):
        return False


@contextlib.contextmanager
def _locked(cache: Path, path: Path) -> Iterator[None]:
    """One process and thread at a time; a lock of a process that was killed is free."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError as error:
        raise StoreError(f"cannot use the cache {cache}: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
