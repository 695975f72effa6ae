"""Files from strangers: headers that are no such thing, before anything is mapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvist.cartridge.shards import Shard, TensorEntry, content_checksum, not_finite, plan_shards, write_shard
from kvist.errors import DamagedCartridge, InvalidCartridge


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


HOSTILE: dict[str, tuple[object, bytes]] = {
    "no dtype": ({"a": {"shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24)),
    "more keys": ({"a": tensor(code="print()")}, bytes(24)),
    "other dtype": ({"a": tensor("F64", (1, 3))}, bytes(24)),
    "dtype of another type": ({"a": tensor(["F32"])}, bytes(24)),
    "shape of text": ({"a": tensor(shape="23")}, bytes(24)),
    "negative shape": ({"a": tensor(shape=(-2, -3))}, bytes(24)),
    "a float in the shape": ({"a": tensor(shape=(2.0, 3))}, bytes(24)),
    "true in the shape": ({"a": tensor(shape=(True, 6))}, bytes(24)),
    "a huge shape": ({"a": tensor(shape=(2**61, 2**61))}, bytes(24)),
    "a shape that wraps around": ({"a": tensor(shape=(2**32, 2**32, 6))}, bytes(24)),
    "many axes": ({"a": tensor(shape=(1,) * 9 + (6,))}, bytes(24)),
    "no elements": ({"a": tensor(shape=(0, 3), offsets=(0, 0))}, b""),
    "offsets too near": ({"a": tensor(offsets=(0, 20))}, bytes(24)),
    "offsets turned round": ({"a": tensor(offsets=(24, 0))}, bytes(24)),
    "negative offsets": ({"a": tensor(offsets=(-24, 0))}, bytes(24)),
    "one offset": ({"a": tensor(offsets=(24,))}, bytes(24)),
    "past the end": ({"a": tensor(offsets=(24, 48))}, bytes(24)),
    "a hole": ({"a": tensor(), "b": tensor(offsets=(28, 52))}, bytes(52)),
    "an overlap": ({"a": tensor(), "b": tensor(offsets=(20, 44))}, bytes(44)),
    "the same bytes twice": ({"a": tensor(), "b": tensor()}, bytes(24)),
    "bytes left over": ({"a": tensor()}, bytes(28)),
    "bytes missing": ({"a": tensor()}, bytes(20)),
    "a list": ([1], b""),
    "a tensor that is a number": ({"a": 5}, b""),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "b": tensor()}, bytes(24)),
    "metadata that is no object": ({"__metadata__": [1], "b": tensor()}, bytes(24)),
    "the same key twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":5}', bytes(4)),
    "NaN": (b'{"a":NaN}', b""),
    "not UTF-8": (b'{"\xff":1}', b""),
    "deep": (b"[" * 100_000, b""),
    "misaligned": ({"a": tensor("BF16", (1,), (0, 2)), "b": tensor("I64", (1,), (2, 10))}, bytes(10)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data = HOSTILE[case]
    with Shard(write(tmp_path / "x.safetensors", header, data)) as shard, pytest.raises(InvalidCartridge) as caught:
        shard.header()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**9, 3])
def test_a_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    with (
        Shard(write(tmp_path / "x.safetensors", {"a": tensor()}, bytes(24), length=length)) as shard,
        pytest.raises(InvalidCartridge),
    ):
        shard.header()


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, b"\0" * 8, b"\x80\x02}q\x00." + b"\0" * 30, b"PK\x03\x04" + b"\0" * 60]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with Shard(tmp_path / "x.safetensors") as shard, pytest.raises(InvalidCartridge):
        shard.header()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("none", ".", "loop"):
        with pytest.raises(DamagedCartridge):
            Shard(tmp_path / name)


def test_offsets_are_those_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"b": tensor(offsets=(24, 48)), "a": tensor()}, bytes(range(48)))
    with Shard(path) as shard:
        header = shard.header()
        base = path.stat().st_size - 48
        assert header["b"] == TensorEntry("F32", (2, 3), base + 24, base + 48)
        assert shard.tensor(header["b"]).view(torch.uint8).flatten().tolist() == list(range(24, 48))


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2, 4),
        "b": torch.arange(5),
        "c": torch.randn(7).bfloat16(),
        "d": torch.randn(2).half(),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with Shard(tmp_path / "x.safetensors") as shard:
        header = shard.header()
        assert {name: shard.tensor(entry).tolist() for name, entry in header.items()} == {
            name: value.tolist() for name, value in tensors.items()
        }


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), most=st.integers(1, 100))
def test_plans_keep_the_order_and_the_limit(sizes: list[int], most: int) -> None:
    tensors = {f"t{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    plans = plan_shards(tensors, most)
    assert [name for plan in plans for name in plan.tensors] == list(tensors)
    assert [plan.name for plan in plans] == sorted({plan.name for plan in plans})
    for plan in plans:
        assert len(plan.tensors) == 1 or sum(tensors[name].nbytes for name in plan.tensors) <= most


def test_a_written_file_is_the_size_and_digest_that_it_says(tmp_path: Path) -> None:
    tensors = {"layers.0.keys": torch.randn(5, 2, 3), "layers.0.values": torch.randn(5, 2, 3)}
    (plan,) = plan_shards(tensors, 10**9)
    entry = write_shard(tmp_path, plan, tensors)
    with Shard(tmp_path / plan.name) as shard:
        assert (shard.size, shard.sha256()) == (entry.size, entry.sha256)
        assert min(found.start for found in shard.header().values()) % 8 == 0


def test_the_checksum_tells_content_names_and_shapes_apart() -> None:
    base = torch.arange(12, dtype=torch.float32)
    variants = [
        {"a": base},
        {"b": base},
        {"a": base.view(3, 4)},
        {"a": base.view(torch.int64)},
        {"a": base, "b": base},
        {"b": base, "a": base},
        {"a": base + 1},
    ]
    assert len({content_checksum(variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_finite(dtype: torch.dtype) -> None:
    tensors = {"a": torch.zeros(5, 2, dtype=dtype), "ids": torch.arange(5), "b": torch.zeros(5, 2, dtype=dtype)}
    assert not_finite(tensors) is None
    tensors["b"][4, 1] = float("nan")
    assert not_finite(tensors) == "b"
    tensors["a"][0, 0] = float("inf")
    assert not_finite(tensors) == "a"
