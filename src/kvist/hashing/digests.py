"""kvist's own hashes: page digests, cids, and the chained block hash of its prefix cache."""

from __future__ import annotations

import hashlib
import hmac
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Final, Literal

from blake3 import blake3

from kvist.errors import InvalidInput

Buffer = bytes | bytearray | memoryview


def _sha256(data: Buffer) -> bytes:
    return hashlib.sha256(data).digest()


def _blake3(data: Buffer) -> bytes:
    return blake3(data).digest()


DIGESTS: Final[dict[str, Callable[[Buffer], bytes]]] = {"blake3": _blake3, "sha256": _sha256}
"""Digest functions by algorithm name. Both release the GIL on buffers of more than 2 KiB."""


def keyed_digest(algorithm: str, salt: bytes) -> Callable[[Buffer], bytes]:
    """The digest function of a repository with a salt: keyed BLAKE3, or HMAC-SHA256.

    Equal content has unrelated digests under two salts, and nobody without the salt can tell what a digest is of.
    """
    key = blake3(salt, derive_key_context="kvist page digest v1").digest()
    if algorithm == "blake3":
        return lambda data: blake3(data, key=key).digest()
    return lambda data: hmac.new(key, data, "sha256").digest()


def block_salt(salt: bytes) -> str:
    """The salt of block hashes (see `block_root`) that goes with a repository's; tells nothing of that."""
    return str(blake3(salt, derive_key_context="kvist block salt v1").hexdigest())


def sha256_cid(data: Buffer) -> str:
    """The cid of an object: ``sha256:<hex>`` of its bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def block_root(salt: str = "") -> bytes:
    """The parent of a sequence's first block. ``salt`` keeps tenants, adapters or snapshots apart."""
    return blake3(b"kvist block v1\0" + salt.encode()).digest()


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], size: int, *, salt: str = "") -> None:
    """Append to ``hashes`` the hash of every full block of ``token_ids`` that it does not hold yet.

    A block hash is ``blake3(parent hash, the block's ids as little-endian u32)``: it names the tokens of the block
    *and of all before it*, so equal hashes mean equal prefixes.

    Args:
        hashes: hashes of the first ``len(hashes)`` blocks of the same ids; changed in place.
        token_ids: the whole sequence; a partly filled last block gets no hash.
        size: tokens a block.
        salt: see `block_root`; the same for every call on one sequence.
    """
    parent = hashes[-1] if hashes else block_root(salt)
    for start in range(len(hashes) * size, len(token_ids) - size + 1, size):
        parent = blake3(parent + _u32(token_ids[start : start + size])).digest()
        hashes.append(parent)


def _u32(token_ids: Sequence[int]) -> bytes:
    return little_endian(words("I", token_ids, "token ids"))


def words(code: Literal["I", "Q"], values: Sequence[int], what: str) -> array[int]:
    """The integers as machine words, of 32 bits (``I``) or 64 (``Q``).

    Raises:
        InvalidInput: values that are no integers or do not fit; bytes, which an array would take for words; ``what``
            names them.
    """
    try:
        if isinstance(values, (bytes, bytearray)):
            raise TypeError
        return array(code, values)
    except (OverflowError, TypeError):
        bits = 32 if code == "I" else 64
        raise InvalidInput(f"{what} must be integers in [0, 2^{bits}), got {values!r:.120}") from None


def little_endian(values: array[int]) -> bytes:
    """The words' bytes, the same on every machine. The array may be changed by it."""
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
