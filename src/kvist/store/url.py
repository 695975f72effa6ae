"""Store urls: from what a person types to an open store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from kvist.errors import InvalidInput
from kvist.store.base import Store
from kvist.store.local import LocalStore
from kvist.store.memory import MemoryStore

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_KNOWN: Final = "expected file:///absolute/path, a path, or memory:"
_REMOTE: Final = frozenset({"s3", "gs", "gcs", "az", "azure", "abfs", "http", "https"})


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store that ``url`` names, without touching it.

    Args:
        url: ``file:///absolute/path`` (with ``?durable=0`` not to wait for the disk), a path, absolute or relative, or
            ``memory:`` for a new store in memory. A path whose start looks like a scheme is written ``./so:``.

    Raises:
        InvalidInput: any other form.
    """
    if isinstance(url, os.PathLike):
        return LocalStore(Path(url))
    scheme = _SCHEME.match(url)
    if scheme is None:
        if not url:
            raise InvalidInput(f"{_KNOWN}, got ''")
        return LocalStore(Path(url))
    match scheme[1].lower():
        case "file":
            return _open_file(url)
        case "memory":
            if url[len("memory:") :]:
                raise InvalidInput(f"expected memory: alone, which makes a new store, got {url!r}")
            return MemoryStore()
        case remote if remote in _REMOTE:
            raise InvalidInput(f"{remote}: stores are not in this version of kvist: {_KNOWN}, got {url!r}")
        case _:
            raise InvalidInput(f"{url!r} has an unknown scheme: {_KNOWN}", hint=f"for a path, write ./{url}")


def _open_file(url: str) -> LocalStore:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.fragment:
        raise InvalidInput(f"expected file:///absolute/path, got {url!r}")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    durable = query.pop("durable", "1")
    if query or durable not in ("0", "1"):
        raise InvalidInput(f"a file: url takes only durable=0 or durable=1 after its '?', got {parts.query!r}")
    return LocalStore(Path(unquote(parts.path)), durable=durable == "1")
