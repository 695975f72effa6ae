"""JSON files beside a checkpoint, and the manifest of vLLM's first CartridgeConnector among them.

Knows that manifest's schema through `CartridgeManifest.from_json(lenient=True)`. Must not know containers.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from kvist.cartridge.formats.imported import Imported
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.manifest_file import open_regular
from kvist.errors import DamagedCartridge, InvalidCartridge, InvalidManifest
from kvist.repo.manifest import parse_json

log = logging.getLogger("kvist.cartridge")

_JSON_MAX: Final = 32 << 20
_T = TypeVar("_T", dict, list)  # type: ignore[type-arg]


@dataclass(frozen=True, slots=True)
class Sidecar:
    """An original manifest.

    Attributes:
        path: of its file.
        manifest: with schema version 0, and defaults for what the file does not say.
        stated: the fields that the file says.
    """

    path: Path
    manifest: CartridgeManifest
    stated: frozenset[str]


def read_json(path: Path, kind: type[_T]) -> _T:
    """The object or array in a file.

    Raises:
        InvalidCartridge: no such file, too large a one, or something else in it.
    """
    try:
        with open_regular(path) as file:
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
    """The manifest beside ``cartridge.pt``: ``cartridge.pt.json``, or ``cartridge.json`` where that is a manifest.

    The second name is nobody's own: what is there and no manifest is passed over.
    """
    full = path.with_name(path.name + ".json")
    if full.is_file():
        return full
    short = path.with_suffix(".json")
    if short.is_file() and short != path:
        try:
            document = read_json(short, dict)
        except InvalidCartridge as error:
            log.warning("passed over, as no manifest of %s: %s", path, error)
            return None
        if "cartridge_id" in document and "schema_version" not in document:  # else it is that of a cartridge of ours
            return short
    return None


def read_sidecar(path: Path) -> Sidecar:
    """Read an original manifest.

    Raises:
        InvalidCartridge: it is none.
    """
    document = read_json(path, dict)
    try:
        manifest = CartridgeManifest.from_dict(document, lenient=True)
    except InvalidCartridge as error:
        raise InvalidCartridge(f"{path}: {error}") from None
    return Sidecar(path, manifest, frozenset(document))


def check_sidecar(sidecar: Sidecar, imported: Imported, *, size: int, sha256: str, is_converted: bool) -> None:
    """Compare a manifest with the file that it is of, in all fields that it has.

    Args:
        sidecar: the manifest.
        imported: what the file holds.
        size: of the file, in bytes.
        sha256: of the file, in hex.
        is_converted: whether it was read as another data type than it has.

    Raises:
        DamagedCartridge: the file has another checksum than the manifest says.
        InvalidCartridge: the manifest says something else of it, one clause a difference.
    """
    where, manifest = sidecar.path, sidecar.manifest
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
    if imported.resource_kind != "kv_prefix":  # which is all that such a file says
        pairs["resource_kind"] = imported.resource_kind
    differences = [
        f"{name}: the manifest says {getattr(manifest, name)}, the checkpoint has {value}"
        for name, value in pairs.items()
        if name in sidecar.stated and getattr(manifest, name) != value
    ]
    if manifest.file_size_bytes not in (0, size):
        differences.append(f"file_size_bytes: the manifest says {manifest.file_size_bytes}, the file has {size}")
    if differences:
        raise InvalidCartridge(f"{where}: {'; '.join(differences)}")
