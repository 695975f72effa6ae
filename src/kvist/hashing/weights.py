"""What pins the weights of a model on disk. Knows files; knows no engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from blake3 import blake3

from kvist.ids import format_digest

_HUB_SNAPSHOT: Final = re.compile(r".*/snapshots/([0-9a-f]{40})/?")
_WEIGHTS: Final = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def revision(directory: Path) -> str:
    """The commit of a directory in the Hugging Face cache; of any other one a digest of what it holds.

    The digest is ``blake3:`` over the names and digests of ``config.json`` and the weight files. All of their
    bytes are read, once a process.
    """
    commit = _HUB_SNAPSHOT.fullmatch(directory.as_posix())
    if commit is not None:
        return commit.group(1)
    whole = blake3(b"kvist model revision v1\0")
    weights = sorted(path for path in directory.iterdir() if path.suffix in _WEIGHTS)
    for path in [directory / "config.json", *weights]:
        digest = blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
        whole.update(path.name.encode() + b"\0" + digest)
    return format_digest("blake3", whole.digest())
