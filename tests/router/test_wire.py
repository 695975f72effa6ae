"""What holds for every form: round trips, typed errors, what meets kvist's own events."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.blocks.events import Cleared, Event, Removed, Stored, Tier
from kvist.errors import InvalidInput
from kvist.hashing import local_block_hashes
from kvist.router.wire import CODECS, Batch, BlockEvent, codec, dynamo, from_event, to_event
from kvist.router.wire.base import multimodal_hashes
from router.wire_cases import batches, hashes, mutated, parents, ranks, seeded_batch

FORMS = [*CODECS]


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    batch = data.draw(batches(name))
    payload = codec(name).encode(batch)
    assert codec(name).decode(payload) == batch
    assert codec(name).encode(codec(name).decode(payload)) == payload


@pytest.mark.parametrize("name", FORMS)
def test_ten_thousand_broken_payloads(name: str) -> None:
    rng = random.Random(f"wire {name}")
    form = codec(name)
    read = refused = 0
    for number in range(10_000):
        payload = form.encode(seeded_batch(rng, name))
        payload = rng.randbytes(rng.randrange(64)) if number % 4 == 0 else mutated(payload, rng)
        try:
            batch = form.decode(payload)
        except InvalidInput as error:
            assert str(error)
            refused += 1
            continue
        read += 1
        again = form.encode(batch)
        assert form.encode(form.decode(again)) == again, payload
    assert read > 500
    assert refused > 3000


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x91" * 100_000, b"\x93\x01\x90", b"\x92\xcb", b"\x83\x01\x02"])
def test_bytes_of_no_batch(name: str, payload: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"expected an? (vLLM|SGLang) event batch \[ts, events, rank\] in msgpack"):
        codec(name).decode(payload)


def _stored(**fields: Any) -> BlockEvent:
    return BlockEvent(Stored(**{"hashes": [1, 2], "token_ids": [[1, 2], [3, 4]]} | fields), block_size=2)


def _lora(number: int) -> BlockEvent:
    return BlockEvent(Stored([1]), lora_id=number)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch(float("nan")), "finite"),
        (Batch(0.0, dp_rank=-1), "dp_rank"),
        (Batch(0.0, dp_rank=1.5), "dp_rank"),  # type: ignore[arg-type]
        (Batch("now"), "ts"),  # type: ignore[arg-type]
        (Batch(0.0, [_lora(1 << 64)]), "msgpack has no form for"),
        (Batch(0.0, [_stored(hashes=[1, 1 << 64])]), r"\[0, 2\^64\), got 18446744073709551616"),
        (Batch(0.0, [_stored(parent=-1)]), r"\[0, 2\^64\), got -1"),
        (Batch(0.0, [BlockEvent(Removed([-1]))]), r"\[0, 2\^64\)"),
        (Batch(0.0, [_stored(token_ids=[[1, 2], [3, 1 << 32]])]), r"\[0, 2\^32\), got 1 to 4294967296"),
        (Batch(0.0, [_stored(token_ids=[[1, 2]])]), "2 stored blocks must have token ids each, got 1"),
        (Batch(0.0, [_stored(token_ids=[[1, 2], [3]])]), "must have 2 token ids"),
        (Batch(0.0, [_stored(token_ids=[[1, 2, 9], [3, 4, 5]])]), "next block's first"),
        (Batch(0.0, [BlockEvent(Stored([1], token_ids=[[1]]))]), "block_size of at least 1 token, got None"),
        (Batch(0.0, [BlockEvent(Removed([1.5]))]), r"block hashes must be integers, got \[1\.5\]"),  # type: ignore[list-item]
        (Batch(0.0, [BlockEvent(Removed("ab"))]), "block hashes must be integers, got 'ab'"),  # type: ignore[arg-type]
        (Batch(0.0, [_stored(parent="a")]), "parent's hash must be integers"),
        (Batch(0.0, [_stored(token_ids=[[1, 2], [3, 1.0]])]), "token ids must be integers"),
        (Batch(0.0, [_stored(token_ids=[1, 2])]), r"token ids must be a sequence for each block, got \[1, 2\]"),
        (Batch(0.0, [_lora("a")]), "lora_id"),  # type: ignore[arg-type]
        (Batch(0.0, [BlockEvent(Stored([1]), block_size=-1)]), "block_size"),
    ],
)
def test_what_no_form_can_carry(name: str, batch: Batch, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        codec(name).encode(batch)


@pytest.mark.parametrize("name", FORMS)
def test_integers_of_other_kinds_are_written_as_integers(name: str) -> None:
    class Odd:
        def __index__(self) -> int:
            return 1

    odd: Any = Odd()
    batch = Batch(0.0, [_stored(hashes=[odd, True], parent=True, token_ids=[[odd, 2], [3, True]])])
    plain = Batch(0.0, [_stored(hashes=[1, 1], parent=1, token_ids=[[1, 2], [3, 1]])])
    assert codec(name).encode(batch) == codec(name).encode(plain)


def test_forms_go_by_name() -> None:
    with pytest.raises(InvalidInput, match="one of vllm, sglang; got 'trt'"):
        codec("trt")


def test_local_hashes_come_from_token_ids() -> None:
    ids = list(range(8))
    event = BlockEvent(Stored([5, 6], 4, token_ids=[ids[:4], ids[4:]]), Tier.HOST, block_size=4)
    assert to_event(event, 3, dp_rank=2) == Event(
        3, Stored([5, 6], 4, local_block_hashes(ids, 4), [ids[:4], ids[4:]]), Tier.HOST, 2
    )
    named = BlockEvent(event.data, block_size=4, lora_name="a", cache_salt="t")
    told = to_event(named, 0).data
    assert isinstance(told, Stored)
    assert told.local_hashes == local_block_hashes(ids, 4, lora_name="a", cache_namespace="t")
    eagle = BlockEvent(Stored([5, 6], token_ids=[[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]), block_size=4)
    told = to_event(eagle, 0).data
    assert isinstance(told, Stored)
    assert told.local_hashes == local_block_hashes(range(9), 4, eagle=True)


def test_what_is_told_is_kept() -> None:
    told = Stored([5], None, [77], [[1, 2]])
    assert to_event(BlockEvent(told, block_size=2), 0).data is told
    assert to_event(BlockEvent(Removed([1]), Tier.DISK), 9) == Event(9, Removed([1]), Tier.DISK)
    placeholder = BlockEvent(Stored([5]), Tier.HOST)
    assert placeholder.is_placeholder
    assert to_event(placeholder, 0).data is placeholder.data
    assert not BlockEvent(told).is_placeholder
    assert not BlockEvent(Cleared()).is_placeholder
    with pytest.raises(InvalidInput, match="block_size"):
        to_event(BlockEvent(Stored([5], token_ids=[[1]])), 0)


def test_multimodal_hashes_are_read_from_extra_keys() -> None:
    name = "00000000deadbeef" + "0" * 48
    keys = [None, [name, "salt", ["x", 1]], [[name, -4], b"\x01" * 64, name[:-1]], [[], 5]]
    assert multimodal_hashes(keys) == [[], [0xDEADBEEF], [0xDEADBEEF], []]
    assert multimodal_hashes(None) is multimodal_hashes([]) is None
    event = BlockEvent(Stored([1], token_ids=[[1, 2, 3, 4]]), block_size=4, extra_keys=[[[name, 0]]])
    told = to_event(event, 0).data
    assert isinstance(told, Stored)
    assert told.local_hashes == [15207512089340001072], "as Dynamo hashes that block"


def test_own_events_go_out() -> None:
    names = {"lora_name": "a", "cache_salt": "t"}
    local = local_block_hashes([1, 2, 3, 4], 2, lora_name="a", cache_namespace="t")
    stored = Stored([5, 6], None, local, [[1, 2], [3, 4]])
    out = from_event(Event(0, stored, Tier.DISK), block_size=2, **names)
    assert out == BlockEvent(stored, Tier.DISK, block_size=2, **names)
    for other in ({}, {"lora_name": "a"}, {"cache_salt": "t"}):
        with pytest.raises(InvalidInput, match="local hashes must be those of the token ids with lora_name="):
            from_event(Event(0, stored), block_size=2, **other)
    assert from_event(Event(1, Removed([5]), Tier.HOST), block_size=2) == BlockEvent(Removed([5]), Tier.HOST)
    assert from_event(Event(2, Cleared()), block_size=2) == BlockEvent(Cleared())
    with pytest.raises(InvalidInput, match="at least 1 token, got 0"):
        from_event(Event(0, stored), block_size=0)


# Dynamo's JSON


@st.composite
def _events(draw: st.DrawFn, *, tiers: bool) -> Event:
    run = draw(st.lists(hashes, max_size=5))
    local = draw(st.lists(hashes, min_size=len(run), max_size=len(run)))
    data = draw(st.sampled_from([Stored(run, draw(parents), local), Removed(run), Cleared()]))
    tier = draw(st.sampled_from(Tier)) if tiers else Tier.DEVICE
    return Event(draw(hashes), data, tier, draw(ranks) or 0)


@given(_events(tiers=False), _events(tiers=True), hashes)
def test_dynamo_round_trip(event: Event, routed: Event, worker: int) -> None:
    assert dynamo.decode_event(dynamo.encode_event(event)) == event
    assert dynamo.decode_router_event(dynamo.encode_router_event(worker, routed)) == (worker, routed)


def test_dynamo_forms() -> None:
    block = b'{"block_hash":100,"tokens_hash":7,"mm_extra_info":null}'
    stored = b'{"event_id":0,"data":{"stored":{"parent_hash":null,"start_position":null,"blocks":[' + block + b"]}}}"
    assert dynamo.decode_event(stored) == Event(0, Stored([100], None, [7]))
    assert dynamo.decode_event(b'{"event_id":1,"data":{"removed":{"block_hashes":[100]}},"dp_rank":2}') == Event(
        1, Removed([100]), dp_rank=2
    )
    assert dynamo.encode_event(Event(2, Cleared())) == b'{"event_id":2,"data":"cleared","dp_rank":0}'
    routed = b'{"worker_id":3,"storage_tier":"host_pinned","residency_domain":"worker","event":' + stored + b"}"
    assert dynamo.decode_router_event(routed) == (3, Event(0, Stored([100], None, [7]), Tier.HOST))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"event_id":0}',
        b'{"event_id":-1,"data":"cleared"}',
        b'{"event_id":18446744073709551616,"data":"cleared"}',
        b'{"event_id":0,"data":"wiped"}',
        b'{"event_id":0,"data":{}}',
        b'{"event_id":0,"data":{"moved":{}}}',
        b'{"event_id":0,"data":{"removed":{"block_hashes":[-1]}}}',
        b'{"event_id":0,"data":{"removed":{"block_hashes":[18446744073709551616]}}}',
        b'{"event_id":0,"data":{"removed":{"block_hashes":[]},"stored":{"parent_hash":null,"blocks":[]}}}',
        b'{"event_id":0,"data":{"stored":{"parent_hash":null,"blocks":[{"block_hash":1}]}}}',
    ],
)
def test_dynamo_refuses(payload: bytes) -> None:
    with pytest.raises(InvalidInput):
        dynamo.decode_event(payload)
    with pytest.raises(InvalidInput):
        dynamo.decode_router_event(b'{"worker_id":1,"event":' + payload + b"}")


def test_dynamo_needs_local_hashes_and_a_workers_cache() -> None:
    with pytest.raises(InvalidInput, match="2 stored blocks must have a local hash each, got 1"):
        dynamo.encode_event(Event(0, Stored([1, 2], None, [1])))
    with pytest.raises(InvalidInput, match="worker_id"):
        dynamo.encode_router_event(-1, Event(0, Cleared()))
    for odd in (1.5, "1", None):
        with pytest.raises(InvalidInput, match="block_hash must be an integer"):
            dynamo.encode_event(Event(0, Removed([odd])))  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="residency_domain must be 'worker', got 'shared'"):
        dynamo.decode_router_event(
            b'{"worker_id":1,"residency_domain":"shared","event":{"event_id":0,"data":"cleared"}}'
        )


def test_ten_thousand_broken_dynamo_events() -> None:
    rng = random.Random("wire dynamo")
    read = refused = 0
    for number in range(10_000):
        run = [rng.getrandbits(64) for _ in range(rng.randrange(4))]
        event = Event(number, rng.choice([Stored(run, rng.choice([None, 3]), run), Removed(run), Cleared()]))
        payload = dynamo.encode_router_event(1, event)
        payload = rng.randbytes(rng.randrange(64)) if number % 8 == 0 else mutated(payload, rng)
        try:
            worker, found = dynamo.decode_router_event(payload)
        except InvalidInput:
            refused += 1
            continue
        read += 1
        assert dynamo.decode_router_event(dynamo.encode_router_event(worker, found)) == (worker, found)
    assert read > 500
    assert refused > 3000
