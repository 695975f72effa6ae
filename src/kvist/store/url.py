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
from kvist.store.location import SCHEMES, Location
from kvist.store.memory import MemoryStore
from kvist.store.oci import OciStore
from kvist.store.wrap import ReadOnlyStore

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_KNOWN: Final = (
    "expected file:///absolute/path, a path, memory:, s3://, gs:// or az://BUCKET/PREFIX, https://, or oci:DIR:TAG"
)


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store that ``url`` names, without touching it.

    Args:
        url: ``file:///absolute/path`` (with ``?durable=0`` not to wait for the disk), a path, absolute or relative, or
            ``memory:`` for a new store in memory. A path whose start looks like a scheme is written ``./so:``.
            ``oci:DIR`` or ``oci:DIR:TAG`` is an artifact of an OCI image layout, by default that tagged ``latest``.
            Remote stores need the extra ``remote``: ``s3://bucket/prefix`` (with ``?endpoint=``, ``region=``,
            ``style=``), ``gs://bucket/prefix`` (``?endpoint=``), ``az://container/prefix`` (``?account=``,
            ``endpoint=``), and, read only, ``https://host/path``. Their credentials come from the environment.

    Raises:
        InvalidInput: any other form; a url that holds a secret, which is not repeated.
    """
    if "\0" in os.fspath(url):
        raise InvalidInput(f"a path or url has no zero bytes, got {os.fspath(url)!r:.200}")
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
        case "oci":
            return _open_oci(url)
        case remote if remote in SCHEMES:
            return _open_remote(url)
        case _:
            raise InvalidInput(f"{url!r} has an unknown scheme: {_KNOWN}", hint=f"for a path, write ./{url}")


def _open_file(url: str) -> LocalStore:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.fragment:
        raise InvalidInput(f"expected file:///absolute/path, got {url!r}")
    path = unquote(parts.path)
    if "\0" in path:
        raise InvalidInput(f"a path has no zero bytes, got {url!r:.200}")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    durable = query.pop("durable", "1")
    if query or durable not in ("0", "1"):
        raise InvalidInput(f"a file: url takes only durable=0 or durable=1 after its '?', got {parts.query!r}")
    return LocalStore(Path(path), durable=durable == "1")


def _open_oci(url: str) -> OciStore:
    path, tag = url[len("oci:") :], "latest"
    head, colon, tail = path.rpartition(":")
    if colon and "/" not in tail:
        path, tag = head, tail
    if not path or ":" in path:
        raise InvalidInput(f"expected oci:DIR or oci:DIR:TAG, without another ':', got {url!r}")
    return OciStore(Path(path), tag)


def _open_remote(url: str) -> Store:
    location = Location.parse(url)
    try:
        from kvist.store.remote import RemoteStore  # loads a client that local work never needs
    except ImportError:
        raise InvalidInput(
            f"{location.scheme}: stores need the package obstore", hint="pip install 'kvist[remote]'"
        ) from None
    store = RemoteStore(location)
    return ReadOnlyStore(store) if location.scheme in ("http", "https") else store
