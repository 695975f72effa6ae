"""The forms of each engine, as they lie on the wire."""

from typing import Any

import msgspec
import pytest

from kvist.blocks.events import Cleared, Removed, Stored, Tier
from kvist.errors import InvalidInput
from kvist.router.wire import Batch, BlockEvent, codec, sglang, to_event, vllm


def packed(*events: Any, rank: Any = None) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), rank])


def one(payload: bytes, form: Any = vllm) -> BlockEvent:
    batch: Batch = form.decode(payload)
    assert batch.skipped == ()
    [event] = batch.events
    return event


RUN = {"block_hashes": [1, 2], "parent_block_hash": 9, "token_ids": [1, 2, 3, 4], "block_size": 2}
STORED = Stored([1, 2], 9, token_ids=[[1, 2], [3, 4]])


def test_what_vllm_writes() -> None:
    batch = Batch(
        1.5,
        [
            BlockEvent(STORED, Tier.HOST, block_size=2, lora_name="a", group=0, extra_keys=[None, ["a", ["x", -1]]]),
            BlockEvent(Removed([1 << 63])),
            BlockEvent(Cleared()),
        ],
        3,
    )
    assert msgspec.msgpack.decode(vllm.encode(batch)) == [
        1.5,
        [
            {
                "type": "BlockStored",
                **RUN,
                "lora_id": None,
                "medium": "CPU",
                "lora_name": "a",
                "extra_keys": [None, ["a", ["x", -1]]],
                "group_idx": 0,
            },
            {"type": "BlockRemoved", "block_hashes": [1 << 63], "medium": "GPU"},
            {"type": "AllBlocksCleared"},
        ],
        3,
    ]


def test_the_rank_is_always_written() -> None:
    for name in ("vllm", "sglang"):
        assert msgspec.msgpack.decode(codec(name).encode(Batch(0.0))) == [0.0, [], None]


def test_vllm_array_form() -> None:
    row = ["BlockStored", *RUN.values()]
    assert one(packed(row)) == BlockEvent(STORED, block_size=2)
    assert one(packed([*row, 4, "CPU", "a"])) == BlockEvent(STORED, Tier.HOST, block_size=2, lora_id=4, lora_name="a")
    keys = [["a"], None]
    head = [*row, None, "GPU", None, keys]
    told = BlockEvent(STORED, block_size=2, extra_keys=keys)
    assert one(packed(head)) == told
    grouped = msgspec.structs.replace(told, group=1, spec_kind="sliding_window", sliding_window=64)
    assert one(packed([*head, 1, "sliding_window", 64])) == grouped
    assert one(packed([*head, [None, None], 1, "sliding_window", 64])) == grouped, "Dynamo's own publishers"
    assert one(packed([*head, None, 1, "sliding_window", 64, "later", {"still": 1}])) == grouped
    assert one(packed(["BlockRemoved", [3]])) == BlockEvent(Removed([3]))
    assert one(packed(["BlockRemoved", [3], "DISK", 1, "later"])) == BlockEvent(Removed([3]), Tier.DISK, group=1)
    assert one(packed(["AllBlocksCleared"])) == BlockEvent(Cleared())
    with pytest.raises(InvalidInput, match="event 0: expected a group and a window"):
        vllm.decode(packed([*head, -1]))


def test_salts_are_told_as_dynamo_reads_them() -> None:
    event = one(packed({"type": "BlockStored", **RUN, "cache_salt": "tenant-a"}))
    assert event == BlockEvent(STORED, block_size=2, cache_salt="tenant-a")
    assert one(vllm.encode(Batch(0.0, [event]))) == event
    told = to_event(BlockEvent(Stored([1], token_ids=[[12] * 4]), block_size=4, cache_salt="tenant-a"), 0).data
    assert isinstance(told, Stored)
    assert told.local_hashes == [9216624574865151389], "as Dynamo hashes that block"


def test_newer_fields_are_not_looked_at() -> None:
    event = {"type": "BlockStored", **RUN, "ownership": "tier", "session_id": "s", "later": [[{}]]}
    assert one(packed(event)) == BlockEvent(STORED, block_size=2)
    assert vllm.decode(msgspec.msgpack.encode([1, [], 2, "later", {}])) == Batch(1.0, [], 2)
    assert vllm.decode(msgspec.msgpack.encode([1, []])) == Batch(1.0, []), "the rank may be absent"


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_unknown_kinds_and_media_are_told(name: str) -> None:
    batch = codec(name).decode(packed(["BlockMoved", 1], ["BlockRemoved", [3], "TAPE"], ["BlockRemoved", [4]]))
    assert batch.events == [BlockEvent(Removed([4]))]
    assert batch.skipped == ("event 0: unknown kind 'BlockMoved'", "event 1: unknown medium 'TAPE'")


