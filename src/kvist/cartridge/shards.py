"""A cartridge's tensors in safetensors files: names, a strict reader of headers, mapped reading, hashed writing.

Knows bytes and torch. Must not know manifests' other fields, directories' names or the hub.

A mapped file that is cut short by somebody else ends the process that looks at what is gone (SIGBUS), and one that is
overwritten changes under its readers. So what a server loads, and whatever is verified, is read (`Shard.fill`).

The reader is our own, since what it reads comes from strangers: before anything is mapped, the header must be small,
strict JSON, and cover the file's bytes exactly once. Nothing in it can run code.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from blake3 import blake3
from torch import Tensor

from kvist.cartridge.manifest import FileEntry
from kvist.cartridge.manifest_file import open_regular
from kvist.errors import DamagedCartridge, InvalidCartridge, InvalidInput, InvalidManifest
from kvist.repo.manifest import canonical_json, parse_json

TOKEN_IDS: Final = "token_ids"
"""The tensor of the document's token ids, int64, ``[tokens]``."""

TORCH_DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
}
"""Data types that a cartridge can hold, by the names of safetensors."""

TYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""And the other way."""

_SIZE: Final = re.compile(r"([0-9]{1,9})([KMGT])(I?)B", re.IGNORECASE)
_HEADER_MAX: Final = 16 << 20
_CHUNK: Final = 16 << 20
_NORESERVE: Final = 0x4000  # of Linux; Python names it from 3.13 on
_THREADS: Final = min(8, os.cpu_count() or 1)


def keys_name(layer: int) -> str:
    """The tensor of a layer's keys."""
    return f"layers.{layer}.keys"


def values_name(layer: int) -> str:
    """The tensor of a layer's values."""
    return f"layers.{layer}.values"


def named_tensors(layers: Sequence[tuple[Tensor, Tensor]], token_ids: Sequence[int] | None) -> dict[str, Tensor]:
    """A cartridge's tensors by name, in canonical order: token ids, then keys and values of each layer."""
    tensors = {} if token_ids is None else {TOKEN_IDS: torch.tensor(list(token_ids), dtype=torch.int64)}
    for number, (keys, values) in enumerate(layers):
        tensors[keys_name(number)], tensors[values_name(number)] = keys, values
    return tensors


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its data type by safetensors' name, its shape, and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Shard:
    """One file, open for reading and, from `tensor` on, mapped.

    The map is private: a caller who writes into a tensor changes no file, but must not. It lives as long as a tensor
    of it does, even after `close`.

    Attributes:
        path: of the file.
        size: in bytes.
        stamp: which file it is, and when it was written to last, in ns; of a file that is changed, another.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            DamagedCartridge: there is no such regular file.
        """
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise DamagedCartridge(f"cannot read {path}: {error.strerror}") from None
        stat = os.fstat(self._file.fileno())
        self.size = stat.st_size
        self.stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        self._map: mmap.mmap | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that were handed out stay."""
        self._map = None
        self._file.close()

    def sha256(self) -> str:
        """The digest of all its bytes, in hex, read now."""
        digest, place = hashlib.sha256(), 0
        while chunk := os.pread(self._file.fileno(), _CHUNK, place):  # beside whoever reads the header
            digest.update(chunk)
            place += len(chunk)
        return digest.hexdigest()

    def fill(self, out: memoryview, start: int) -> None:
        """Read so many bytes from ``start`` on into a buffer. Usable from several threads.

        Raises:
            DamagedCartridge: the file ends before, or cannot be read.
        """
        end = start + len(out)
        try:
            while out:
                got = os.preadv(self._file.fileno(), [out], end - len(out))
                if not got:
                    raise DamagedCartridge(
                        f"{self.path} ends at {end - len(out)}, it had {self.size} bytes when opened"
                    )
                out = out[got:]
        except OSError as error:
            raise DamagedCartridge(f"cannot read {self.path}: {error.strerror}") from None

    def header(self) -> dict[str, TensorEntry]:
        """Its tensors by name.

        Raises:
            InvalidCartridge: anything but a header whose tensors cover the rest of the file exactly once.
        """
        where = str(self.path)
        head = os.pread(self._file.fileno(), 8, 0)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(_HEADER_MAX, self.size - 8):
            raise InvalidCartridge(f"{where}: no safetensors header of at most {_HEADER_MAX} bytes begins the file")
        text = os.pread(self._file.fileno(), length, 8)
        try:
            document = parse_json(text, where)
        except InvalidManifest as error:
            raise InvalidCartridge(f"{error}") from None
        _check_metadata(document.pop("__metadata__", {}), where)
        entries = {name: _entry(name, value, 8 + length, where) for name, value in document.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.start != end:
                raise InvalidCartridge(f"{where}: the bytes of {name!r:.80} begin at {entry.start}, expected {end}")
            end = entry.end
        if end != self.size:
            raise InvalidCartridge(f"{where}: the tensors end at {end}, the file at {self.size}")
        return entries

    def tensor(self, entry: TensorEntry) -> Tensor:
        """A view of the mapped file; nothing is read until it is looked at, and until then the file must not change."""
        if self._map is None:
            # Private and writable, since torch has no read-only tensors; without reserving memory for copies.
            flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self._map = mmap.mmap(self._file.fileno(), self.size, flags=flags, prot=prot)
        dtype, count = TORCH_DTYPES[entry.dtype], math.prod(entry.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What one file will hold: its name, and its tensors' names in the order of their bytes."""

    name: str
    tensors: tuple[str, ...]


