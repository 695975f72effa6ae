"""vLLM's event batches, as its ZeroMQ publisher sends them.

Written is the form of vLLM 0.28 to 0.32, which its own decoder and Dynamo 1.6.1 read: an array ``[ts, events, rank]``
with each event a map that has its kind under ``type``. Read is also the older form, each event an array with its kind
first. Fields and kinds of newer engines: fields are not looked at, kinds are named in `Batch.skipped`. The field
``cache_salt`` is not vLLM's own: its decoder passes it over, and Dynamo's takes it for the namespace.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import MsgspecError, Raw, Struct, convert, field
from msgspec.msgpack import Decoder

from kvist.blocks.events import Cleared, Removed, Stored, Tier
from kvist.errors import InvalidInput
from kvist.router.wire.base import Batch, BlockEvent, join_tokens, split_tokens
from kvist.router.wire.messages import (
    Count,
    Hash,
    TokenId,
    checked_fields,
    checked_hashes,
    checked_tokens,
    fold,
    fold_parent,
    is_map,
    read_batch,
    read_event,
    tier_of,
    unknown_medium,
    write_message,
)

_FORM: Final = "a vLLM event batch"
_MEDIUM: Final = {Tier.DEVICE: "GPU", Tier.HOST: "CPU", Tier.DISK: "STORAGE", Tier.EXTERNAL: "EXTERNAL"}


def _always_written() -> None:
    """The default of fields that vLLM's decoder wants to see: unlike a plain ``None``, it is not left out."""


class _Stored(Struct, tag="BlockStored", omit_defaults=True):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[TokenId]
    block_size: Count
    lora_id: int | None = field(default_factory=_always_written)
    medium: str | None = field(default_factory=_always_written)
    lora_name: str | None = field(default_factory=_always_written)
    extra_keys: list[list[Any] | None] | None = None
    group_idx: Count | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: Count | None = None
    locality: str | None = None
    cache_salt: str | None = None


class _Removed(Struct, tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[Hash]
    medium: str | None = field(default_factory=_always_written)
    group_idx: Count | None = None
    locality: str | None = None


class _Cleared(Struct, tag="AllBlocksCleared"):
    pass


class _StoredArray(Struct, tag="BlockStored", array_like=True):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[TokenId]
    block_size: Count
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    trailing_1: Any = None
    trailing_2: Any = None
    trailing_3: Any = None
    trailing_4: Any = None


class _RemovedArray(Struct, tag="BlockRemoved", array_like=True):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: Count | None = None


class _ClearedArray(Struct, tag="AllBlocksCleared", array_like=True):
    pass


class _Trailing(Struct):
    group_idx: Count | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: Count | None = None


_MAPS: Final = Decoder(_Stored | _Removed | _Cleared)
_ARRAYS: Final = Decoder(_StoredArray | _RemovedArray | _ClearedArray)


def decode(payload: bytes) -> Batch:
    """Read one message.

    Raises:
        InvalidInput: bytes that are no such batch, or an event of a known kind that cannot be right.
    """
    return read_batch(payload, _FORM, _read)


def encode(batch: Batch) -> bytes:
    """Write one message.

    Raises:
        InvalidInput: a hash outside 64 bits, a token id outside 32, token ids that do not fill the blocks, blocks told
            with the token after them, a field of another type than readers expect, a time that is not finite, a
            negative rank, a value that msgpack has no form for.
    """
    return write_message(batch, [_to_wire(event) for event in batch.events], _FORM)


def _read(raw: Raw, index: int) -> BlockEvent | str:
    event = read_event(raw, index, _MAPS if is_map(raw) else _ARRAYS)
    if isinstance(event, str):
        return event
    if isinstance(event, (_Cleared, _ClearedArray)):
        return BlockEvent(Cleared())
    if (tier := tier_of(event.medium)) is None:
        return unknown_medium(event.medium, index)
    if isinstance(event, _Stored):
        return _stored(event, tier, index)
    if isinstance(event, _StoredArray):
        return _stored(_from_array(event, index), tier, index)
    locality = event.locality if isinstance(event, _Removed) else None
    return BlockEvent(Removed(list(map(fold, event.block_hashes))), tier, group=event.group_idx, locality=locality)


def _stored(wire: _Stored, tier: Tier, index: int) -> BlockEvent:
    hashes = list(map(fold, wire.block_hashes))
    if wire.extra_keys is not None and len(wire.extra_keys) != len(hashes):
        raise InvalidInput(f"event {index}: expected extra keys for {len(hashes)} blocks, got {len(wire.extra_keys)}")
    tokens = None
    if wire.token_ids:
        if wire.block_size == 0:
            raise InvalidInput(f"event {index}: expected a block_size of at least 1 token, got 0")
        tokens = split_tokens(wire.token_ids, len(hashes), wire.block_size)
    return BlockEvent(
        Stored(hashes, fold_parent(wire.parent_block_hash), token_ids=tokens),
        tier,
        block_size=wire.block_size or None,
        lora_id=wire.lora_id,
        lora_name=wire.lora_name,
        cache_salt=wire.cache_salt,
        extra_keys=wire.extra_keys,
        group=wire.group_idx,
        spec_kind=wire.kv_cache_spec_kind,
        sliding_window=wire.kv_cache_spec_sliding_window,
        locality=wire.locality,
    )


def _from_array(wire: _StoredArray, index: int) -> _Stored:
    """The fields behind the extra keys moved between versions and publishers: they are told apart by their types."""
    trailing = [wire.trailing_1, wire.trailing_2, wire.trailing_3, wire.trailing_4]
    kinds = [value for value in trailing if isinstance(value, str)]
    numbers = [value for value in trailing if isinstance(value, int)]
    try:
        known = convert(
            {
                "group_idx": numbers[0] if numbers else None,
                "kv_cache_spec_kind": kinds[0] if kinds else None,
                "kv_cache_spec_sliding_window": numbers[1] if len(numbers) > 1 else None,
            },
            _Trailing,
        )
    except MsgspecError as error:
        raise InvalidInput(f"event {index}: expected a group and a window behind the extra keys: {error}") from None
    return _Stored(
        wire.block_hashes,
        wire.parent_block_hash,
        wire.token_ids,
        wire.block_size,
        wire.lora_id,
        wire.medium,
        wire.lora_name,
        wire.extra_keys,
        known.group_idx,
        known.kv_cache_spec_kind,
        known.kv_cache_spec_sliding_window,
    )


def _to_wire(event: BlockEvent) -> _Stored | _Removed | _Cleared:
    data = event.data
    medium = _MEDIUM[event.tier]
    if isinstance(data, Cleared):
        return _Cleared()
    fields = checked_fields(event)
    if isinstance(data, Removed):
        return _Removed([*checked_hashes(data.hashes)], medium, fields.group, fields.locality)
    hashes = checked_hashes(data.hashes, data.parent)
    tokens, eagle = join_tokens(data, fields.block_size)
    if eagle:
        raise InvalidInput("vLLM's form has no place for the token after each block")
    if fields.extra_keys is not None and len(fields.extra_keys) != len(hashes):
        raise InvalidInput(f"{len(hashes)} stored blocks must have extra keys each, got {len(fields.extra_keys)}")
    return _Stored(
        [*hashes],
        None if data.parent is None else int(data.parent),
        checked_tokens(tokens),
        fields.block_size or 0,
        fields.lora_id,
        medium,
        fields.lora_name,
        fields.extra_keys,
        fields.group,
        fields.spec_kind,
        fields.sliding_window,
        fields.locality,
        fields.cache_salt,
    )
