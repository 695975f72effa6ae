"""From LMCache's keys to block hashes, and which cartridge a key names. Knows the fields of a key; imports no LMCache.

A key of LMCache 0.5.6 (``lmcache.utils.CacheEngineKey``) has ``model_name``, ``world_size``, ``worker_id``,
``chunk_hash`` (an integer, or bytes), ``dtype`` and ``tags``: pairs of a name and a value, from the entries
``lmcache.tag.<name>`` of a request's configs. A key of one layer has a ``layer_id`` besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

from blake3 import blake3

from kvist.repo.manifest import canonical_json

CARTRIDGE_TAG: Final = "cartridge"
"""The tag whose value is a cartridge's id."""
LAYER_TAG: Final = "layer"
"""The tag that asks for all of one layer of a cartridge, in place of a chunk of it."""


class ChunkKey(Protocol):
    """What is read of a key."""

    model_name: str
    world_size: int
    worker_id: int
    chunk_hash: int | bytes
    dtype: Any
    tags: tuple[tuple[str, Any], ...] | None


@dataclass(frozen=True, slots=True)
class CartridgeTags:
    """What a key says of a cartridge.

    Attributes:
        cartridge_id: of the request.
        layer: all of this layer is asked for; ``None``: the chunk that the key's hash names.
    """

    cartridge_id: str
    layer: int | None = None


def cartridge_of(key: ChunkKey) -> CartridgeTags | None:
    """The cartridge that a key names; ``None``: it names none.

    Raises:
        ValueError: its tags cannot be right: an empty id, a layer that is no number, or a layer of no cartridge.
    """
    tags = dict(key.tags or ())
    layer = tags.get(LAYER_TAG)
    if CARTRIDGE_TAG not in tags:
        if layer is not None:
            raise ValueError(f"tag {LAYER_TAG} is of no use without tag {CARTRIDGE_TAG}")
        return None
    name = str(tags[CARTRIDGE_TAG])
    if not name:
        raise ValueError(f"tag {CARTRIDGE_TAG} is empty")
    if layer is None:
        return CartridgeTags(name)
    text = str(layer)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"tag {LAYER_TAG} is no layer: {text!r:.80}")
    return CartridgeTags(name, int(text))


def block_of(key: ChunkKey, *, identity: str = "", is_full: bool = True) -> str:
    """The block hash, 64 hex digits, under which a chunk is kept.

    LMCache's own text form joins the fields with ``@`` and ``%``, which may occur in them; this cannot be ambiguous.

    Args:
        key: of the chunk.
        identity: of the cartridge that the chunk was computed behind. The key has only its id, under which there may
            be another one tomorrow.
        is_full: the chunk has as many tokens as chunks have. A shorter one is kept beside, since its page is padded.
    """
    chunk = key.chunk_hash
    document = {
        "model": key.model_name,
        "world_size": int(key.world_size),
        "worker": int(key.worker_id),
        "chunk": chunk.hex() if isinstance(chunk, bytes) else f"{chunk:x}",
        "dtype": str(key.dtype),
        "layer": getattr(key, "layer_id", None),
        "tags": [[str(name), str(value)] for name, value in key.tags or ()],
        "cartridge": identity,
        "full": is_full,
    }
    return blake3(b"kvist lmcache chunk v1\0" + canonical_json(document)).hexdigest()
