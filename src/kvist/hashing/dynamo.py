"""Dynamo's block hashes, bit for bit: what its router looks blocks up by, how it chains and places them.

Rules: NVIDIA Dynamo 1.6.1 (``dynamo._core.compute_block_hash_for_seq``); XXH3, 64 bits, seed 1337. Positional lineage
hashes: its ``dynamo-tokens`` library.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from kvist.errors import InvalidInput
from kvist.hashing.digests import little_endian, words

SEED: Final = 1337
"""The seed of Dynamo's router and mocker."""

_U64: Final = (1 << 64) - 1


def local_block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    lora_name: str = "",
    cache_namespace: str = "",
    multimodal: Sequence[Sequence[int]] | None = None,
    eagle: bool = False,
) -> list[int]:
    """The hash of every full block's own content, whatever comes before the block.

    Args:
        token_ids: the whole sequence; a partly filled last block gets no hash.
        block_size: tokens a block.
        lora_name: the adapter that the cache was computed with; empty: none.
        cache_namespace: keeps tenants apart; empty: none.
        multimodal: for each block the 64-bit hashes of the objects that lie in it, in any order; blocks past its end
            have none.
        eagle: hash each block together with the first token after it, as speculative decoding with EAGLE needs it; the
            last block has a hash only if that token is there.

    Returns:
        One unsigned 64-bit hash a block; empty if there is no full block.

    Raises:
        InvalidInput: a block size below 1, a token id outside [0, 2^32), an object's hash outside [0, 2^64), a name
            that UTF-8 cannot write.
    """
    if block_size < 1:
        raise InvalidInput(f"block_size must be at least 1 token, got {block_size}")
    seed = SEED
    if lora_name:
        seed += xxh3_64_intdigest(_utf8(lora_name, "lora_name"), 0)
    if cache_namespace:
        seed += xxh3_64_intdigest(_utf8(cache_namespace, "cache_namespace"), 1)
    seed &= _U64
    data = little_endian(words("I", token_ids, "token ids"))
    stride = 4 * block_size
    width = stride + 4 if eagle else stride
    starts = range(0, len(data) - width + 1, stride)
    if not multimodal:
        return [xxh3_64_intdigest(data[start : start + width], seed) for start in starts]
    hashes = []
    for index, start in enumerate(starts):
        content = data[start : start + width]
        if index < len(multimodal):
            objects = words("Q", multimodal[index], "hashes of multimodal objects")
            content += little_endian(array("Q", sorted(objects)))
        hashes.append(xxh3_64_intdigest(content, seed))
    return hashes


def sequence_hashes(local_hashes: Sequence[int], *, seed: int = SEED, parent: int | None = None) -> list[int]:
    """The chained hash of every block: it names the block's content *and all before it*.

    The first block of a sequence has its local hash; each next one ``xxh3(parent's, own local)``, both as
    little-endian u64.

    Args:
        local_hashes: what `local_block_hashes` gave, or a later part of it.
        seed: 1337 in Dynamo's router and mocker; some versions of its token library use 0.
        parent: the sequence hash of the block before ``local_hashes``; ``None``: they start at the root.

    Returns:
        As many unsigned 64-bit hashes.

    Raises:
        InvalidInput: a seed or hash outside [0, 2^64).
    """
    if not 0 <= seed <= _U64:
        raise InvalidInput(f"seed must be in [0, 2^64), got {seed}")
    if parent is not None and not 0 <= parent <= _U64:
        raise InvalidInput(f"parent must be in [0, 2^64) or None, got {parent}")
    data = little_endian(words("Q", local_hashes, "local hashes"))
    chain: list[int] = []
    for start in range(0, len(data), 8):
        own = data[start : start + 8]
        if parent is None:
            parent = int.from_bytes(own, "little")
        else:
            parent = xxh3_64_intdigest(parent.to_bytes(8, "little") + own, seed)
        chain.append(parent)
    return chain


