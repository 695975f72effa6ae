"""SGLang's event batches, as its ZeroMQ publisher sends them.

An array ``[ts, events, attention rank]`` with each event an array that has its kind first. Where SGLang runs EAGLE, a
token id is a pair: the token and the one after it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

from msgspec import Raw, Struct
from msgspec.msgpack import Decoder

from kvist.blocks.events import Cleared, Removed, Stored, Tier
from kvist.errors import InvalidInput
from kvist.router.wire.base import Batch, BlockEvent, join_tokens, split_tokens
from kvist.router.wire.messages import (
    Count,
    TokenId,
    checked_fields,
    checked_hashes,
    checked_tokens,
    fold,
    fold_parent,
    read_batch,
    read_event,
    tier_of,
    unknown_medium,
    unset_except,
    write_message,
)

_FORM: Final = "an SGLang event batch"
_MEDIUM: Final = {Tier.DEVICE: "GPU", Tier.HOST: "CPU_PINNED", Tier.DISK: "DISK", Tier.EXTERNAL: "EXTERNAL"}


class _Stored(Struct, tag="BlockStored", array_like=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[TokenId | list[TokenId]]  # pairs as lists: msgspec 0.22 crashes on a tuple beside a bounded int
    block_size: Count
    lora_id: int | None = None
    medium: str | None = None


class _Removed(Struct, tag="BlockRemoved", array_like=True):
    block_hashes: list[int]
    medium: str | None = None


class _Cleared(Struct, tag="AllBlocksCleared", array_like=True):
    pass


_EVENTS: Final = Decoder(_Stored | _Removed | _Cleared)


def decode(payload: bytes) -> Batch:
    """Read one message.

    Raises:
        InvalidInput: bytes that are no such batch, or an event of a known kind that cannot be right.
    """
    return read_batch(payload, _FORM, _read)


def encode(batch: Batch) -> bytes:
    """Write one message.

    Raises:
        InvalidInput: a hash outside 64 bits, a token id outside 32, token ids that do not fill the blocks, a field that
            SGLang's form has no place for, a field of another type than readers expect, a time that is not finite, a
            negative rank, a value that msgpack has no form for.
    """
    return write_message(batch, [_to_wire(event) for event in batch.events], _FORM)


def _read(raw: Raw, index: int) -> BlockEvent | str:
    event = read_event(raw, index, _EVENTS)
    if isinstance(event, str):
        return event
    if isinstance(event, _Cleared):
        return BlockEvent(Cleared())
    if (tier := tier_of(event.medium)) is None:
        return unknown_medium(event.medium, index)
    if isinstance(event, _Stored):
        return _stored(event, tier, index)
    return BlockEvent(Removed(list(map(fold, event.block_hashes))), tier)


def _stored(wire: _Stored, tier: Tier, index: int) -> BlockEvent:
    hashes = list(map(fold, wire.block_hashes))
    tokens = None
    if wire.token_ids:
        if wire.block_size == 0:
            raise InvalidInput(f"event {index}: expected a block_size of at least 1 token, got 0")
        flat, extra = _flat(wire.token_ids, index)
        tokens = split_tokens(flat, len(hashes), wire.block_size, extra)
    return BlockEvent(
        Stored(hashes, fold_parent(wire.parent_block_hash), token_ids=tokens),
        tier,
        block_size=wire.block_size or None,
        lora_id=wire.lora_id,
    )


def _flat(token_ids: list[Any], index: int) -> tuple[list[int], int]:
    pairs = sum(isinstance(token, list) for token in token_ids)
    if pairs == 0:
        return token_ids, 0
    if pairs != len(token_ids) or any(len(pair) != 2 for pair in token_ids):
        raise InvalidInput(f"event {index}: expected token ids or pairs of them, got {token_ids!r:.120}")
    flat = [first for first, _ in token_ids]
    flat.append(token_ids[-1][1])
    if any(after != flat[place + 1] for place, (_, after) in enumerate(token_ids)):
        raise InvalidInput(f"event {index}: expected each pair to end with the next one's first token")
    return flat, 1


def _to_wire(event: BlockEvent) -> _Stored | _Removed | _Cleared:
    data = event.data
    unset_except(
        {
            "lora_name": event.lora_name,
            "cache_salt": event.cache_salt,
            "extra_keys": event.extra_keys,
            "group": event.group,
            "spec_kind": event.spec_kind,
            "sliding_window": event.sliding_window,
            "locality": event.locality,
        },
        "SGLang's form",
    )
    if isinstance(data, Cleared):
        return _Cleared()
    if isinstance(data, Removed):
        return _Removed(checked_hashes(data.hashes), _MEDIUM[event.tier])
    fields = checked_fields(event)
    hashes = checked_hashes(data.hashes, data.parent)
    flat, eagle = join_tokens(data, fields.block_size)
    tokens = checked_tokens(flat)
    told: list[Any] = list(pairwise(tokens)) if eagle else tokens
    return _Stored(
        hashes,
        None if data.parent is None else int(data.parent),
        told,
        fields.block_size or 0,
        fields.lora_id,
        _MEDIUM[event.tier],
    )
