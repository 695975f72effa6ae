"""Records: small JSON documents under keys that say nothing of their content, each with a check of its own.

Knows one encoding. Must not know what any record means.

A manifest's key is the digest of its bytes; that of a ref, a lease or the config is only a name. A flipped digit in
one, or the bytes of one under the key of another, would read as well as the truth does. So each carries ``check``: the
BLAKE3 of its key and of its other content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from blake3 import blake3

from kvist.errors import InvalidManifest
from kvist.repo.manifest import canonical_json, parse_json

CHECK: Final = "check"
_CHECK_BYTES: Final = 16


def encode(key: str, document: Mapping[str, Any]) -> bytes:
    """The canonical bytes of ``document`` with its check, to be stored under ``key`` and under no other."""
    return canonical_json({**document, CHECK: _check(key, document)})


def decode(key: str, data: bytes) -> dict[str, Any]:
    """Read what `encode` wrote for ``key``; the document without its check.

    Raises:
        InvalidManifest: not JSON, not the canonical encoding, changed since, or written for another key.
    """
    document = parse_json(data, key)
    if canonical_json(document) != data:
        raise InvalidManifest(f"{key}: not in the canonical encoding (docs/spec/repository.md)")
    found = document.pop(CHECK, None)
    expected = _check(key, document)
    if found != expected:
        raise InvalidManifest(
            f"{key}: expected the check {expected} for its content, got {found!r:.80}: it was changed, or is another's"
        )
    return document


def _check(key: str, document: Mapping[str, Any]) -> str:
    return blake3(key.encode() + b"\0" + canonical_json(document)).hexdigest(length=_CHECK_BYTES)
