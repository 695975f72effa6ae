"""What every wire form carries: a batch of block events, and how these meet kvist's own `Event`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final, Protocol

from msgspec import Struct, structs

from kvist.blocks.events import Event, EventData, Stored, Tier
from kvist.errors import InvalidInput
from kvist.hashing import local_block_hashes

U64: Final = (1 << 64) - 1

MEDIA: Final[dict[str, Tier]] = {
    "GPU": Tier.DEVICE,
    "DEVICE": Tier.DEVICE,
    "CPU": Tier.HOST,
    "CPU_PINNED": Tier.HOST,
    "CPU_TIER1": Tier.HOST,
    "CPU_TIER2": Tier.DISK,
    "DISK": Tier.DISK,
    "FS": Tier.DISK,
    "NVME": Tier.DISK,
    "STORAGE": Tier.DISK,
    "EXTERNAL": Tier.EXTERNAL,
    "NETWORK": Tier.EXTERNAL,
    "OBJ": Tier.EXTERNAL,
    "REMOTE": Tier.EXTERNAL,
    "SHARED": Tier.EXTERNAL,
}
"""The tier that an engine's ``medium`` means: Dynamo's table, and vLLM's ``FS`` and ``OBJ``."""


class BlockEvent(Struct, frozen=True):
    """One event of a batch: what kvist's `Event` says of it, and what only the wire says.

    Attributes:
        data: what happened. Hashes are unsigned 64-bit integers, however the wire wrote them. A stored block's
            ``token_ids`` have ``block_size`` entries, or one more where the engine hashes a block with the first token
            after it (EAGLE).
        tier: where it happened.
        block_size: tokens a block, of `Stored` alone; ``None`` if it is not told.
        lora_id: the adapter's number in its engine.
        lora_name: the adapter's name.
        cache_salt: keeps tenants apart: Dynamo's cache namespace, under the name that it reads. vLLM itself tells salts
            in ``extra_keys`` alone.
        extra_keys: of each stored block what its hash depends on beside its tokens, or ``None`` for a block without.
        group: the engine's KV cache group; engines with several tell each block once a group, under the same hash.
        spec_kind: the group's kind of attention, in vLLM's words.
        sliding_window: the group's window in tokens.
        locality: ``LOCAL`` or ``REMOTE``, as the publisher sees it.
    """

    data: EventData
    tier: Tier = Tier.DEVICE
    block_size: int | None = None
    lora_id: int | None = None
    lora_name: str | None = None
    cache_salt: str | None = None
    extra_keys: Sequence[Sequence[Any] | None] | None = None
    group: int | None = None
    spec_kind: str | None = None
    sliding_window: int | None = None
    locality: str | None = None

    @property
    def is_placeholder(self) -> bool:
        """Whether it names stored blocks without saying what they hold.

        vLLM's offloading connectors may tell it so; the parent is then unknown, not the root. `kvist.router.feed`
        refuses it, since the index would not know the blocks by their tokens.
        """
        return isinstance(self.data, Stored) and self.data.token_ids is None and not self.data.local_hashes


class Batch(Struct, frozen=True):
    """What one message carries.

    Attributes:
        ts: seconds since the epoch, by the publisher's clock.
        events: in the order in which they happened.
        dp_rank: data-parallel rank of the publisher, ``None`` if it is not told.
        skipped: one sentence for each event that the reader does not know (a newer engine's kind, an unknown medium);
            the events beside it are read. Writers ignore it.
    """

    ts: float
    events: Sequence[BlockEvent] = ()
    dp_rank: int | None = None
    skipped: Sequence[str] = ()


class Codec(Protocol):
    """One wire form of batches; the modules `vllm` and `sglang` are two."""

    def encode(self, batch: Batch, /) -> bytes:
        """The message. Raises `InvalidInput` for what the form cannot carry."""

    def decode(self, payload: bytes, /) -> Batch:
        """The batch. Raises `InvalidInput` for bytes that are not of this form."""


def to_event(event: BlockEvent, event_id: int, *, dp_rank: int = 0) -> Event:
    """The event as a router's index takes it; local hashes are computed from the token ids if they are not there.

    Args:
        event: as decoded.
        event_id: its number in the worker's stream.
        dp_rank: of the publisher.

    Raises:
        InvalidInput: token ids that do not fill the blocks, or without a block size.
    """
    data = event.data
    if isinstance(data, Stored) and data.token_ids and not data.local_hashes:
        data = structs.replace(data, local_hashes=_local_hashes(event, data))
    return Event(event_id, data, event.tier, dp_rank)


