"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from kvist.errors import StoreError


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file beside its place, then move it there; what stood there stays until then.

    What is no file, such as ``/dev/stdout``, is written to directly.

    Raises:
        StoreError: it cannot be written; the message names it.
    """
    goes_beside = path.is_file() or not path.exists()
    beside = path.with_name(f".{path.name}.{os.getpid()}.part") if goes_beside else path
    try:
        try:
            with beside.open("wb") as file:
                file.writelines(parts)
            if goes_beside:
                beside.replace(path)
        finally:
            if goes_beside:
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
