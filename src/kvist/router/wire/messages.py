"""What vLLM's and SGLang's messages share: msgpack arrays ``[ts, [event, ...], rank]``, hashes, words for tiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Annotated, Any, Final

from msgspec import Meta, MsgspecError, Raw, Struct, convert
from msgspec.msgpack import Decoder, Encoder

from kvist.blocks.events import Tier
from kvist.errors import InvalidInput
from kvist.hashing.vllm import event_hash
from kvist.router.wire.base import MEDIA, U64, Batch, BlockEvent

TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]
Count = Annotated[int, Meta(ge=0)]
Hash = int | bytes
TAGS: Final = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})

_NOT_THIS_FORM: Final = (MsgspecError, RecursionError, UnicodeDecodeError)


class Message(Struct, array_like=True):
    """A batch whose events are not read yet. A field after the rank, of a newer engine, is not looked at."""

    ts: float
    events: list[Raw]
    dp_rank: Count | None = None


class Fields(Struct):
    """What an event says beside its data, of the types that readers expect."""

    block_size: Count | None
    lora_id: int | None
    lora_name: str | None
    cache_salt: str | None
    extra_keys: list[list[Any] | None] | None
    group: Count | None
    spec_kind: str | None
    sliding_window: Count | None
    locality: str | None


class _Head(Struct):
    ts: float
    dp_rank: Count | None


class _TaggedMap(Struct):
    type: str


class _TaggedArray(Struct, array_like=True):
    type: str


_MESSAGE: Final = Decoder(Message)
_ENCODER: Final = Encoder()
_TAGGED_MAP: Final = Decoder(_TaggedMap)
_TAGGED_ARRAY: Final = Decoder(_TaggedArray)


def read_batch(payload: bytes, form: str, read: Callable[[Raw, int], BlockEvent | str]) -> Batch:
    """The batch; ``read`` makes an event of its bytes and place, or a sentence if it is of a kind nobody knows.

    Raises:
        InvalidInput: other bytes, of which ``form`` is named as what was expected; and what ``read`` raises.
    """
    message = _read_message(payload, form)
    told = [read(raw, index) for index, raw in enumerate(message.events)]
    events = [event for event in told if isinstance(event, BlockEvent)]
    return Batch(message.ts, events, message.dp_rank, tuple(event for event in told if isinstance(event, str)))


def unknown_medium(medium: object, index: int) -> str:
    """What is said of an event on a tier that nobody knows."""
    return f"event {index}: unknown medium {medium!r:.80}"


def _read_message(payload: bytes, form: str) -> Message:
    """The batch, its events unread.

    Raises:
        InvalidInput: other bytes; ``form`` is named as what was expected.
    """
    try:
        message = _MESSAGE.decode(payload)
    except _NOT_THIS_FORM as error:
        raise InvalidInput(f"expected {form} [ts, events, rank] in msgpack, got {payload[:40]!r}: {error}") from None
    if not math.isfinite(message.ts):
        raise InvalidInput(f"expected {form} with a finite ts, got {message.ts}")
    return message


def is_map(raw: Raw) -> bool:
    """Whether an event is written as a map, not as an array."""
    first = memoryview(raw)[0]
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)


def read_event(raw: Raw, index: int, decoder: Decoder[Any]) -> Any | str:
    """One event, or the sentence that says why it is skipped: a kind that nobody knew when this was written.

    Raises:
        InvalidInput: a known kind with fields that cannot be right; no event at all.
    """
    try:
        return decoder.decode(raw)
    except _NOT_THIS_FORM as error:
        try:
            tag = (_TAGGED_MAP if is_map(raw) else _TAGGED_ARRAY).decode(raw).type
        except _NOT_THIS_FORM:
            tag = None
        if tag is None or tag in TAGS:
            raise InvalidInput(f"event {index}: expected {tag or 'a tagged event'}: {error}") from None
        return f"event {index}: unknown kind {tag!r:.80}"


def fold(value: Hash) -> int:
    """A block hash as an unsigned 64-bit integer.

    Negative integers are taken as two's complement; bytes as `kvist.hashing.vllm.event_hash` takes them.

    Raises:
        InvalidInput: fewer than 8 bytes.
    """
    return value & U64 if isinstance(value, int) else event_hash(value)


def fold_parent(value: Hash | None) -> int | None:
    """`fold`, or ``None`` at the root."""
    return None if value is None else fold(value)


def tier_of(medium: str | None) -> Tier | None:
    """The tier that a medium means; none told means the device; ``None`` for an unknown word."""
    return Tier.DEVICE if medium is None else MEDIA.get(medium.upper())


def checked_hashes(hashes: Iterable[int], parent: int | None = None) -> list[int]:
    """The hashes, all of them in [0, 2^64).

    Raises:
        InvalidInput: another value, here or in ``parent``; what is no integer.
    """
    values = _integers(hashes, "block hashes")
    told = values if parent is None else [*values, *_integers([parent], "a parent's hash")]
    if told and not (min(told) >= 0 and max(told) <= U64):
        wrong = next(value for value in told if not 0 <= value <= U64)
        raise InvalidInput(f"block hashes must be in [0, 2^64), got {wrong}")
    return values


def checked_tokens(token_ids: Iterable[int]) -> list[int]:
    """The token ids, all of them in [0, 2^32).

    Raises:
        InvalidInput: another value; what is no integer.
    """
    values = _integers(token_ids, "token ids")
    if values and not (min(values) >= 0 and max(values) < 1 << 32):
        raise InvalidInput(f"token ids must be in [0, 2^32), got {min(values)} to {max(values)}")
    return values


def checked_fields(event: BlockEvent) -> Fields:
    """What the event says beside its data.

    Raises:
        InvalidInput: a value that no reader would take.
    """
    try:
        return convert(event, Fields, from_attributes=True)
    except MsgspecError as error:
        raise InvalidInput(f"a {type(event.data).__name__} event cannot be written: {error}") from None


def _integers(values: Iterable[int], what: str) -> list[int]:
    """Plain integers, whatever kind of integers they were."""
    try:
        return list(map(int, map(index, values)))
    except TypeError:
        raise InvalidInput(f"{what} must be integers, got {values!r:.120}") from None


def write_message(batch: Batch, events: list[Any], form: str) -> bytes:
    """The batch with its events as they are written.

    Raises:
        InvalidInput: a time that is not finite; a rank that is no count; a value that msgpack has no form for.
    """
    try:
        head = convert(batch, _Head, from_attributes=True)
    except MsgspecError as error:
        raise InvalidInput(f"{form} cannot be written: {error}") from None
    if not math.isfinite(head.ts):
        raise InvalidInput(f"ts must be finite, got {head.ts}")
    try:
        return _ENCODER.encode([head.ts, events, head.dp_rank])
    except (MsgspecError, TypeError, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise InvalidInput(f"{form} has values that msgpack has no form for: {error}") from None


def unset_except(fields: Mapping[str, Any], form: str) -> None:
    """Refuse what a form has no place for.

    Raises:
        InvalidInput: a field that is set.
    """
    for name, value in fields.items():
        if value is not None:
            raise InvalidInput(f"{form} has no place for {name}, got {value!r:.80}")
