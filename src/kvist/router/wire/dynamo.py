"""Dynamo's events as JSON: what its ``RadixTree.apply_event`` takes, and the ``RouterEvent`` around it.

Rules: NVIDIA Dynamo 1.6.1. Blocks are told by block hash and by ``tokens_hash`` (kvist's local hash), never by tokens.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

from msgspec import Meta, MsgspecError, Struct
from msgspec.json import Decoder, Encoder

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored, Tier
from kvist.errors import InvalidInput
from kvist.router.wire.base import U64

_Natural = Annotated[int, Meta(ge=0)]
_T = TypeVar("_T")


class _Block(Struct, gc=False):
    block_hash: _Natural
    tokens_hash: _Natural


class _Stored(Struct):
    parent_hash: _Natural | None
    blocks: list[_Block]


class _Removed(Struct):
    block_hashes: list[_Natural]


class _Data(Struct, omit_defaults=True):
    stored: _Stored | None = None
    removed: _Removed | None = None


class _Event(Struct):
    event_id: _Natural
    data: _Data | str
    dp_rank: _Natural = 0


class _RouterEvent(Struct):
    worker_id: _Natural
    event: _Event
    storage_tier: Tier = Tier.DEVICE
    residency_domain: str = "worker"


_EVENT: Final = Decoder(_Event)
_ROUTER_EVENT: Final = Decoder(_RouterEvent)
_ENCODER: Final = Encoder()


def encode_event(event: Event) -> bytes:
    """One event. Its tier is not told: `encode_router_event` tells it.

    Raises:
        InvalidInput: stored blocks without a local hash each; a hash or number outside [0, 2^64).
    """
    return _ENCODER.encode(_to_wire(event))


def decode_event(payload: bytes) -> Event:
    """One event, on the device tier. Positions and multimodal details are not looked at.

    Raises:
        InvalidInput: bytes that are no such event.
    """
    return _from_wire(_decode(_EVENT, payload, "a Dynamo event"), Tier.DEVICE)


def encode_router_event(worker_id: int, event: Event) -> bytes:
    """One event with its worker and tier.

    Raises:
        InvalidInput: see `encode_event`; a worker id outside [0, 2^64).
    """
    return _ENCODER.encode(_RouterEvent(_u64(worker_id, "worker_id"), _to_wire(event), event.tier))


def decode_router_event(payload: bytes) -> tuple[int, Event]:
    """The worker's id, and the event on its tier.

    Raises:
        InvalidInput: bytes that are no such event, or one of another domain than a worker's own cache.
    """
    wire = _decode(_ROUTER_EVENT, payload, "a Dynamo router event")
    if wire.residency_domain != "worker":
        raise InvalidInput(f"residency_domain must be 'worker', got {wire.residency_domain!r:.80}")
    return _u64(wire.worker_id, "worker_id"), _from_wire(wire.event, wire.storage_tier)


def _decode(decoder: Decoder[_T], payload: bytes, what: str) -> _T:
    try:
        return decoder.decode(payload)
    except (MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"expected {what} in JSON, got {payload[:80]!r}: {error}") from None


def _to_wire(event: Event) -> _Event:
    return _Event(_u64(event.event_id, "event_id"), _data_to_wire(event.data), _u64(event.dp_rank, "dp_rank"))


def _data_to_wire(data: EventData) -> _Data | str:
    if isinstance(data, Cleared):
        return "cleared"
    if isinstance(data, Removed):
        return _Data(removed=_Removed([_u64(value, "block_hash") for value in data.hashes]))
    if len(data.local_hashes) != len(data.hashes):
        raise InvalidInput(
            f"{len(data.hashes)} stored blocks must have a local hash each, got {len(data.local_hashes)}"
        )
    blocks = [
        _Block(_u64(value, "block_hash"), _u64(local, "tokens_hash"))
        for value, local in zip(data.hashes, data.local_hashes, strict=True)
    ]
    parent = None if data.parent is None else _u64(data.parent, "parent_hash")
    return _Data(stored=_Stored(parent, blocks))


def _from_wire(wire: _Event, tier: Tier) -> Event:
    return Event(_u64(wire.event_id, "event_id"), _data_from_wire(wire.data), tier, _u64(wire.dp_rank, "dp_rank"))


def _data_from_wire(wire: _Data | str) -> EventData:
    if wire == "cleared":
        return Cleared()
    if isinstance(wire, str) or (wire.stored is None) == (wire.removed is None):
        raise InvalidInput(f"data must be one of 'cleared', stored, removed; got {wire!r:.120}")
    if wire.removed is not None:
        return Removed(_not_above(wire.removed.block_hashes, "block_hash"))
    stored = wire.stored
    assert stored is not None
    return Stored(
        _not_above([block.block_hash for block in stored.blocks], "block_hash"),
        None if stored.parent_hash is None else _u64(stored.parent_hash, "parent_hash"),
        _not_above([block.tokens_hash for block in stored.blocks], "tokens_hash"),
    )


def _not_above(naturals: list[int], name: str) -> list[int]:
    """These, which are known to be integers of 0 or more."""
    if naturals and max(naturals) > U64:
        raise InvalidInput(f"{name} must be in [0, 2^64), got {max(naturals)}")
    return naturals


def _u64(value: int, name: str) -> int:
    if type(value) is not int:
        raise InvalidInput(f"{name} must be an integer, got {value!r:.80}")
    if not 0 <= value <= U64:
        raise InvalidInput(f"{name} must be in [0, 2^64), got {value}")
    return value
