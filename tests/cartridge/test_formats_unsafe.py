"""Checkpoints that would run code, or take all memory, if they were read by running them."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvist.cartridge.formats import read_checkpoint
from kvist.errors import DamagedCartridge, InvalidCartridge, UnsafeCheckpoint

from .checkpoints import FROZEN, is_same, sample, trainable


@pytest.fixture
def pt(tmp_path: Path) -> Path:
    return tmp_path / "cartridge.pt"


def rewritten(
    data: bytes, change: Callable[[str, bytes], tuple[str, bytes] | None], method: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive with other records, and checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for info in old.infolist():
            changed = change(info.filename, old.read(info))
            if changed is not None:
                new.writestr(*changed)
    return buffer.getvalue()


def with_pickle(pt: Path, program: bytes) -> Path:
    """A checkpoint whose pickle is another."""
    torch.save(trainable(sample()), pt)
    data = rewritten(pt.read_bytes(), lambda name, old: (name, program if name.endswith("/data.pkl") else old))
    pt.write_bytes(data)
    return pt


class Runs:
    """Pickles as the call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        function, *arguments = self.call
        return function, tuple(arguments)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that is there as soon as some code has run."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


# -- code --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (eval, "eval"),
        (exec, "exec"),
        (open, "open"),
        (getattr, "getattr"),
        (__import__, "__import__"),
        (bytearray, "bytearray"),
        (torch.load, r"torch\.serialization\.load"),
        (torch.hub.load, r"torch\.hub\.load"),
        (torch.Tensor, "Tensor"),
        (torch.nn.Linear, "Linear"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_code_is_refused_by_its_name(function: Any, name: str, protocol: int, pt: Path, canary: Path) -> None:
    call = Runs(function, f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w')")
    torch.save(trainable(sample()) | {"more": call}, pt, pickle_protocol=protocol)
    with pytest.raises(UnsafeCheckpoint, match=name) as caught:
        read_checkpoint(pt)
    assert caught.value.hint is not None


class Cache:
    """A class of a checkpoint's author."""

    def __init__(self) -> None:
        self.trainable_keys = [torch.zeros(1, 2, 3, 4)]


def test_objects_are_refused_by_their_class(pt: Path) -> None:
    for tree in (Cache(), {"cache": Cache()}, {**trainable(sample()), "config": Cache()}, nn.Linear(2, 2)):
        torch.save(tree, pt)
        with pytest.raises(UnsafeCheckpoint, match=r"test_formats_unsafe\.Cache|Linear"):
            read_checkpoint(pt)


PROGRAMS: dict[str, bytes] = {
    "inst": b"\x80\x02(S'touch CANARY'\niposix\nsystem\n.",
    "obj": b"\x80\x02(cposix\nsystem\nS'touch CANARY'\no.",
    "global": b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00touch CANARY\x85R.",
    "global by its nested name": b"\x80\x04\x8c\x05torch\x8c\x0eserialization.os\x93.",
    "stack global of a list": b"\x80\x04]\x8c\x06system\x93.",
    "newobj of a function": b"\x80\x02cposix\nsystem\n)\x81.",
    "newobj_ex": b"\x80\x04ctorch.nn.modules.container\nParameterList\n)}\x92.",
    "extension registry": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02X\x06\x00\x00\x00systemQ.",
    "build of a global": b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",
    "call of a list": b"\x80\x02])R.",
    "call of a result": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
    "reduce of ParameterList": b"\x80\x02ctorch.nn.modules.container\nParameterList\n)R.",
    "text opcode": b"\x80\x02I1\n.",
    "nothing": b"",
    "stop alone": b".",
    "no stop": b"\x80\x02}",
    "mark alone": b"\x80\x02(",
    "unpaired items": b"\x80\x02}(X\x01\x00\x00\x00au.",
    "key of a tuple": b"\x80\x02})K\x01s.",
    "items of a tuple": b"\x80\x02)K\x01a.",
    "absent memo": b"\x80\x02h\x05.",
    "text beyond the end": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "text of a huge length": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "name without an end": b"\x80\x02ctorch",
    "no utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_torch_does_not_write(name: str, pt: Path, canary: Path) -> None:
    program = PROGRAMS[name].replace(b"CANARY", os.fsencode(canary))
    with pytest.raises(InvalidCartridge, match=str(pt)):
        read_checkpoint(with_pickle(pt, program))


def _tensor(offset: bytes, shape: bytes, strides: bytes, storage: bytes = b"FloatStorage", key: bytes = b"0") -> bytes:
    """A program that describes one tensor. Arguments are opcodes."""
    said = b"(X\x07\x00\x00\x00storagectorch\n" + storage + b"\nX" + struct.pack("<I", len(key)) + key
    said += b"X\x03\x00\x00\x00cpuK\xf0tQ"
    return b"\x80\x02]ctorch._utils\n_rebuild_tensor_v2\n(" + said + offset + shape + strides + b"\x89NtRa."


def _long(number: int) -> bytes:
    data = number.to_bytes(32, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (_tensor(_long(-1), b"K\x01\x85", b"K\x01\x85"), "counts"),
        (_tensor(_long(1 << 70), b"K\x01\x85", b"K\x01\x85"), "counts"),
        (_tensor(b"K\x00", _long(-4) + b"\x85", b"K\x01\x85"), "counts"),
        (_tensor(b"K\x00", b"K\x04\x85", _long(-1) + b"\x85"), "counts"),
        (_tensor(b"K\x00", _long(1 << 61) + b"\x85", b"K\x01\x85"), "reaches out"),
        (_tensor(b"K\x00", _long(1 << 61) + b"\x85", b"K\x00\x85"), "more than once"),
        (_tensor(b"K\x00", _long(1 << 61) + _long(1 << 61) + b"\x86", b"K\x00K\x00\x86"), "more than once"),
        (_tensor(b"K\xf0", b"K\x01\x85", b"K\x01\x85"), "reaches out"),
        (_tensor(b"K\x00", b"K\x04\x85", b"K\x01K\x01\x86"), "2 strides"),
        (_tensor(b"K\x00", b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"), "8 axes"),
        (_tensor(b"\x88", b"K\x01\x85", b"K\x01\x85"), "counts"),
        (_tensor(b"K\x00", b"]", b"K\x01\x85"), "counts"),
        (_tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85", b"DoubleStorage"), "storage '0' has"),
        (_tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85", key=b"99"), "storage '99' has None bytes"),
        (_tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85", key=b"../../../etc/passwd"), "has None bytes"),
        (_tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85", b"Size"), "no storage"),
    ],
)
def test_tensors_that_lie_outside_their_storage(program: bytes, message: str, pt: Path) -> None:
    with pytest.raises(InvalidCartridge, match=message):
        read_checkpoint(with_pickle(pt, program))


def test_deep_and_wide_values_take_no_time(pt: Path) -> None:
    """A tuple of tuples 400,000 deep as a key overflows the stack when it is hashed; doubled ones take for ever."""
    deep = b"\x80\x02" + b")" + b"\x85" * 400_000 + b"."
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b"."
    itself = b"\x80\x02]q\x00h\x00a."
    itself_in_a_dict = b"\x80\x02}q\x00X\x05\x00\x00\x00cacheh\x00s."
    for program in (deep, doubled, itself, itself_in_a_dict):
        with pytest.raises(InvalidCartridge):
            read_checkpoint(with_pickle(pt, program))
    with pytest.raises(InvalidCartridge, match="a key of a dict"):
        read_checkpoint(with_pickle(pt, b"\x80\x02})" + b"\x85" * 400_000 + b"Ns."))


def test_lists_of_parameters_that_are_none(pt: Path) -> None:
    head = b"\x80\x02ctorch.nn.modules.container\nParameterList\n)\x81"
    for state in (
        b"N",
        b"}",
        b"}X\x0b\x00\x00\x00_parameters]s",
        b"}X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x000K\x01ss",
    ):
        with pytest.raises(InvalidCartridge, match="parameters"):
            read_checkpoint(with_pickle(pt, head + state + b"b."))


def test_parameters_must_be_numbered(pt: Path) -> None:
    tree = trainable(sample(), kind=lambda items: nn.ParameterList(map(nn.Parameter, items)))
    named = tree["trainable_keys"]._parameters
    named["7"] = named.pop("2")
    torch.save(tree, pt)
    with pytest.raises(InvalidCartridge, match="not numbered from 0 on"):
        read_checkpoint(pt)


# -- other containers --------------------------------------------------------------------------------------------


def test_a_bare_pickle(pt: Path, canary: Path) -> None:
    for protocol in range(2, 6):
        pt.write_bytes(pickle.dumps({"trainable_keys": Runs(os.system, f"touch {canary}")}, protocol=protocol))
        with pytest.raises(UnsafeCheckpoint, match="bare pickle"):
            read_checkpoint(pt)


def test_the_format_before_torch_1_6(pt: Path) -> None:
    torch.save(trainable(sample()), pt, _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidCartridge, match=r"before 1\.6") as caught:
        read_checkpoint(pt)
    assert "weights_only=True" in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_program(pt: Path) -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(str(pt))
    with pytest.raises(UnsafeCheckpoint, match="TorchScript"):
        read_checkpoint(pt)


# -- zip files ---------------------------------------------------------------------------------------------------


def zipped(pt: Path, method: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(pt, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name.replace("__", "/"), data)
    return pt


def test_a_compressed_record_is_refused_before_it_is_read(pt: Path) -> None:
    """A zip bomb: 64 MiB in 64 KiB."""
    zipped(pt, zipfile.ZIP_DEFLATED, a__data__0=bytes(64 << 20), **{"a/data.pkl": b"\x80\x02]."})
    assert pt.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(InvalidCartridge, match="compressed"):
        read_checkpoint(pt)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


AMPLIFIED = """
import resource, sys
from kvist.cartridge.formats import read_checkpoint
from kvist.errors import InvalidCartridge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_checkpoint(sys.argv[1])
except InvalidCartridge as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_tensor_that_a_file_names_often_takes_its_memory_once(pt: Path) -> None:
    """Two bytes of pickle each, 2 MiB of memory each: 800 MiB, and with three megabytes hundreds of GiB."""
    large, sink = torch.zeros(1, 2, 8192, 32), torch.zeros(1, 2, 1, 32)
    names = ("trainable_keys", "trainable_values", "frozen_keys", "frozen_values")
    torch.save(dict(zip(names, ([large] * 200, [large] * 200, [sink] * 200, [sink] * 200), strict=True)), pt)
    assert pt.stat().st_size < 3 << 20
    ran = subprocess.run([sys.executable, "-c", AMPLIFIED, str(pt)], capture_output=True, text=True, check=True)
    message, grown = ran.stdout.splitlines()
    assert "more than once" in message
    assert int(grown) < 100 << 10


def test_tensors_that_lie_over_the_same_bytes_are_refused(pt: Path) -> None:
    whole = torch.randn(3, 2, 8, 4)
    values = [torch.randn(1, 2, 8, 4) for _ in range(4)]
    torch.save({"key_cache": [whole[n : n + 1] for n in (0, 1, 1, 1)], "value_cache": values}, pt)
    with pytest.raises(InvalidCartridge, match="more than once over the 768 bytes") as caught:
        read_checkpoint(pt)
    assert caught.value.hint is not None


def test_tensors_may_share_a_storage_and_be_named_elsewhere(pt: Path) -> None:
    """As views of one tensor are saved; a file may also hold the same for a program of its own."""
    whole = torch.randn(4, 1, 2, 8, 4)
    tree = {"key_cache": [whole[0], whole[1]], "value_cache": [whole[2], whole[3]]}
    torch.save(tree | {"best": tree["key_cache"], "all": whole}, pt)
    imported = read_checkpoint(pt)
    assert torch.equal(imported.layers[1][1], whole[3][0].transpose(0, 1))


@pytest.mark.parametrize("key", [-1, 1 << 31, (1 << 61) - 1, -(1 << 61) + 1, 10 << 61])
def test_integer_keys_that_can_share_a_hash_are_refused(key: int, pt: Path) -> None:
    """Multiples of 2^61-1 have one hash: a dict of them takes a time that grows with the square of their number."""
    with_pickle(pt, pickle.dumps({key: None}, protocol=2))
    with pytest.raises(InvalidCartridge, match="2\\^31"):
        read_checkpoint(pt)


def test_a_storage_of_bytes_that_are_no_elements(pt: Path) -> None:
    """Of an untyped storage the pickle says the bytes, and the tensor says the type."""
    storage = b"(X\x07\0\0\0storagectorch.storage\nUntypedStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x07tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + b"K\0(K\x01K\x01K\x01K\x01t(K\x01K\x01K\x01K\x01t"
    tensor += b"\x89ccollections\nOrderedDict\n)Rctorch\nfloat32\ntR"
    program = b"\x80\x02](" + tensor + tensor + b"\x86e."
    zipped(pt, zipfile.ZIP_STORED, a__data__0=bytes(7), **{"a/data.pkl": program})
    with pytest.raises(InvalidCartridge, match="has 7 bytes, expected a multiple of 4"):
        read_checkpoint(pt)


def test_records_that_overlap_are_refused(pt: Path) -> None:
    """A zip bomb without compression: a thousand names for the same bytes."""
    torch.save(trainable(sample()), pt)
    data = pt.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = max(archive.infolist(), key=lambda info: info.file_size)
        start = archive.start_dir
    buffer = io.BytesIO(data[:start])
    with zipfile.ZipFile(buffer, "a") as archive:
        for number in range(1000):
            info = zipfile.ZipInfo(f"cartridge/data/{number}")
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = first.file_size
            archive.filelist.append(info)
        archive._didModify = True  # type: ignore[attr-defined]
        archive.start_dir = start
    pt.write_bytes(buffer.getvalue())
    with pytest.raises(InvalidCartridge):
        read_checkpoint(pt)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "records",
    [
        {"data.pkl": b"\x80\x02]."},
        {"a/data.pkl": b"\x80\x02].", "b/data.pkl": b"\x80\x02]."},
        {"a/b/data.pkl": b"\x80\x02]."},
        {"a/data": b""},
        {"a/data.pkl": b"\x80\x02].", "a/byteorder": b"big"},
        {"a/data.pkl": b"\x80\x02].", "a/byteorder": b"x" * 1000},
    ],
)
def test_archives_that_torch_does_not_write(records: dict[str, bytes], pt: Path) -> None:
    with pytest.raises(InvalidCartridge, match=str(pt)):
        read_checkpoint(zipped(pt, **records))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(pt: Path) -> None:
    """Readers differ in which of the two they take."""
    with zipfile.ZipFile(pt, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02].")
        archive.writestr("a/data.pkl", b"\x80\x02}.")
    with pytest.raises(InvalidCartridge, match="each name once"):
        read_checkpoint(pt)


def test_too_large_a_pickle(pt: Path) -> None:
    with pytest.raises(InvalidCartridge, match=r"data\.pkl has 2,097,152 bytes"):
        read_checkpoint(zipped(pt, **{"a/data.pkl": bytes(2 << 20)}))


def test_too_long_a_list_of_records(pt: Path) -> None:
    """Said at the end of the file, and refused before the list is read."""
    torch.save(trainable(sample()), pt)
    data = bytearray(rewritten(pt.read_bytes(), lambda name, one: (name, one)))  # torch writes a zip64 end at any size
    assert data[-22:-18] == b"PK\x05\x06"
    data[-10:-6] = struct.pack("<I", 64 << 20)
    pt.write_bytes(data)
    with pytest.raises(InvalidCartridge, match="list of records has 67,108,864 bytes"):
        read_checkpoint(pt)


def test_a_large_file_has_another_end(pt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 4 GiB the sizes lie in a zip64 record; written here at any size."""
    torch.save(trainable(sample()), pt)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 0)
    data = rewritten(pt.read_bytes(), lambda name, one: (name, one))
    assert b"PK\x06\x06" in data
    pt.write_bytes(data)
    assert is_same(read_checkpoint(pt), sample())


def test_a_flipped_bit_in_the_numbers_is_found(pt: Path) -> None:
    """By the zip file's own checksum, which `torch.load` does not look at."""
    layers = sample()
    torch.save(trainable(layers), pt)
    data = bytearray(pt.read_bytes())
    number = bytes(layers[1][0][FROZEN:].transpose(0, 1).contiguous().view(torch.uint8).numpy().tobytes()[:64])
    place = data.index(number)
    data[place] ^= 1
    pt.write_bytes(data)
    with pytest.raises(DamagedCartridge, match="CRC"):
        read_checkpoint(pt)


def test_a_checksum_that_is_not_of_a_record(pt: Path) -> None:
    torch.save(trainable(sample()), pt)
    data = pt.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        crc = struct.pack("<I", zlib.crc32(archive.read("cartridge/data/3")))
    pt.write_bytes(data.replace(crc, b"\0\0\0\0"))
    with pytest.raises(DamagedCartridge, match="data/3"):
        read_checkpoint(pt)


# -- safetensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"a": 5},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U9", "shape": [1], "data_offsets": [0, 4]}},
        {
            "trainable_keys.0": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "trainable_keys": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"a.b.c.d.e.f.g.h.i.j": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_headers_of_safetensors(header: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    end = max((item["data_offsets"][1] for item in header.values() if isinstance(item, dict)), default=0)
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    with pytest.raises(InvalidCartridge, match=r"a\.safetensors"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_header_of_safetensors_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidCartridge, match="header"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_no_regular_file(tmp_path: Path) -> None:
    """A pipe would wait for its writer."""
    os.mkfifo(tmp_path / "cartridge.pt")
    with pytest.raises(InvalidCartridge, match="neither a file"):
        read_checkpoint(tmp_path / "cartridge.pt")
