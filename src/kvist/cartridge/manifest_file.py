"""The manifest's file in a cartridge's directory. Knows files; must not know torch, so that it is quick to import."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from kvist.cartridge.manifest import CartridgeManifest
from kvist.errors import DamagedCartridge, InvalidCartridge, NotFound

MANIFEST: Final = "cartridge.json"
"""Its name."""

_MAX: Final = 16 << 20


def open_regular(path: Path) -> BinaryIO:
    """Open a file of somebody else's, never waiting: a pipe would wait for who writes into it.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(handle, "rb")


def read_manifest(directory: Path, identity: str | None = None) -> CartridgeManifest:
    """The manifest of a directory.

    Args:
        directory: a cartridge's.
        identity: that it must have.

    Raises:
        NotFound: no such directory.
        InvalidCartridge: it holds no manifest, or one that is none.
        DamagedCartridge: it holds a cartridge of another identity.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise NotFound(f"there is no directory {directory}")
    try:
        with open_regular(path) as file:
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
    if identity is not None and manifest.identity != identity:
        raise DamagedCartridge(
            f"{directory} holds the cartridge {manifest.cartridge_id!r} of identity {manifest.identity}, "
            f"expected {identity}",
            hint="if it was changed on purpose, register it again",
        )
    return manifest