def from_event(
    event: Event, *, block_size: int, lora_name: str | None = None, cache_salt: str | None = None
) -> BlockEvent:
    """kvist's own event as a batch carries it: with token ids, from which readers compute the local hashes.

    Raises:
        InvalidInput: a block size below 1; local hashes that are not those of the token ids under this adapter
            and salt.
    """
    if block_size < 1:
        raise InvalidInput(f"block_size must be at least 1 token, got {block_size}")
    data = event.data
    if not isinstance(data, Stored):
        return BlockEvent(data, event.tier)
    told = BlockEvent(data, event.tier, block_size=block_size, lora_name=lora_name, cache_salt=cache_salt)
    if data.token_ids and data.local_hashes and (computed := _local_hashes(told, data)) != list(data.local_hashes):
        raise InvalidInput(
            f"local hashes must be those of the token ids with lora_name={lora_name!r} and cache_salt={cache_salt!r}: "
            f"expected {computed!r:.120}, got {list(data.local_hashes)!r:.120}"
        )
    return told


def split_tokens(token_ids: Sequence[int], count: int, block_size: int, extra: int = 0) -> list[Sequence[int]]:
    """A run's flat token ids as one sequence a block; each also holds the ``extra`` tokens that follow it.

    Raises:
        InvalidInput: their number is not ``count * block_size + extra``.
    """
    if len(token_ids) != count * block_size + extra:
        raise InvalidInput(
            f"a run of {count} blocks of {block_size} tokens must tell {count * block_size + extra} token ids, "
            f"got {len(token_ids)}"
        )
    return [token_ids[start : start + block_size + extra] for start in range(0, count * block_size, block_size)]


def join_tokens(stored: Stored, block_size: int | None) -> tuple[list[int], bool]:
    """A run's token ids in one list, and whether each block was told with the first token after it.

    Raises:
        InvalidInput: no block size; not as many blocks of token ids as hashes; a block of another length; blocks that
            do not agree on the token after.
    """
    blocks = stored.token_ids
    if blocks is None:
        return [], False
    if block_size is None or block_size < 1:
        raise InvalidInput(f"stored blocks need a block_size of at least 1 token, got {block_size}")
    if len(blocks) != len(stored.hashes):
        raise InvalidInput(f"{len(stored.hashes)} stored blocks must have token ids each, got {len(blocks)}")
    try:
        lengths = set(map(len, blocks))
    except TypeError:
        raise InvalidInput(f"token ids must be a sequence for each block, got {blocks!r:.120}") from None
    if not blocks or lengths == {block_size}:
        return list(chain.from_iterable(blocks)), False
    if lengths != {block_size + 1}:
        raise InvalidInput(f"each stored block must have {block_size} token ids, got {sorted(lengths)}")
    flat = list(chain.from_iterable(block[:block_size] for block in blocks))
    flat.append(blocks[-1][block_size])
    if any(flat[(index + 1) * block_size] != block[block_size] for index, block in enumerate(blocks)):
        raise InvalidInput("the token after a stored block must be the next block's first")
    return flat, True


def multimodal_hashes(extra_keys: Sequence[Sequence[Any] | None] | None) -> list[list[int]] | None:
    """Of each block the hashes of its multimodal objects, as Dynamo reads them out of vLLM's extra keys.

    An object's identifier has 64 hex digits, alone or with its offset; its hash is the first 16. Every other key says
    something else (adapter, salt, prompt embeddings).
    """
    if not extra_keys:
        return None
    return [[int(name[:16], 16) for name in map(_identifier, keys or ()) if name] for keys in extra_keys]


def _identifier(key: Any) -> str:
    name = key[0] if isinstance(key, (list, tuple)) and key else key
    if isinstance(name, str) and len(name) == 64 and set(name) <= _HEX_DIGITS:
        return name
    return ""


_HEX_DIGITS: Final = frozenset("0123456789abcdefABCDEF")


def _local_hashes(event: BlockEvent, stored: Stored) -> list[int]:
    flat, eagle = join_tokens(stored, event.block_size)
    return local_block_hashes(
        flat,
        event.block_size or 1,
        lora_name=event.lora_name or "",
        cache_namespace=event.cache_salt or "",
        multimodal=multimodal_hashes(event.extra_keys),
        eagle=eagle,
    )