class LineageLayout(StrEnum):
    """How 128 bits are shared out. Both begin with 2 bits of mode and a position of 8, 16 or 24 bits.

    The mode is the smallest that holds the position; what is left goes to the two sequence hashes, low bits kept:

    * ``FRAGMENTS``, the older: parent, then current, the same number of bits each: 59, 55 or 51. The current one is cut
      to what the next position can store as its parent, so that the two compare equal across a change of mode.
    * ``CURRENT64``: all 64 bits of the current hash, then 54, 46 or 38 bits of the parent.
    """

    FRAGMENTS = "fragments"
    CURRENT64 = "current64"


class Lineage(NamedTuple):
    """What a positional lineage hash says: a block's place and the low bits of two sequence hashes.

    Attributes:
        position: of the block in its sequence, from 0.
        current: low bits of its sequence hash.
        parent: low bits of the sequence hash of the block before it; 0 at the root.
    """

    position: int
    current: int
    parent: int


def encode_lineage(
    current: int, parent: int | None, position: int, *, layout: LineageLayout = LineageLayout.FRAGMENTS
) -> int:
    """The positional lineage hash of a block, an unsigned 128-bit integer.

    Args:
        current: the block's sequence hash.
        parent: the sequence hash of the block before it, ``None`` at the root.
        position: of the block in its sequence, from 0.
        layout: see `LineageLayout`.

    Raises:
        InvalidInput: a position outside [0, 2^24), a hash outside [0, 2^64).
    """
    if not 0 <= position < 1 << 24:
        raise InvalidInput(f"position must be in [0, 2^24), got {position}")
    for name, value in (("current", current), ("parent", parent or 0)):
        if not 0 <= value <= _U64:
            raise InvalidInput(f"{name} must be in [0, 2^64), got {value}")
    mode = _mode(position)
    position_bits = _POSITION_BITS[mode]
    hash_bits = 126 - position_bits
    head = mode << position_bits | position
    if layout is LineageLayout.CURRENT64:
        parent_bits = hash_bits - 64
        return (head << 64 | current) << parent_bits | _low(parent or 0, parent_bits)
    bits = hash_bits // 2
    kept = min(bits, (126 - _POSITION_BITS[_mode(position + 1)]) // 2)
    return (head << bits | _low(parent or 0, bits)) << bits | _low(current, kept)


def decode_lineage(value: int, *, layout: LineageLayout = LineageLayout.FRAGMENTS) -> Lineage:
    """What `encode_lineage` packed, as far as its bits go.

    Raises:
        InvalidInput: a value outside [0, 2^128); a mode that does not exist.
    """
    if not 0 <= value < 1 << 128:
        raise InvalidInput(f"a positional lineage hash must be in [0, 2^128), got {value}")
    mode = value >> 126
    if mode >= len(_POSITION_BITS):
        raise InvalidInput(f"the mode of a positional lineage hash must be 0, 1 or 2, got {mode} in {value:#034x}")
    hash_bits = 126 - _POSITION_BITS[mode]
    position = _low(value >> hash_bits, _POSITION_BITS[mode])
    if layout is LineageLayout.CURRENT64:
        parent_bits = hash_bits - 64
        return Lineage(position, _low(value >> parent_bits, 64), _low(value, parent_bits))
    bits = hash_bits // 2
    return Lineage(position, _low(value, bits), _low(value >> bits, bits))


_POSITION_BITS: Final = (8, 16, 24)


def _mode(position: int) -> int:
    """A position past the last mode's keeps the last mode: it is only ever the next one of the last block."""
    return 0 if position < 1 << 8 else 1 if position < 1 << 16 else 2


def _low(value: int, bits: int) -> int:
    return value & ((1 << bits) - 1)


def _utf8(name: str, what: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{what} must be text that UTF-8 can write, got {name!r:.80}: {error.reason}") from None
