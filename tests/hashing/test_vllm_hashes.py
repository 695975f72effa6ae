import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashing.cases import GOLDEN, IDENTIFIERS, ask_vllm, missing, vllm_cases, vllm_python
from kvist.errors import InvalidInput
from kvist.hashing import extend_block_hashes
from kvist.hashing.vllm import (
    ALGORITHMS,
    MultimodalItem,
    block_extra_keys,
    block_hashes,
    event_extra_keys,
    event_hash,
    none_hash,
)

pytest.importorskip("cbor2")
GOLDEN_CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["vllm"]
needs_vllm = pytest.mark.skipif(
    bool(missing(vllm_python(), "vllm")), reason=missing(vllm_python(), "vllm") or "KVIST_VLLM_PYTHON"
)


def check(case: dict[str, Any], result: dict[str, Any], *, tagged: bool) -> None:
    algorithm = case["algorithm"]
    lora_name, lora_path = case.get("lora", ("", ""))
    count = len(case["token_ids"]) // case["block_size"]
    keys = block_extra_keys(
        count,
        case["block_size"],
        lora_name=lora_name,
        lora_path=lora_path,
        cache_salt=case.get("salt", ""),
        multimodal=[MultimodalItem(*item) for item in case.get("multimodal", ())],
        tagged=tagged,
    )
    root = None if case["seed"] is None else none_hash(algorithm, seed=case["seed"])
    assert (root or none_hash(algorithm)).hex() == result["root"]
    found = block_hashes(case["token_ids"], case["block_size"], algorithm=algorithm, parent=root, extra_keys=keys)
    assert [value.hex() for value in found] == result["hashes"], case
    assert [event_hash(value) for value in found] == result["events"]
    told = event_extra_keys(keys) if tagged else keys
    assert json.loads(json.dumps(told)) == result["event_keys"]


def test_golden_figures_of_the_real_vllm() -> None:
    assert {case["algorithm"] for case in GOLDEN_CASES} == set(ALGORITHMS)
    for case in GOLDEN_CASES:
        check(case, case, tagged=True)


@needs_vllm
@pytest.mark.timeout(300)
def test_the_real_vllm_agrees(tmp_path: Path) -> None:
    cases = [*vllm_cases(seed=2, count=400), *GOLDEN_CASES]
    answer = ask_vllm(cases, tmp_path)
    compared = 0
    for case, result in zip(cases, answer["results"], strict=True):
        if case["seed"] is not None or answer["has_default_seed"]:
            check(case, result, tagged=answer["tagged"])
            compared += 1
    assert compared >= 200


def test_one_hash_by_hand() -> None:
    root = hashlib.sha256(pickle.dumps("vllm-none-hash", protocol=pickle.HIGHEST_PROTOCOL)).digest()
    assert none_hash() == root
    first = hashlib.sha256(pickle.dumps((root, (1, 2), None), protocol=pickle.HIGHEST_PROTOCOL)).digest()
    assert block_hashes([1, 2, 3], 2) == [first]
    assert event_hash(first) == int(first.hex()[-16:], 16)
    assert block_hashes([], 2) == block_hashes([1], 2) == []


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 5), st.integers(0, 8))
def test_a_chain_can_be_continued(ids: list[int], size: int, cut: int) -> None:
    whole = block_hashes(ids, size)
    cut = min(cut, len(whole))
    parent = whole[cut - 1] if cut else None
    assert whole[:cut] + block_hashes(ids[cut * size :], size, parent=parent) == whole


def test_where_extra_keys_lie() -> None:
    items = [MultimodalItem("a", 2, 4), MultimodalItem("b", 6, 1), MultimodalItem("c", 11, 9)]
    keys = block_extra_keys(4, 4, lora_name="l", lora_path="/l", cache_salt="s", multimodal=items)
    assert keys == [
        (("lora", "l", "/l"), ("mm", "a", 2), ("cache_salt", "s")),
        (("lora", "l", "/l"), ("mm", "a", -2), ("mm", "b", 2)),
        (("lora", "l", "/l"), ("mm", "c", 3)),
        (("lora", "l", "/l"), ("mm", "c", -1)),
    ]
    assert event_extra_keys(keys)[:2] == [("l", ("a", 2), "s"), ("l", ("a", -2), ("b", 2))]
    assert block_extra_keys(2, 4, multimodal=items[2:], tagged=False) == [None, None]
    assert event_extra_keys([None]) == [None]


def test_content_apart_hashes_apart() -> None:
    ids = list(range(8))
    salted, other = (
        block_hashes(ids, 4, extra_keys=block_extra_keys(2, 4, cache_salt=salt)) for salt in ("tenant-a", "tenant-b")
    )
    assert not {*salted, *other} & {*block_hashes(ids, 4)}
    assert not {*salted} & {*other}
    seen = block_hashes(ids, 4, extra_keys=block_extra_keys(2, 4, multimodal=[MultimodalItem(IDENTIFIERS[0], 5, 2)]))
    assert seen[0] == block_hashes(ids, 4)[0]
    assert seen[1] != block_hashes(ids, 4)[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: none_hash("md5"), "sha256, sha256_cbor, xxhash, xxhash_cbor; got 'md5'"),
        (lambda: block_hashes([1], 1, algorithm="md5"), "algorithm"),
        (lambda: block_hashes([1], 1, algorithm="xxhash"), "no default root"),
        (lambda: block_hashes([1], 0), "block_size"),
        (lambda: block_hashes([-1], 1), r"\[0, 2\^32\)"),
        (lambda: block_hashes(b"\1\0\0\0", 1), "token ids must be integers"),
        (lambda: block_hashes(b"abc", 1), "token ids must be integers"),
        (lambda: extend_block_hashes([], b"\1\0\0\0", 4), "token ids must be integers"),
        (lambda: block_extra_keys(-1, 1), "count"),
        (lambda: block_extra_keys(1, 0), "block_size"),
        (lambda: block_extra_keys(1, 4, multimodal=[MultimodalItem("a", 3, 4), MultimodalItem("b", 6, 1)]), "in order"),
        (lambda: block_extra_keys(1, 4, multimodal=[MultimodalItem("a", 3, -1)]), "in order"),
        (lambda: event_hash(b"1234567"), "at least 8 bytes"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        call()
