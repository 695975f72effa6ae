"""Makes a cartridge of a checkpoint: puts together what the file, its manifest, the model and the caller say.

Knows manifests and models. Must not know containers and families.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import kvist
from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.formats.imported import Imported
from kvist.cartridge.formats.reading import checkpoint_file, read_checkpoint
from kvist.cartridge.formats.sidecar import check_sidecar, find_sidecar, read_sidecar
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.manifest_file import open_regular
from kvist.cartridge.model import ModelIdentity
from kvist.errors import InvalidCartridge, InvalidInput, LayoutMismatch, NotFound

_CHUNK: Final = 16 << 20
_CHANGING: Final = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
"""What of a file's state is another after each write to it, or to its name."""


def import_checkpoint(
    path: str | Path,
    model: ModelIdentity | None = None,
    *,
    cartridge_id: str | None = None,
    default_id: str | None = None,
    manifest_path: str | Path | None = None,
    dtype: str | None = None,
    labels: Mapping[str, str] | None = None,
    source_document: str = "",
    license: str = "",
    training_steps: int | None = None,
    block_size: int = 16,
) -> Cartridge:
    """A cartridge in memory of another project's checkpoint; nothing in it is run.

    Args:
        path: see `read_checkpoint`.
        model: whose keys and values they are; ``None``: what the checkpoint or its manifest says, which leaves the
            revision and the rotary embedding unknown.
        cartridge_id: default the manifest's; must be it, where both are given.
        default_id: where neither is.
        manifest_path: of an original manifest; default `find_sidecar`.
        dtype: to convert to; ``None``: as it is.
        labels: added to the manifest's.
        source_document: default the manifest's.
        license: of its content.
        training_steps: default the manifest's, else 0.
        block_size: for the aligned counts in its manifest; no token is dropped.

    Raises:
        LayoutMismatch: it is not for this model, one clause a difference.
        InvalidInput: no id or no model can be found out.
        NotFound, InvalidCartridge, UnsafeCheckpoint, DamagedCartridge: as `read_checkpoint`; and a manifest that
            contradicts the file or the caller.
    """
    file = checkpoint_file(path)
    sidecar_path = Path(manifest_path) if manifest_path is not None else find_sidecar(file)
    if manifest_path is not None and not Path(manifest_path).is_file():
        raise NotFound(f"no such manifest: {manifest_path}")
    told = read_sidecar(sidecar_path) if sidecar_path is not None else None
    before = _stat(file)
    imported = read_checkpoint(file, dtype=dtype)
    size, sha256 = before.st_size, file_sha256(file)
    if any(getattr(before, name) != getattr(_stat(file), name) for name in _CHANGING):
        raise InvalidCartridge(f"{file} has changed while it was read", hint="import it when its writer is done")
    if told is not None:
        check_sidecar(told, imported, size=size, sha256=sha256, is_converted=dtype is not None)
    sidecar = told.manifest if told is not None else None
    kind = told.manifest.resource_kind if told is not None and "resource_kind" in told.stated else None
    named = sidecar.model_id if sidecar is not None else imported.model_id
    origin: dict[str, Any] = {"file": file.name, "size": size, "sha256": sha256}
    origin |= {"format": imported.source_format, "model": named}
    provenance: dict[str, Any] = {"tool": "kvist cartridge import", "version": kvist.__version__, "from": origin}
    if imported.meta:
        provenance["original"] = dict(imported.meta)
    steps = training_steps if training_steps is not None else sidecar.training_steps if sidecar else 0
    return Cartridge.create(
        imported.layers,
        _model(imported, model, named, file),
        cartridge_id=_id(cartridge_id, default_id, sidecar, file),
        token_ids=None if steps else imported.token_ids,  # trained, they are no prefill of them
        num_frozen_tokens=imported.num_frozen_tokens,
        training_steps=steps,
        source_document=source_document or (sidecar.source_document if sidecar else ""),
        source_format=imported.source_format,
        resource_kind=kind or imported.resource_kind,
        block_size=block_size,
        labels={**(sidecar.labels if sidecar else {}), **(labels or {})},
        provenance=provenance,
        license=license,
    )


def file_sha256(path: Path) -> str:
    """The digest of a file, in hex.

    Raises:
        NotFound: it is not there.
        InvalidCartridge: it is no regular file, or cannot be read.
    """
    digest = hashlib.sha256()
    with _readable(path), open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result:
    with _readable(path):
        return path.stat()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except OSError as error:
        raise InvalidCartridge(f"cannot read {path}: {error.strerror}") from None


def _id(cartridge_id: str | None, default: str | None, sidecar: CartridgeManifest | None, file: Path) -> str:
    stated = sidecar.cartridge_id if sidecar is not None else None
    if stated is not None and cartridge_id not in (None, stated):
        raise InvalidCartridge(
            f"{file}: expected the cartridge_id {cartridge_id!r:.80}, its manifest has {stated!r:.80}"
        )
    found = cartridge_id or stated or default
    if found is None:
        raise InvalidInput(f"{file}: a cartridge needs an id", hint="name it: `kvist cartridge import ... --id ID`")
    return found


def _model(imported: Imported, model: ModelIdentity | None, named: str | None, file: Path) -> ModelIdentity:
    """The model that the cartridge will be for, which the checkpoint may have ``named``."""
    found = {
        "num_layers": len(imported.layers),
        "num_kv_heads": imported.num_kv_heads,
        "head_dim": imported.head_dim,
        "dtype": imported.dtype,
    }
    if model is None:
        if named is None:
            raise InvalidInput(
                f"{file} does not say which model it is for", hint="name it: `kvist cartridge import ... --model DIR`"
            )
        return ModelIdentity(model_id=named, **found)  # type: ignore[arg-type]
    differences = [
        f"{name}: the checkpoint has {value!r}, the model {getattr(model, name)!r}"
        for name, value in found.items()
        if value != getattr(model, name)
    ]
    if named is not None and _last(named) != _last(model.model_id):
        differences.insert(0, f"model_id: the checkpoint says {named!r:.120}, the model is {model.model_id!r:.120}")
    if differences:
        hints = {
            "dtype": f"--dtype {model.dtype} converts it",
            "model_id": f"if it is that model: --model-id {named!r:.120}",
        }
        kinds = [line.partition(":")[0] for line in differences]
        raise LayoutMismatch(
            f"{file} is not for this model: {'; '.join(differences)}",
            hint="; ".join(hints[kind] for kind in kinds) if set(kinds) <= set(hints) else None,
        )
    return dataclasses.replace(model)


def _last(model_id: str) -> str:
    """The name without organisation or directory, by which models are compared."""
    return model_id.rstrip("/").rpartition("/")[2]
