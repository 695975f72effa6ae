"""Identifiers: digests, cids and the names that people choose. Knows their form, not what they name."""

from __future__ import annotations

import re
from typing import Final

from kvist.errors import InvalidInput, InvalidName

ALGORITHMS: Final = ("blake3", "sha256")
"""Digest algorithms, both 32 bytes long."""

_DIGEST: Final = re.compile(r"(blake3|sha256):([0-9a-f]{64})")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]*")
_NAME_MAX: Final = 200


def format_digest(algorithm: str, raw: bytes) -> str:
    """``("blake3", 32 bytes)`` to ``"blake3:<64 lower-case hex>"``."""
    return f"{algorithm}:{raw.hex()}"


def parse_digest(text: object) -> str:
    """Return ``text`` if it is a digest in canonical form.

    Raises:
        InvalidInput: anything else. Upper-case hex is refused, not folded: two spellings of one
            identity would be two keys.
    """
    if isinstance(text, str) and _DIGEST.fullmatch(text):
        return text
    raise InvalidInput(f"expected a digest 'blake3:' or 'sha256:' and 64 lower-case hex digits, got {text!r:.120}")


def parse_cid(text: object) -> str:
    """Return ``text`` if it is a cid (always ``sha256:``), else raise `InvalidInput`."""
    if isinstance(text, str) and text.startswith("sha256:") and _DIGEST.fullmatch(text):
        return text
    raise InvalidInput(f"expected a cid 'sha256:' and 64 lower-case hex digits, got {text!r:.120}")


def digest_hex(digest: str) -> str:
    """The 64 hex digits of a digest."""
    return digest[digest.index(":") + 1 :]


def short(digest: str) -> str:
    """The first 12 hex digits, for people."""
    return digest_hex(digest)[:12]


def check_name(name: object) -> str:
    """Return ``name`` if it may name a branch, tag or sequence.

    A name is one to many segments joined by ``/``; a segment starts with a letter or digit and goes on with
    letters, digits and ``._+@-``. So a name can be a path below a directory and never leaves it, needs no
    quoting in a shell, and is never an option. A name that looks like a digest is refused: it would shadow one.

    Raises:
        InvalidName: with the first rule that is broken.
    """
    if not isinstance(name, str) or not name:
        raise InvalidName(f"expected a name of at least one character, got {name!r:.120}")
    if len(name) > _NAME_MAX:
        raise InvalidName(f"a name has at most {_NAME_MAX} characters, got {len(name)}")
    for segment in name.split("/"):
        if not _SEGMENT.fullmatch(segment):
            raise InvalidName(
                f"name {name!r} has the segment {segment!r}; a segment starts with a letter or digit and "
                "goes on with letters, digits and '._+@-'"
            )
        if segment.endswith((".ref", ".lock", ".tmp")):
            raise InvalidName(f"name {name!r} ends a segment in '.ref', '.lock' or '.tmp', which are reserved")
    if re.fullmatch(r"[0-9a-f]{64}", name):
        raise InvalidName(f"name {name!r} looks like a digest and would shadow one")
    return name
