"""Hashing: page digests and block hashes. Knows algorithms; knows nothing of where bytes lie."""

from __future__ import annotations

from kvist.hashing.digests import (
    DIGESTS,
    Buffer,
    block_root,
    block_salt,
    extend_block_hashes,
    keyed_digest,
    sha256_cid,
)
from kvist.hashing.dynamo import (
    Lineage,
    LineageLayout,
    decode_lineage,
    encode_lineage,
    local_block_hashes,
    sequence_hashes,
)

__all__ = [
    "DIGESTS",
    "Buffer",
    "Lineage",
    "LineageLayout",
    "block_root",
    "block_salt",
    "decode_lineage",
    "encode_lineage",
    "extend_block_hashes",
    "keyed_digest",
    "local_block_hashes",
    "sequence_hashes",
    "sha256_cid",
]