def test_an_unknown_kind_in_a_map_is_told() -> None:
    assert vllm.decode(packed({"type": "BlockMoved"})).skipped == ("event 0: unknown kind 'BlockMoved'",)


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        (None, Tier.DEVICE),
        ("GPU", Tier.DEVICE),
        ("DEVICE", Tier.DEVICE),
        ("CPU", Tier.HOST),
        ("CPU_PINNED", Tier.HOST),
        ("CPU_TIER1", Tier.HOST),
        ("CPU_TIER2", Tier.DISK),
        ("DISK", Tier.DISK),
        ("NVME", Tier.DISK),
        ("STORAGE", Tier.DISK),
        ("FS", Tier.DISK),
        ("EXTERNAL", Tier.EXTERNAL),
        ("NETWORK", Tier.EXTERNAL),
        ("REMOTE", Tier.EXTERNAL),
        ("SHARED", Tier.EXTERNAL),
        ("OBJ", Tier.EXTERNAL),
        ("gpu", Tier.DEVICE),
    ],
)
def test_media(medium: str | None, tier: Tier) -> None:
    for form in (vllm, sglang):
        assert one(packed(["BlockRemoved", [3], medium]), form).tier is tier


def test_hashes_are_unsigned_however_they_are_written() -> None:
    written = [-1, 1, (1 << 64) - 1, b"\xaa" * 24 + b"\x80" + b"\x00" * 7, b"\x00" * 15 + b"\x05"]
    assert one(packed(["BlockRemoved", written])) == BlockEvent(Removed([(1 << 64) - 1, 1, (1 << 64) - 1, 1 << 63, 5]))
    run = RUN | {"block_hashes": [-2, 2], "parent_block_hash": b"\x01" * 32}
    data = one(packed({"type": "BlockStored", **run})).data
    assert isinstance(data, Stored)
    assert (data.hashes, data.parent) == ([(1 << 64) - 2, 2], 0x0101010101010101)
    with pytest.raises(InvalidInput, match="at least 8 bytes"):
        vllm.decode(packed(["BlockRemoved", [b"1234567"]]))


def test_a_placeholder_names_blocks_alone() -> None:
    event = one(packed({"type": "BlockStored", **RUN, "token_ids": [], "block_size": 0, "medium": "CPU"}))
    assert event == BlockEvent(Stored([1, 2], 9), Tier.HOST)
    assert event.is_placeholder


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (5, "event 0: expected a tagged event"),
        ([], "event 0: expected a tagged event"),
        ({}, "event 0: expected a tagged event"),
        ({"type": 7}, "event 0: expected a tagged event"),
        ({"type": "BlockStored"}, "event 0: expected BlockStored"),
        (["BlockStored", [1]], "event 0: expected BlockStored"),
        (["BlockRemoved", ["x"]], "event 0: expected BlockRemoved"),
        (["BlockRemoved", [1.0]], "event 0: expected BlockRemoved"),
        ({"type": "BlockStored", **RUN, "token_ids": [1, -2]}, "event 0: expected BlockStored"),
        ({"type": "BlockStored", **RUN, "token_ids": [1, 1 << 32]}, "event 0: expected BlockStored"),
        ({"type": "BlockStored", **RUN, "token_ids": [1, 2, 3]}, "2 blocks of 2 tokens must tell 4 token ids, got 3"),
        ({"type": "BlockStored", **RUN, "block_size": 0}, "block_size of at least 1 token, got 0"),
        ({"type": "BlockStored", **RUN, "block_size": -2}, "event 0: expected BlockStored"),
        ({"type": "BlockStored", **RUN, "extra_keys": [None]}, "extra keys for 2 blocks, got 1"),
        ({"type": "BlockStored", **RUN, "extra_keys": 5}, "event 0: expected BlockStored"),
    ],
)
def test_known_kinds_that_cannot_be_right(event: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        vllm.decode(packed(event))


@pytest.mark.parametrize("rank", [-1, 1.5, "0"])
def test_ranks_are_counts(rank: Any) -> None:
    for form in (vllm, sglang):
        with pytest.raises(InvalidInput, match="event batch"):
            form.decode(packed(rank=rank))


def test_what_vllms_form_has_no_place_for() -> None:
    for odd in ({"group": -1}, {"sliding_window": 1.5}, {"lora_name": 5}, {"cache_salt": b"a"}, {"extra_keys": ["ab"]}):
        with pytest.raises(InvalidInput, match=f"cannot be written: .*{next(iter(odd))}"):
            vllm.encode(Batch(0.0, [BlockEvent(STORED, block_size=2, **odd)]))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"cannot be written: .*group"):
        vllm.encode(Batch(0.0, [BlockEvent(Removed([1]), group=-1)]))
    with pytest.raises(InvalidInput, match="token after each block"):
        vllm.encode(Batch(0.0, [BlockEvent(Stored([1], token_ids=[[1, 2, 3]]), block_size=2)]))
    for odd in (object(), "\ud800", 1 << 64):
        with pytest.raises(InvalidInput, match="msgpack has no form for"):
            vllm.encode(Batch(0.0, [BlockEvent(STORED, block_size=2, extra_keys=[None, [odd]])]))
    with pytest.raises(InvalidInput, match="2 stored blocks must have extra keys each, got 1"):
        vllm.encode(Batch(0.0, [BlockEvent(STORED, block_size=2, extra_keys=[None])]))


