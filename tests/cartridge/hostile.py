"""Makes hostile files of good ones: one seed, one mutation. Every kind that a stranger's file could have."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from .checkpoints import WRITERS, hazy, sample, sidecar, trainable
from .making import make_cartridge

Files = dict[str, bytes]
LAYERS: Final = sample()

_EVIL_NAMES: Final = (
    "../cartridge.safetensors",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/b.safetensors",
    "..\\a.safetensors",
    ".safetensors",
    "cartridge.safetensors\0",
    "cartridge.json",
    "",
    "a" * 5000,
    "\ud800",
)
_EVIL_VALUES: Final[tuple[Any, ...]] = (
    -1,
    0,
    2**31,
    2**63,
    10**400,
    -(2**62),
    0.5,
    1e308,
    True,
    None,
    "",
    "x",
    "3",
    [],
    {},
    [[]],
    {"a": {"b": []}},
    *_EVIL_NAMES,
)


@dataclass(frozen=True)
class Hostile:
    """A mutated subject.

    Attributes:
        subject: of which it was made.
        mutation: what was done.
        files: by name.
        opened: the name to open; ``""``: their directory.
        is_sealed: a digest or checksum covers the numbers, so that whatever is read must be the original.
    """

    subject: str
    mutation: str
    files: Files
    opened: str
    is_sealed: bool

    def __str__(self) -> str:
        return f"{self.subject}: {self.mutation}"


class Runs:
    """Pickles as a call of a shell."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def subjects() -> dict[str, tuple[Files, str]]:
    """Good files of every form, and the name to open."""
    found: dict[str, tuple[Files, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, writer in WRITERS.items():
            (directory := Path(scratch) / name).mkdir()
            path = writer(directory, LAYERS)
            found[name] = _files(directory), "" if path == directory else path.name
        (directory := Path(scratch) / "sidecar").mkdir()
        path = hazy(directory, LAYERS)
        path.with_name(path.name + ".json").write_text(json.dumps(sidecar(path, LAYERS)))
        found["sidecar"] = _files(directory), path.name
        for name, options in (("native", {}), ("native in shards", {"max_shard_size": 2000})):
            directory = Path(scratch) / name
            make_cartridge(32).save_pretrained(directory, **options)
            found[name] = _files(directory), ""
    return found


def mutate(seed: int, good: dict[str, tuple[Files, str]], canary: Path) -> Hostile:
    """The mutation of a seed.

    Args:
        seed: decides all.
        good: of `subjects`.
        canary: a file that code in the mutated files would make.
    """
    dice = random.Random(seed)
    subject = dice.choice(sorted(good))
    files, opened = good[subject]
    name = dice.choice(sorted(files))
    kinds: list[Callable[[random.Random, bytes, Path], tuple[str, bytes]]] = [_bytes_changed]
    if name.endswith(".json"):
        kinds = [_bytes_changed, _json_changed, _json_changed, _json_text]
    elif name.endswith((".pt", ".bin")):
        kinds = [_bytes_changed, _pickle_changed, _code_added, _records_changed, _numbers_changed, _tree_changed]
    elif name.endswith(".safetensors"):
        kinds = [_bytes_changed, _header_changed]
    kind = dice.choice(kinds)
    what, data = kind(dice, files[name], canary)
    is_sealed = subject.startswith("native") or (name.endswith((".pt", ".bin")) and kind is _bytes_changed)
    return Hostile(subject, f"{name}: {what}", files | {name: data}, opened, is_sealed)


def _files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# -- any file ----------------------------------------------------------------------------------------------------


def _bytes_changed(dice: random.Random, data: bytes, _: Path) -> tuple[str, bytes]:
    at = dice.randrange(len(data))
    size = min(len(data) - at, dice.choice((1, 4, 64, 1024)))
    match dice.randrange(7):
        case 0:
            return f"cut at {at}", data[:at]
        case 1:
            changed = bytearray(data)
            bits = [dice.randrange(8 * len(data)) for _ in range(dice.choice((1, 2, 8)))]
            for bit in bits:
                changed[bit // 8] ^= 1 << bit % 8
            return f"bits {bits} flipped", bytes(changed)
        case 2:
            return f"zeros at {at}", data[:at] + bytes(size) + data[at + size :]
        case 3:
            return f"{size} random bytes at {at}", data[:at] + dice.randbytes(size) + data[at + size :]
        case 4:
            return f"{size} bytes taken out at {at}", data[:at] + data[at + size :]
        case 5:
            return f"{size} bytes put in at {at}", data[:at] + dice.randbytes(size) + data[at:]
        case _:
            return "something follows", data + dice.randbytes(size)


# -- JSON --------------------------------------------------------------------------------------------------------


def _places(tree: Any) -> list[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((tree, key), *_places(value))]


def _json_changed(dice: random.Random, data: bytes, _: Path) -> tuple[str, bytes]:
    tree = json.loads(data)
    holder, key = dice.choice(_places(tree))
    names = [place for place in _places(tree) if place[1] == "name"]
    if names and dice.random() < 0.2:
        (holder, key), value = dice.choice(names), dice.choice(_EVIL_NAMES)
    else:
        value = dice.choice(_EVIL_VALUES)
    if dice.random() < 0.15:
        del holder[key]
        return f"{key} taken out", json.dumps(tree).encode()
    holder[key] = value
    text = json.dumps(tree, ensure_ascii=dice.random() < 0.5)
    return f"{key} is {value!r:.40}", text.encode("utf-8", "surrogatepass")


def _json_text(dice: random.Random, data: bytes, _: Path) -> tuple[str, bytes]:
    text = data.decode()
    match dice.randrange(6):
        case 0:
            return "a NaN", text.replace("0", "NaN", 1).encode()
        case 1:
            return "deep", b"[" * 200_000
        case 2:
            return "a key twice", text.replace("{", '{"cartridge_id": "x", "cartridge_id": "y", ', 1).encode()
        case 3:
            return "another encoding", text.encode("utf-16")
        case 4:
            return "an array", b"[" + text.encode() + b"]"
        case _:
            return "a huge number", b'{"cartridge_id": ' + b"9" * 100_000 + b"}"


# -- files of torch ----------------------------------------------------------------------------------------------


def rewritten(data: bytes, change: Callable[[str, bytes], tuple[str, bytes]]) -> bytes:
    """An archive with other records, and checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(*change(info.filename, old.read(info)))
    return buffer.getvalue()


def _pickle_changed(dice: random.Random, data: bytes, canary: Path) -> tuple[str, bytes]:
    what = ""

    def change(name: str, record: bytes) -> tuple[str, bytes]:
        nonlocal what
        if name.endswith("/data.pkl"):
            what, record = _bytes_changed(dice, record, canary)
        return name, record

    changed = rewritten(data, change)
    return f"pickle: {what}", changed


def _code_added(dice: random.Random, data: bytes, canary: Path) -> tuple[str, bytes]:
    command = b"touch " + os.fsencode(canary)
    text = b"X" + struct.pack("<I", len(command)) + command
    programs = {
        "system": b"cposix\nsystem\n" + text + b"\x85R0",
        "stack global": b"\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R0",
        "inst": b"(" + text + b"iposix\nsystem\n0",
        "eval": b"c__builtin__\neval\nX\x04\x00\x00\x001+11\x85R0",
        "getattr": b"c__builtin__\ngetattr\nctorch\nSize\nX\x03\x00\x00\x00mro\x86R0",
        "torch's own": b"ctorch.serialization\nload\n" + text + b"\x85R0",
        "runpy": b"crunpy\n_run_code\n" + text + b"\x85R0",
    }
    name = dice.choice(sorted(programs))
    if dice.random() < 0.3:
        buffer = io.BytesIO()
        torch.save(trainable(LAYERS) | {"config": Runs(command.decode())}, buffer)
        return "an object that runs code", buffer.getvalue()

    def change(record_name: str, record: bytes) -> tuple[str, bytes]:
        is_pickle = record_name.endswith("/data.pkl")
        return record_name, record[:2] + programs[name] + record[2:] if is_pickle else record

    return f"code: {name}", rewritten(data, change)


def _records_changed(dice: random.Random, data: bytes, _: Path) -> tuple[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        victim = dice.choice(archive.namelist())
    other = dice.choice((*_EVIL_NAMES[:7], victim + "/x", victim.upper(), "data.pkl"))
    if dice.random() < 0.5:
        size = dice.choice((0, 1, 7, 100_000))
        return f"record {victim} has {size} bytes", rewritten(data, lambda n, r: (n, bytes(size) if n == victim else r))
    return f"record {victim} is {other!r:.40}", rewritten(data, lambda n, r: (other if n == victim else n, r))


def _numbers_changed(dice: random.Random, data: bytes, _: Path) -> tuple[str, bytes]:
    number = dice.choice((b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\xff\xff"))  # bfloat16: NaN, both infinities, NaN
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        storages = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size > 64]
        victim = dice.choice(storages)
    at = 2 * dice.randrange(victim.file_size // 2)

    def change(name: str, record: bytes) -> tuple[str, bytes]:
        return name, record[:at] + number + record[at + 2 :] if name == victim.filename else record

    return f"{number.hex()} in {victim.filename} at {at}", rewritten(data, change)


def _tree_changed(dice: random.Random, _: bytes, __: Path) -> tuple[str, bytes]:
    """Good pickles of bad checkpoints: shapes, types, layers."""
    tree: dict[str, Any] = trainable(LAYERS)
    name = dice.choice(sorted(tree))
    tensors = tree[name]
    number = dice.randrange(len(tensors))
    one = tensors[number]
    changes: dict[str, Any] = {
        "a token less": one[:, :, 1:],
        "a head less": one[:, 1:],
        "narrower": one[..., 1:],
        "no batch": one[0],
        "a batch of two": torch.cat([one, one]),
        "transposed": one.transpose(1, 2),
        "empty": one[:, :, :0],
        "wider type": one.double(),
        "integers": one.to(torch.int64),
        "complex": one.to(torch.complex64),
        "expanded": one[:, :, :1].expand(1, 2, 1 << 20, 8),
        "NaN": one * float("nan"),
        "a number": 7,
        "text": "cartridge",
        "nothing": None,
        "sparse": one.float().to_sparse(),
        "on no device": one.to("meta"),
    }
    what = dice.choice(sorted(changes))
    match dice.randrange(4):
        case 0:
            tree[name] = tensors[:number] + tensors[number + 1 :]
            what = "a layer less"
        case 1:
            tree[name] = dice.choice((changes[what], dict(enumerate(tensors)), torch.stack(tensors)))
            what = f"for all layers, {what}, a dict or one tensor"
        case _:
            tree[name] = [*tensors[:number], changes[what], *tensors[number + 1 :]]
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return f"{name}: {what}", buffer.getvalue()


# -- files of safetensors ----------------------------------------------------------------------------------------


def _header_changed(dice: random.Random, data: bytes, canary: Path) -> tuple[str, bytes]:
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if dice.random() < 0.2:
        wrong = dice.choice((0, 1, length - 1, length + 1, len(data), 1 << 40, (1 << 64) - 1))
        return f"header of {wrong} bytes", wrong.to_bytes(8, "little") + header + rest
    change = dice.choice((_json_changed, _json_text, _bytes_changed))
    what, changed = change(dice, header, canary)
    return f"header: {what}", len(changed).to_bytes(8, "little") + changed + rest
