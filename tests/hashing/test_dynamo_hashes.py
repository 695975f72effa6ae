import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from hashing.cases import GOLDEN, ask_dynamo, dynamo_cases, dynamo_python, missing
from kvist.errors import InvalidInput
from kvist.hashing import (
    LineageLayout,
    decode_lineage,
    encode_lineage,
    local_block_hashes,
    sequence_hashes,
)

U64 = (1 << 64) - 1
GOLDEN_CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["dynamo"]
hashes64 = st.integers(0, U64)
needs_dynamo = pytest.mark.skipif(
    bool(missing(dynamo_python(), "dynamo")), reason=missing(dynamo_python(), "dynamo") or "KVIST_DYNAMO_PYTHON"
)


def ours(case: dict[str, Any]) -> list[int]:
    return local_block_hashes(**{name: value for name, value in case.items() if name != "hashes"})


@pytest.mark.parametrize(
    ("token_ids", "block_size", "options", "expected"),
    [
        ([1, 2, 3, 4], 4, {}, [14643705804678351452]),
        (range(16), 16, {}, [15310707395893867146]),
        (range(35), 16, {}, [15310707395893867146, 15292316782987903195]),
        ([1, 2, 3, 4], 4, {"lora_name": "adapter-a"}, [11381080598872079209]),
        ([1, 2, 3, 4], 4, {"cache_namespace": "tenant"}, [17621909411505482860]),
        ([1, 2, 3, 4], 4, {"lora_name": "adapter-a", "cache_namespace": "tenant"}, [8318905480525516325]),
        ([0, 4294967295, 7, 8], 4, {}, [5663792021667389480]),
        (range(33), 16, {"eagle": True}, [11423441316381344367, 6554946393898374776]),
        ([1, 2, 3, 4] * 3, 4, {"multimodal": [[], [0xDEADBEEF]]}, [14643705804678351452, 15207512089340001072, None]),
    ],
)
def test_known_hashes(token_ids: Any, block_size: int, options: dict[str, Any], expected: list[int | None]) -> None:
    found = local_block_hashes(token_ids, block_size, **options)
    assert len(found) == len(expected)
    assert all(want in (None, have) for have, want in zip(found, expected, strict=True))


def test_golden_figures_of_the_real_dynamo() -> None:
    assert len(GOLDEN_CASES) == 20
    for case in GOLDEN_CASES:
        assert ours(case) == case["hashes"], case


@pytest.mark.parametrize(
    ("token_ids", "options", "said"),
    [
        (b"\1\0\0\0", {}, "token ids must be integers"),
        (bytearray(3), {}, "token ids must be integers"),
        ("a", {}, "token ids must be integers"),
        ([1], {"multimodal": [[1, "a"]]}, "hashes of multimodal objects must be integers"),
        ([1], {"multimodal": [None]}, "hashes of multimodal objects must be integers"),
        ([1], {"multimodal": [b"12345678"]}, "hashes of multimodal objects must be integers"),
        ([1], {"lora_name": "\ud800"}, "lora_name must be text that UTF-8 can write"),
        ([1], {"cache_namespace": "\ud800"}, "cache_namespace must be text that UTF-8 can write"),
    ],
)
def test_what_has_no_hash(token_ids: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        local_block_hashes(token_ids, 1, **options)
    with pytest.raises(InvalidInput, match="local hashes must be integers"):
        sequence_hashes(b"12345678")


@needs_dynamo
def test_the_real_dynamo_agrees() -> None:
    cases = dynamo_cases(seed=2, count=400)
    *fresh, _ = answers = ask_dynamo([*cases, *GOLDEN_CASES])
    for case, hashes in zip(cases, fresh, strict=False):
        assert ours(case) == hashes, case
    assert answers[len(cases) :] == [case["hashes"] for case in GOLDEN_CASES]


def test_a_block_without_its_last_token_has_no_hash() -> None:
    assert local_block_hashes([], 4) == []
    assert local_block_hashes([1, 2, 3], 4) == []
    assert local_block_hashes([1, 2, 3, 4], 4, eagle=True) == [], "EAGLE needs the token after the block, too"
    assert len(local_block_hashes([1, 2, 3, 4, 5], 4, eagle=True)) == 1


def test_the_order_of_objects_in_a_block_does_not_matter() -> None:
    assert local_block_hashes([1], 1, multimodal=[[5, 9, 7]]) == local_block_hashes([1], 1, multimodal=[[9, 7, 5]])
    assert local_block_hashes([1], 1, multimodal=[[5]]) != local_block_hashes([1], 1, multimodal=[[5, 5]])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: local_block_hashes([1], 0), "at least 1 token, got 0"),
        (lambda: local_block_hashes([-1], 1), r"\[0, 2\^32\)"),
        (lambda: local_block_hashes([1 << 32], 1), r"\[0, 2\^32\)"),
        (lambda: local_block_hashes(["a"], 1), r"\[0, 2\^32\)"),  # type: ignore[list-item]
        (lambda: local_block_hashes([1], 1, multimodal=[[1 << 64]]), "multimodal"),
        (lambda: sequence_hashes([-1]), r"\[0, 2\^64\)"),
        (lambda: sequence_hashes([1], seed=-1), "seed"),
        (lambda: sequence_hashes([1], parent=1 << 64), "parent"),
        (lambda: encode_lineage(1, None, 1 << 24), r"\[0, 2\^24\), got 16777216"),
        (lambda: encode_lineage(1, None, -1), r"\[0, 2\^24\)"),
        (lambda: encode_lineage(1 << 64, None, 0), "current"),
        (lambda: encode_lineage(1, -1, 0), "parent"),
        (lambda: decode_lineage(1 << 128), r"\[0, 2\^128\)"),
        (lambda: decode_lineage(3 << 126), "got 3"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        call()


def test_sequence_hashes_chain() -> None:
    first, second = local_block_hashes(range(32), 16)
    chain = sequence_hashes([first, second])
    joined = first.to_bytes(8, "little") + second.to_bytes(8, "little")
    assert chain == [first, xxh3_64_intdigest(joined, 1337)]
    assert sequence_hashes([first, second], seed=0) == [first, xxh3_64_intdigest(joined, 0)]
    assert sequence_hashes([]) == sequence_hashes([], parent=5) == []


@given(st.lists(hashes64, min_size=1, max_size=40), st.data())
def test_a_chain_can_be_continued(local: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(local)))
    head = sequence_hashes(local[:cut])
    assert head + sequence_hashes(local[cut:], parent=head[-1]) == sequence_hashes(local)


