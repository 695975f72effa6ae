"""vLLM's block hashes, bit for bit: the chain that its prefix cache looks blocks up by.

Rules: vLLM 0.28 to 0.32 (``vllm.v1.core.kv_cache_utils``). A block's hash is the digest of the serialized tuple
``(parent hash, token ids, extra keys)``; the serializer is pickle or canonical CBOR, by the algorithm's name.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from xxhash import xxh3_128_digest

from kvist.errors import InvalidInput
from kvist.hashing.digests import words

DEFAULT_SEED: Final = "vllm-none-hash"
"""What vLLM derives the chain's root from, for the two SHA-256 algorithms, where ``PYTHONHASHSEED`` is not set.

vLLM 0.28 has no such default: its root is random unless ``PYTHONHASHSEED`` is set.
"""

ExtraKeys = tuple[Any, ...]


def _pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _cbor(value: object) -> bytes:
    try:
        import cbor2
    except ImportError:
        raise InvalidInput("the CBOR algorithms need the package cbor2", hint="pip install 'kvist[router]'") from None
    return bytes(cbor2.dumps(value, canonical=True))


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


ALGORITHMS: Final[dict[str, Callable[[object], bytes]]] = {
    "sha256": lambda value: _sha256(_pickled(value)),
    "sha256_cbor": lambda value: _sha256(_cbor(value)),
    "xxhash": lambda value: xxh3_128_digest(_pickled(value)),
    "xxhash_cbor": lambda value: xxh3_128_digest(_cbor(value)),
}
"""Digests of any plain value by vLLM's name for them (``--prefix-caching-hash-algo``): 32 bytes or 16."""

_GUESSABLE: Final = frozenset({"xxhash", "xxhash_cbor"})


class MultimodalItem(NamedTuple):
    """An image, sound or video among a prompt's tokens.

    Attributes:
        identifier: vLLM's hash or name of its content.
        offset: index of its first placeholder token.
        length: number of its placeholder tokens.
    """

    identifier: str
    offset: int
    length: int


def none_hash(algorithm: str = "sha256", *, seed: str = DEFAULT_SEED) -> bytes:
    """The root of every chain: what stands where a first block has no parent.

    Args:
        algorithm: a name in `ALGORITHMS`.
        seed: the value of ``PYTHONHASHSEED`` in vLLM's environment, if it is set there.

    Raises:
        InvalidInput: an unknown algorithm.
    """
    return _digest(algorithm)(seed)


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    algorithm: str = "sha256",
    parent: bytes | None = None,
    extra_keys: Sequence[ExtraKeys | None] = (),
) -> list[bytes]:
    """The chained hash of every full block.

    Args:
        token_ids: the whole sequence, or the part after ``parent``; a partly filled last block gets no hash.
        block_size: tokens a block.
        algorithm: a name in `ALGORITHMS`.
        parent: the hash of the block before, or `none_hash`; ``None``: the default root. The xxHash algorithms have no
            default: vLLM seeds them at random unless ``PYTHONHASHSEED`` is set.
        extra_keys: of each block what its hash depends on beside its tokens, as `block_extra_keys` gives it; blocks
            past its end have none. Pickle tells equal strings from one string met twice: within one block's keys they
            must be separate objects where they are in vLLM.

    Returns:
        32 bytes a block for SHA-256, 16 for xxHash; empty if there is no full block.

    Raises:
        InvalidInput: an unknown algorithm, a missing root, a block size below 1, a token id outside [0, 2^32).
    """
    digest = _digest(algorithm)
    if block_size < 1:
        raise InvalidInput(f"block_size must be at least 1 token, got {block_size}")
    if parent is None and algorithm in _GUESSABLE:
        raise InvalidInput(
            f"{algorithm} has no default root: give parent=none_hash({algorithm!r}, seed=PYTHONHASHSEED)"
        )
    ids = words("I", token_ids, "token ids")
    last = none_hash(algorithm) if parent is None else parent
    hashes = []
    for index in range(len(ids) // block_size):
        tokens = tuple(ids[index * block_size : (index + 1) * block_size])
        last = digest((last, tokens, extra_keys[index] if index < len(extra_keys) else None))
        hashes.append(last)
    return hashes


def block_extra_keys(
    count: int,
    block_size: int,
    *,
    lora_name: str = "",
    lora_path: str = "",
    cache_salt: str = "",
    multimodal: Sequence[MultimodalItem] = (),
    tagged: bool = True,
) -> list[ExtraKeys | None]:
    """Of each of a sequence's first ``count`` blocks what its hash depends on beside its tokens.

    In this order: the adapter (every block), the multimodal items that reach into the block with their offset from its
    start, the salt (first block).

    Args:
        count: number of blocks.
        block_size: tokens a block.
        lora_name: the adapter; empty: none.
        lora_path: where the adapter was loaded from; part of the key only where keys are tagged.
        cache_salt: the request's salt; empty: none.
        multimodal: in order of their offsets; they do not overlap.
        tagged: vLLM 0.32 names each key's source in it (``("lora", name, path)``); 0.28 and 0.30 do not (``name``).

    Raises:
        InvalidInput: a count below 0, a block size below 1, items out of order or overlapping.
    """
    if count < 0 or block_size < 1:
        raise InvalidInput(f"count must be at least 0 and block_size at least 1, got {count} and {block_size}")
    end = 0
    for item in multimodal:
        if item.offset < end or item.length < 0:
            raise InvalidInput(f"multimodal items must be in order and apart, got {item} after token {end}")
        end = item.offset + item.length
    keys: list[ExtraKeys | None] = []
    for start in range(0, count * block_size, block_size):
        of_block: list[Any] = []
        if lora_name:
            of_block.append(("lora", lora_name, lora_path) if tagged else lora_name)
        for item in multimodal:
            if item.offset < start + block_size and start < item.offset + item.length:
                place = (item.identifier, item.offset - start)
                of_block.append(("mm", *place) if tagged else place)
        if cache_salt and start == 0:
            of_block.append(("cache_salt", cache_salt) if tagged else cache_salt)
        keys.append(tuple(of_block) or None)
    return keys


def event_extra_keys(keys: Sequence[ExtraKeys | None]) -> list[ExtraKeys | None]:
    """Tagged keys as vLLM publishes them in events: without tags, an adapter without its path."""
    return [
        None if of_block is None else tuple(key[1:] if key[0] == "mm" else key[1] for key in of_block)
        for of_block in keys
    ]


def event_hash(block_hash: bytes) -> int:
    """A block hash as vLLM publishes it in events: its last 8 bytes as an unsigned big-endian integer.

    Raises:
        InvalidInput: fewer than 8 bytes.
    """
    if len(block_hash) < 8:
        raise InvalidInput(f"a block hash must have at least 8 bytes, got {block_hash!r}")
    return int.from_bytes(block_hash[-8:], "big")


def _digest(algorithm: str) -> Callable[[object], bytes]:
    if algorithm not in ALGORITHMS:
        raise InvalidInput(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    return ALGORITHMS[algorithm]
