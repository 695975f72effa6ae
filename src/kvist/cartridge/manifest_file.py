"""The manifest's file in a cartridge's directory. Knows files; must not know torch, so that it is quick to import."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvist.cartridge.manifest import CartridgeManifest
from kvist.errors import InvalidCartridge, NotFound

MANIFEST: Final = "cartridge.json"
"""Its name."""

_MAX: Final = 16 << 20


def read_manifest(directory: Path) -> CartridgeManifest:
    """The manifest of a directory.

    Raises:
        NotFound: no such directory.
        InvalidCartridge: it holds no manifest, or one that is none.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise NotFound(f"there is no directory {directory}")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX + 1)
    except OSError as error:
        raise InvalidCartridge(
            f"{directory} is no cartridge: cannot read its {MANIFEST}: {error.strerror}",
            hint="a checkpoint of another project: `kvist cartridge import`",
        ) from None
    if len(data) > _MAX:
        raise InvalidCartridge(f"{path} has more than {_MAX} bytes")
    try:
        manifest = CartridgeManifest.from_json(data)
    except InvalidCartridge as error:
        raise InvalidCartridge(f"{path}: {error}", hint=error.hint) from None
    if not manifest.files:
        raise InvalidCartridge(f"{path}: manifest: names no files")
    return manifest