@pytest.mark.parametrize(
    ("position", "mode", "fragment", "kept", "parent_bits"),
    [(0, 0, 59, 59, 54), (255, 0, 59, 55, 54), (256, 1, 55, 55, 46), (65535, 1, 55, 51, 46), (65536, 2, 51, 51, 38)],
)
def test_lineage_bits(position: int, mode: int, fragment: int, kept: int, parent_bits: int) -> None:
    packed = encode_lineage(U64, U64, position)
    assert packed >> 126 == mode
    assert packed & ((1 << fragment) - 1) == (1 << kept) - 1, "as many bits as the next position stores of its parent"
    assert decode_lineage(packed) == (position, (1 << kept) - 1, (1 << fragment) - 1)
    whole = encode_lineage(U64, U64, position, layout=LineageLayout.CURRENT64)
    assert whole >> 126 == mode
    assert decode_lineage(whole, layout=LineageLayout.CURRENT64) == (position, U64, (1 << parent_bits) - 1)


def test_lineage_of_known_blocks() -> None:
    assert encode_lineage(0x1, None, 0) == 1
    assert encode_lineage(0xA, 0xB, 1) == 1 << 118 | 0xB << 59 | 0xA
    assert encode_lineage(0xA, 0xB, 256) == 1 << 126 | 256 << 110 | 0xB << 55 | 0xA
    assert encode_lineage(0xA, 0xB, (1 << 24) - 1) == 2 << 126 | ((1 << 24) - 1) << 102 | 0xB << 51 | 0xA
    assert encode_lineage(0xA, 0xB, 1, layout=LineageLayout.CURRENT64) == 1 << 118 | 0xA << 54 | 0xB


@given(hashes64, hashes64, hashes64, st.integers(0, (1 << 24) - 2))
def test_a_child_names_its_parent(first: int, block: int, child: int, position: int) -> None:
    parent = decode_lineage(encode_lineage(block, first, position))
    told = decode_lineage(encode_lineage(child, block, position + 1))
    assert (parent.position, told.position, told.parent) == (position, position + 1, parent.current)
    layout = LineageLayout.CURRENT64
    parent = decode_lineage(encode_lineage(block, first, position, layout=layout), layout=layout)
    told = decode_lineage(encode_lineage(child, block, position + 1, layout=layout), layout=layout)
    assert (parent.current, told.current) == (block, child)
    assert told.parent & 0x3FFFFFFFFF == block & 0x3FFFFFFFFF, "38 bits are kept at any position"


@pytest.mark.parametrize("boundary", [255, 65535])
def test_fragments_agree_across_a_change_of_mode(boundary: int) -> None:
    for position in range(boundary - 2, boundary + 3):
        parent = decode_lineage(encode_lineage(U64 - 5, None, position))
        child = decode_lineage(encode_lineage(1, U64 - 5, position + 1))
        assert child.parent == parent.current, position
