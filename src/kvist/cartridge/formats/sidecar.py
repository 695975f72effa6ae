"""JSON files beside a checkpoint, and the manifest of vLLM's first CartridgeConnector among them.

Knows that manifest's schema through `CartridgeManifest.from_json(lenient=True)`. Must not know containers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, TypeVar

from kvist.cartridge.formats.imported import Imported
from kvist.cartridge.manifest import CartridgeManifest
from kvist.errors import DamagedCartridge, InvalidCartridge, InvalidManifest
from kvist.repo.manifest import parse_json

_JSON_MAX: Final = 32 << 20
_T = TypeVar("_T", dict, list)  # type: ignore[type-arg]


def read_json(path: Path, kind: type[_T]) -> _T:
    """The object or array in a file.

    Raises:
        InvalidCartridge: no such file, too large a one, or something else in it.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_JSON_MAX + 1)
    except OSError as error:
        raise InvalidCartridge(f"cannot read {path}: {error.strerror}") from None
    if len(text) > _JSON_MAX:
        raise InvalidCartridge(f"{path} has more than {_JSON_MAX:,} bytes")
    try:
        value = parse_json(text, str(path)) if kind is dict else json.loads(text.decode())
    except (InvalidManifest, ValueError, RecursionError) as error:
        raise InvalidCartridge(f"{path} is no JSON that can be read: {error!s:.200}") from None
    if not isinstance(value, kind):
        raise InvalidCartridge(f"{path} must hold a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def find_sidecar(path: Path) -> Path | None:
    """The manifest beside ``cartridge.pt``: ``cartridge.pt.json``, or ``cartridge.json`` where that is a manifest."""
    full = path.with_name(path.name + ".json")
    if full.is_file():
        return full
    short = path.with_suffix(".json")
    if short.is_file() and short != path:
        document = read_json(short, dict)
        if "cartridge_id" in document and "schema_version" not in document:  # else it is that of a cartridge of ours
            return short
    return None


def read_sidecar(path: Path) -> CartridgeManifest:
    """An original manifest; its schema version is 0.

    Raises:
        InvalidCartridge: it is none.
    """
    document = read_json(path, dict)
    try:
        return CartridgeManifest.from_dict(document, lenient=True)
    except InvalidCartridge as error:
        raise InvalidCartridge(f"{path}: {error}") from None


def check_sidecar(
    manifest: CartridgeManifest, imported: Imported, *, size: int, sha256: str, is_converted: bool, where: str
) -> None:
    """Compare a manifest with the file that it is of.

    Args:
        manifest: with schema version 0.
        imported: what the file holds.
        size: of the file, in bytes.
        sha256: of the file, in hex.
        is_converted: whether it was read as another data type than it has.
        where: the manifest's file, for messages.

    Raises:
        DamagedCartridge: the file has another checksum than the manifest says.
        InvalidCartridge: the manifest says something else of it, one clause a difference.
    """
    if manifest.checksum and manifest.checksum != sha256:
        raise DamagedCartridge(f"{where}: expected a file with the SHA-256 {manifest.checksum:.80}, got {sha256}")
    pairs: dict[str, object] = {
        "num_layers": len(imported.layers),
        "num_kv_heads": imported.num_kv_heads,
        "head_dim": imported.head_dim,
        "num_tokens_raw": imported.num_tokens,
        "num_frozen_tokens": imported.num_frozen_tokens,
        "has_frozen_prefix": imported.num_frozen_tokens > 0,
    }
    if not is_converted and manifest.dtype != "unknown":
        pairs["dtype"] = imported.dtype
    differences = [
        f"{name}: the manifest says {getattr(manifest, name)}, the checkpoint has {value}"
        for name, value in pairs.items()
        if getattr(manifest, name) != value
    ]
    if manifest.file_size_bytes not in (0, size):
        differences.append(f"file_size_bytes: the manifest says {manifest.file_size_bytes}, the file has {size}")
    if manifest.resource_kind != imported.resource_kind and imported.resource_kind != "kv_prefix":
        differences.append(f"resource_kind: the manifest says {manifest.resource_kind}, it is {imported.resource_kind}")
    if differences:
        raise InvalidCartridge(f"{where}: {'; '.join(differences)}")
