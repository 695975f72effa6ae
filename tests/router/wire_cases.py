"""Batches for the wire tests: as hypothesis draws them, and quick seeded ones for the fuzz."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from kvist.blocks.events import Cleared, Removed, Stored, Tier
from kvist.router.wire import Batch, BlockEvent

U64 = (1 << 64) - 1
hashes = st.integers(0, U64)
tokens = st.integers(0, 2**32 - 1)
parents = st.none() | hashes
ranks = st.none() | st.integers(0, 2**31)
times = st.floats(allow_nan=False, allow_infinity=False)
_names = st.none() | st.text(max_size=8)
_keys = st.lists(
    st.text(max_size=4) | st.binary(max_size=4) | st.tuples(st.text(max_size=4), st.integers(-9, 9)).map(list),
    max_size=3,
)


@st.composite
def _stored(draw: st.DrawFn, *, sglang: bool) -> BlockEvent:
    count, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    run = draw(st.lists(hashes, min_size=count, max_size=count))
    eagle = sglang and draw(st.booleans())
    flat = draw(st.lists(tokens, min_size=count * size + 1, max_size=count * size + 1))
    blocks = [flat[start : start + size + eagle] for start in range(0, count * size, size)]
    told = draw(st.booleans())
    fields: dict[str, Any] = {"tier": draw(st.sampled_from(Tier)), "lora_id": draw(st.none() | st.integers(0, 99))}
    if not sglang:
        fields |= {
            "lora_name": draw(_names),
            "cache_salt": draw(_names),
            "extra_keys": draw(st.none() | st.lists(st.none() | _keys, min_size=count, max_size=count)),
            "group": draw(st.none() | st.integers(0, 9)),
            "spec_kind": draw(st.none() | st.just("full_attention")),
            "sliding_window": draw(st.none() | st.integers(0, 4096)),
            "locality": draw(st.sampled_from([None, "LOCAL", "REMOTE"])),
        }
    data = Stored(run, draw(parents), token_ids=blocks if told else None)
    return BlockEvent(data, block_size=size if told else None, **fields)


@st.composite
def _removed(draw: st.DrawFn, *, sglang: bool) -> BlockEvent:
    data = Removed(draw(st.lists(hashes, max_size=5)))
    group, locality = (None, None) if sglang else (draw(st.none() | st.integers(0, 9)), draw(_names))
    return BlockEvent(data, draw(st.sampled_from(Tier)), group=group, locality=locality)


@st.composite
def batches(draw: st.DrawFn, name: str) -> Batch:
    """A batch that the named form can carry."""
    sglang = name == "sglang"
    event = _stored(sglang=sglang) | _removed(sglang=sglang) | st.just(BlockEvent(Cleared()))
    return Batch(draw(times), draw(st.lists(event, max_size=5)), draw(ranks))


def seeded_batch(rng: random.Random, name: str) -> Batch:
    """A small batch that the named form can carry, made quickly."""
    events = []
    for _ in range(rng.randrange(4)):
        count, size = rng.randrange(1, 4), rng.randrange(1, 5)
        run = [rng.getrandbits(64) for _ in range(count)]
        blocks = [[rng.getrandbits(32) for _ in range(size)] for _ in range(count)]
        stored = Stored(run, rng.choice([None, 7]), token_ids=blocks)
        events.append(
            rng.choice(
                [
                    BlockEvent(stored, rng.choice([*Tier]), block_size=size, **_seeded_fields(rng, name, count)),
                    BlockEvent(Removed(run), rng.choice([*Tier])),
                    BlockEvent(Cleared()),
                ]
            )
        )
    return Batch(rng.random(), events, rng.choice([None, 0, 3]))


def _seeded_fields(rng: random.Random, name: str, count: int) -> dict[str, Any]:
    if name == "sglang" or rng.random() < 0.3:
        return {"lora_id": rng.choice([None, 0, 3])}
    keys = [None, [], ["salt"], [f"{rng.getrandbits(256):064x}"], [["x", -1], b"\x01", 2.5], [{"a": [None]}]]
    return {
        "lora_name": rng.choice([None, "", "adapter"]),
        "cache_salt": rng.choice([None, "tenant"]),
        "extra_keys": rng.choice([None, [rng.choice(keys) for _ in range(count)]]),
        "group": rng.choice([None, 0, 7]),
        "spec_kind": rng.choice([None, "mamba"]),
        "sliding_window": rng.choice([None, 128]),
        "locality": rng.choice([None, "LOCAL"]),
    }


def mutated(payload: bytes, rng: random.Random) -> bytes:
    """The payload with a few bytes changed, cut out, put in or doubled."""
    data = bytearray(payload)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[place : place + 1] = bytes([rng.getrandbits(8)])
            case 1:
                data[place : place + rng.randrange(8)] = b""
            case 2:
                data[place:place] = rng.randbytes(rng.randrange(4))
            case 3:
                data[place:place] = data[place : place + rng.randrange(16)]
            case _:
                data[place : place + 1] = bytes([rng.choice([0x90, 0xC0, 0xC7, 0xD9, 0xDC, 0xDF, 0xFF, 0x80])])
    return bytes(data)