def parse_size(size: int | str) -> int:
    """Bytes of ``5000`` or ``"5GB"``, ``"512MiB"``.

    Raises:
        InvalidInput: anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or not int(match[1]):
        raise InvalidInput(f"expected a size in bytes or like '5GB', got {size!r:.80}")
    base, power = (1024 if match[3] else 1000), "KMGT".index(match[2].upper()) + 1
    return int(match[1]) * int(base**power)


def plan_shards(tensors: Mapping[str, Tensor], max_shard_size: int) -> list[ShardPlan]:
    """Cut tensors into files of at most so many bytes of data each, but at least one tensor."""
    cuts: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not cuts or tensor.nbytes > room:
            cuts.append([])
            room = max_shard_size
        cuts[-1].append(name)
        room -= tensor.nbytes
    if len(cuts) == 1:
        return [ShardPlan("cartridge.safetensors", tuple(cuts[0]))]
    width = max(5, len(str(len(cuts))))
    return [
        ShardPlan(f"cartridge-{number:0{width}}-of-{len(cuts):0{width}}.safetensors", tuple(names))
        for number, names in enumerate(cuts, start=1)
    ]


def write_shard(directory: Path, plan: ShardPlan, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write one file, to the disk itself.

    Args:
        directory: where; the file must not be there yet.
        plan: its name and what it holds.
        tensors: contiguous and on the CPU, by name; read only.

    Raises:
        OSError: the disk refused.
    """
    digest, size = hashlib.sha256(), 0
    with (directory / plan.name).open("xb") as file:
        for part in (_header([(name, tensors[name]) for name in plan.tensors]), *map(tensors.get, plan.tensors)):
            data = part if isinstance(part, bytes) else tensor_bytes(part)  # type: ignore[arg-type]
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                file.write(chunk)
                digest.update(chunk)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(name=plan.name, size=size, sha256=digest.hexdigest())


def content_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over the names, types, shapes and BLAKE3 digests of tensors, in the order given.

    Says what a cartridge holds, however it is cut into files. The tensors are contiguous and on the CPU; they are
    hashed in several threads, and by BLAKE3, since a file's SHA-256 takes long enough.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(_digest, tensors.values()))
    shapes = [(name, TYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    return checksum_of_digests(shapes, digests)


def checksum_of_digests(shapes: Iterable[tuple[str, str, tuple[int, ...]]], digests: Iterable[str]) -> str:
    """`content_checksum` of tensors, each by its name, type and shape, whose BLAKE3 digests in hex are known."""
    document = [
        [name, dtype, list(shape), digest] for (name, dtype, shape), digest in zip(shapes, digests, strict=True)
    ]
    return hashlib.sha256(b"kvist cartridge content v1\0" + canonical_json({"tensors": document})).hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or ``None``."""
    with ThreadPoolExecutor(_THREADS) as threads:
        fine = list(threads.map(is_finite, tensors.values()))
    return next((name for name, is_fine in zip(tensors, fine, strict=True) if not is_fine), None)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied; they keep the tensor alive."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def _digest(tensor: Tensor) -> str:
    return blake3(tensor_bytes(tensor)).hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds no NaN and no infinity."""
    if not tensor.is_floating_point():
        return True
    # A NaN anywhere is both; an infinity is one of the two. Several times as fast as to ask each number.
    least, most = torch.aminmax(tensor)
    return bool(torch.isfinite(least) and torch.isfinite(most))


def _header(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """The length and the header, padded so that the bytes after it are aligned to eight."""
    document: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors:
        end = start + tensor.nbytes
        document[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_metadata(value: object, where: str) -> None:
    if not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
        raise InvalidCartridge(f"{where}: __metadata__ must be an object of texts, got {value!r:.80}")


def _entry(name: str, value: object, base: int, where: str) -> TensorEntry:
    what = f"{where}: tensor {name!r:.80}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InvalidCartridge(f"{what} must have dtype, shape and data_offsets, got {value!r:.120}")
    if not (isinstance(value["dtype"], str) and value["dtype"] in TORCH_DTYPES):
        raise InvalidCartridge(f"{what}: dtype must be one of {', '.join(TORCH_DTYPES)}, got {value['dtype']!r:.80}")
    shape, offsets = _counts(value["shape"], f"{what}: shape"), _counts(value["data_offsets"], f"{what}: data_offsets")
    width = TORCH_DTYPES[value["dtype"]].itemsize
    if len(shape) > 8 or math.prod(shape) < 1:
        raise InvalidCartridge(f"{what}: expected at most 8 axes and some elements, got shape {list(shape)!r:.80}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * width:
        raise InvalidCartridge(
            f"{what}: data_offsets must be {math.prod(shape) * width} bytes apart, got {list(offsets)!r:.80}"
        )
    if (base + offsets[0]) % width:
        raise InvalidCartridge(f"{what}: its bytes begin at {base + offsets[0]}, which is not aligned to {width}")
    return TensorEntry(value["dtype"], shape, base + offsets[0], base + offsets[1])


def _counts(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidCartridge(f"{what} must be an array of integers, got {value!r:.80}")
    if not all(type(item) is int and 0 <= item < 2**62 for item in value):
        raise InvalidCartridge(f"{what} must be integers in [0, 2^62), got {value!r:.80}")
    return tuple(value)