def test_what_sglang_writes() -> None:
    batch = Batch(
        1.5,
        [BlockEvent(STORED, Tier.HOST, block_size=2, lora_id=4), BlockEvent(Removed([1])), BlockEvent(Cleared())],
        0,
    )
    assert msgspec.msgpack.decode(sglang.encode(batch)) == [
        1.5,
        [
            ["BlockStored", [1, 2], 9, [1, 2, 3, 4], 2, 4, "CPU_PINNED"],
            ["BlockRemoved", [1], "GPU"],
            ["AllBlocksCleared"],
        ],
        0,
    ]


def test_sglang_older_and_newer() -> None:
    row = ["BlockStored", *RUN.values()]
    assert one(packed([*row, None]), sglang) == BlockEvent(STORED, block_size=2), "before it told media"
    assert one(packed([*row, None, "CPU_PINNED", {"metadata": 1}]), sglang) == BlockEvent(
        STORED, Tier.HOST, block_size=2
    )
    assert sglang.decode(msgspec.msgpack.encode([1.0, []])) == Batch(1.0, [])


def test_sglang_pairs_are_blocks_with_the_token_after() -> None:
    pairs = [[1, 2], [2, 3], [3, 4], [4, 5]]
    row = ["BlockStored", [1, 2], None, pairs, 2, None, "GPU"]
    event = one(packed(row), sglang)
    assert event == BlockEvent(Stored([1, 2], token_ids=[[1, 2, 3], [3, 4, 5]]), block_size=2)
    assert msgspec.msgpack.decode(sglang.encode(Batch(1.0, [event]))) == [1.0, [row], None]
    for wrong in ([[1, 2], [9, 3], [3, 4], [4, 5]], [1, [2, 3], [3, 4], [4, 5]], [[1, 2, 3]] * 4, [[]] * 4):
        with pytest.raises(InvalidInput, match="event 0: expected"):
            sglang.decode(packed(["BlockStored", [1, 2], None, wrong, 2]))
    with pytest.raises(InvalidInput, match="must tell 5 token ids, got 4"):
        sglang.decode(packed(["BlockStored", [1, 2], None, pairs[:3], 2]))


def test_what_sglangs_form_has_no_place_for() -> None:
    for field in (
        {"lora_name": "a"},
        {"cache_salt": "a"},
        {"extra_keys": [None, None]},
        {"group": 0},
        {"locality": "LOCAL"},
    ):
        with pytest.raises(InvalidInput, match=f"SGLang's form has no place for {next(iter(field))}"):
            sglang.encode(Batch(0.0, [BlockEvent(STORED, block_size=2, **field)]))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="block_size of at least 1 token, got 0"):
        sglang.decode(packed(["BlockStored", [1], None, [1], 0]))
    with pytest.raises(InvalidInput, match="event 0"):
        sglang.decode(packed({"type": "AllBlocksCleared"}))


def test_a_claimed_length_is_not_believed() -> None:
    for form in (vllm, sglang):
        with pytest.raises(InvalidInput):
            form.decode(b"\x93\xcb" + b"\0" * 8 + b"\xdd\xff\xff\xff\xff")
        with pytest.raises(InvalidInput):
            form.decode(packed(["BlockRemoved", [1]])[:-3] + b"\xdd\xff\xff\xff\xff")
