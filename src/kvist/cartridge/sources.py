"""Where a configured cartridge comes from, and its directory: as it is, or made once in a cache.

Knows directories, checkpoints of other projects, repositories and the hub. Must not know engines, registries or ids of
requests. Imports torch only where tensors are read.

What is made is named by the digest of all that decides it, so that it is never stale; and made below a lock, so that
the processes of one server make it once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kvist.cartridge.hub import resolve
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.manifest_file import MANIFEST, read_manifest
from kvist.cartridge.model import ModelIdentity
from kvist.errors import InvalidCartridge, InvalidInput, InvalidName, NotFound
from kvist.ids import check_name
from kvist.repo.manifest import canonical_json
from kvist.store.posix import exclusive, translated

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
    told = {"path": str(source)} if isinstance(source, str | Path) else check_source(source)
    cache = Path(cache_dir)
    if "hub" in told:
        return resolve(told["hub"], revision=told.get("revision"), subfolder=told.get("subfolder"))
    if "store" in told:
        return _of_repository(told, cache, model)
    path = Path(told["path"])
    try:
        if (path / MANIFEST).is_file() and "manifest_path" not in told:
            return path
        return _of_checkpoint(path, told, cache, model)
    except OSError as error:  # a name longer than names may be, or a directory that may not be looked into
        raise NotFound(f"{str(path)!r:.200} cannot be had: {error.strerror}") from error


def check_source(source: Mapping[str, Any]) -> dict[str, str]:
    """What `materialize` understands, if it is.

    Raises:
        InvalidInput: it says no kind of source, or several; something else besides; or not all, or not in text.
    """
    kinds = [kind for kind in _KEYS if kind in source]
    if len(kinds) != 1:
        raise InvalidInput(f"expected a source with one of {', '.join(_KEYS)}, got the keys {sorted(map(str, source))}")
    (kind,) = kinds
    if unknown := [key for key in source if key not in {kind, *_KEYS[kind]}]:
        raise InvalidInput(f"a source with {kind} does not take {', '.join(map(repr, unknown))}")
    for key, value in source.items():
        if not (isinstance(value, str) and value and "\0" not in value):
            raise InvalidInput(f"expected a source's {key} to be text, got {value!r:.80}")
    if kind == "store" and "rev" not in source:
        raise InvalidInput("expected a source in a store to say rev, the snapshot")
    return dict(source)


# -- checkpoints of other projects -------------------------------------------------------------------------------


def _of_checkpoint(path: Path, told: Mapping[str, str], cache: Path, model: ModelIdentity | None) -> Path:
    from kvist.cartridge.formats.importing import file_sha256, import_checkpoint
    from kvist.cartridge.formats.reading import checkpoint_file
    from kvist.cartridge.formats.sidecar import find_sidecar

    file = checkpoint_file(path)
    sidecar = Path(told["manifest_path"]) if "manifest_path" in told else find_sidecar(file)

    def digest_of_others() -> dict[str, Any]:
        beside = [one for name in _BESIDE if (one := file.with_name(name)).is_file()]
        return {
            "manifest": file_sha256(sidecar) if sidecar is not None else None,
            "beside": {one.name: file_sha256(one) for one in beside},
        }

    digest, others = file_sha256(file), digest_of_others()
    recipe = {
        "checkpoint": digest,
        **others,
        "name": told.get("cartridge_id") or _id_of(file),
        "model": dataclasses.asdict(model) if model is not None else None,
    }

    def make(directory: Path) -> None:
        name = told.get("cartridge_id")
        imported = import_checkpoint(file, model, cartridge_id=name, default_id=_id_of(file), manifest_path=sidecar)
        if imported.manifest.provenance["from"]["sha256"] != digest or digest_of_others() != others:
            # it would be found for ever under the name of what it is not
            raise InvalidCartridge(f"{file} has changed while it was converted", hint="try again when it is written")
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
    with _locked(cache, f"{digest[:32]}.lock"):
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
def _locked(cache: Path, name: str) -> Iterator[None]:
    """One process and thread at a time; a lock of a process that was killed is free."""
    with contextlib.ExitStack() as held:
        with translated("use the cache", cache):
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(cache / name))
        yield
