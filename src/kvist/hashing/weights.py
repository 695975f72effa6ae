"""What pins the weights of a model on disk. Knows files; knows no engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from blake3 import blake3

from kvist.ids import format_digest

_HUB_SNAPSHOT: Final = re.compile(r".*?(?:/models--([^/]+))?/snapshots/([0-9a-f]{40})/?")
_WEIGHTS: Final = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def hub_snapshot(directory: Path) -> tuple[str | None, str] | None:
    """The repository's id, if its path says it, and the commit of a directory in the Hugging Face cache, else ``None``.

    By the path as it is given, links not followed.
    """
    match = _HUB_SNAPSHOT.fullmatch(directory.as_posix())
    return None if match is None else (match[1] and match[1].replace("--", "/"), match[2])


def revision(directory: Path) -> str:
    """The commit of a directory in the Hugging Face cache; of any other one a digest of what it holds.

    The digest is ``blake3:`` over the names and digests of ``config.json`` and the weight files. All of their
    bytes are read, once a process.
    """
    if (hub := hub_snapshot(directory)) is not None:
        return hub[1]
    whole = blake3(b"kvist model revision v1\0")
    weights = sorted(path for path in directory.iterdir() if path.suffix in _WEIGHTS)
    for path in [directory / "config.json", *weights]:
        digest = blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
        whole.update(path.name.encode() + b"\0" + digest)
    return format_digest("blake3", whole.digest())
