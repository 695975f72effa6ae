"""A cartridge's directory: opened and checked, written whole or not at all.

Knows files and the manifest. Must not know models, engines or the hub.

A directory is written under another name beside its place, flushed, and renamed there: whoever is killed in between
leaves a hidden directory that the next writer to the same place removes, and never half a cartridge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from kvist.cartridge.manifest import CartridgeManifest, FileEntry
from kvist.cartridge.manifest_file import MANIFEST, read_manifest
from kvist.cartridge.shards import (
    TOKEN_IDS,
    TYPE_NAMES,
    Shard,
    TensorEntry,
    content_checksum,
    keys_name,
    not_finite,
    plan_shards,
    values_name,
    write_shard,
)
from kvist.errors import AlreadyExists, DamagedCartridge, InvalidCartridge, StoreError

_DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Opened:
    """An open directory: its manifest, and its tensors by name in canonical order, mapped."""

    manifest: CartridgeManifest
    tensors: dict[str, Tensor]


def read_directory(directory: Path, *, verify: bool) -> Opened:
    """Open a cartridge. Nothing is mapped before every header is checked.

    Args:
        directory: with a manifest and the files that it names.
        verify: read every byte, and compare digests, as `verify_content` does those of the content.

    Raises:
        NotFound, InvalidCartridge: as `read_manifest`; and files that do not hold the tensors that the manifest says.
        DamagedCartridge: a file that is missing, or has not the size or, with ``verify``, the bytes that it should.
    """
    manifest = read_manifest(directory)
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(Shard(directory / entry.name)) for entry in manifest.files]
        for entry, shard in zip(manifest.files, shards, strict=True):
            if shard.size != entry.size:
                raise DamagedCartridge(f"{shard.path} has {shard.size} bytes, its manifest says {entry.size}")
        threads = stack.enter_context(ThreadPoolExecutor(min(8, len(shards))))
        digests = [threads.submit(shard.sha256) for shard in shards] if verify else []
        try:
            places = _places(manifest, shards)
            tensors = {name: shard.tensor(entry) for name, (shard, entry) in places.items()}
            if verify:
                verify_content(manifest, tensors)
        finally:  # a file that is another is why whatever else is wrong
            _check_digests(shards, manifest.files, [digest.result() for digest in digests])
    return Opened(manifest, tensors)


def verify_content(manifest: CartridgeManifest, tensors: Mapping[str, Tensor]) -> None:
    """Read all tensors: are they those of the checksum, and numbers?

    Raises:
        InvalidCartridge: the manifest promises tensors of other names, types or shapes.
        DamagedCartridge: they are not.
    """
    shapes = {name: (TYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if shapes != tensor_shapes(manifest):
        raise InvalidCartridge(f"cartridge {manifest.cartridge_id!r}: its tensors are not those that its manifest says")
    checksum = content_checksum(tensors)
    if checksum != manifest.checksum:
        raise DamagedCartridge(
            f"cartridge {manifest.cartridge_id!r}: its tensors have the checksum {checksum}, "
            f"its manifest says {manifest.checksum}"
        )
    name = not_finite(tensors)
    if name is not None:
        raise DamagedCartridge(f"cartridge {manifest.cartridge_id!r}: {name} holds a NaN or an infinity")


def tensor_shapes(manifest: CartridgeManifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type, by safetensors' name, and shape of every tensor that it promises, in canonical order."""
    tokens, dtype = manifest.num_tokens_raw, _DTYPES[manifest.dtype]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if manifest.has_token_ids:
        shapes[TOKEN_IDS] = ("I64", (tokens,))
    for number, layer in enumerate(manifest.layers):
        shape = (tokens, layer.num_kv_heads, layer.head_dim)
        shapes[keys_name(number)] = shapes[values_name(number)] = (dtype, shape)
    return shapes


def write_directory(
    target: Path, manifest: CartridgeManifest, tensors: Mapping[str, Tensor], max_shard_size: int
) -> CartridgeManifest:
    """Write a cartridge's directory, atomically.

    Where the same cartridge is there already, by id and identity, only its manifest is written anew, with its files as
    they are.

    Args:
        target: not there, empty, or the same cartridge.
        manifest: files and sizes in it are not looked at.
        tensors: as `tensor_shapes` of it, contiguous on the CPU.
        max_shard_size: bytes of data a file.

    Returns:
        The manifest that was written.

    Raises:
        AlreadyExists: something else is there.
        StoreError: the disk refused.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and any(target.iterdir()):
            return _rewrite_manifest(target, manifest)
        _sweep(target)
        with _staging(target) as staging:
            written = _write(staging, manifest, tensors, max_shard_size)
            try:
                staging.rename(target)
            except OSError:
                if not target.exists():
                    raise
                raise AlreadyExists(f"{target} came to be while it was written; it is not touched") from None
            _sync(target.parent)
            return written
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error}") from None


def _write(
    staging: Path, manifest: CartridgeManifest, tensors: Mapping[str, Tensor], max_shard_size: int
) -> CartridgeManifest:
    entries = [write_shard(staging, plan, tensors) for plan in plan_shards(tensors, max_shard_size)]
    files = tuple(sorted(entries, key=lambda entry: entry.name))
    written = dataclasses.replace(manifest, files=files, file_size_bytes=sum(entry.size for entry in files))
    _write_text(staging / MANIFEST, written.to_json())
    _sync(staging)
    return written


def _rewrite_manifest(target: Path, manifest: CartridgeManifest) -> CartridgeManifest:
    """Say something else of the same content."""
    try:
        there = read_manifest(target)
    except InvalidCartridge:
        raise AlreadyExists(f"{target} is there, is not empty, and holds no cartridge; it is not touched") from None
    if (there.cartridge_id, there.identity) != (manifest.cartridge_id, manifest.identity):
        raise AlreadyExists(
            f"{target} holds the cartridge {there.cartridge_id!r} ({there.identity[:12]}), expected "
            f"{manifest.cartridge_id!r} ({manifest.identity[:12]}); it is not touched",
            hint="choose another directory, or remove that one",
        )
    written = dataclasses.replace(
        manifest, files=there.files, file_size_bytes=there.file_size_bytes, created_at=there.created_at
    )
    beside = target / f".{MANIFEST}.{secrets.token_hex(8)}.tmp"
    try:
        _write_text(beside, written.to_json())
        beside.replace(target / MANIFEST)
    finally:
        beside.unlink(missing_ok=True)
    _sync(target)
    return written


def _places(manifest: CartridgeManifest, shards: list[Shard]) -> dict[str, tuple[Shard, TensorEntry]]:
    """Where each tensor is, in canonical order."""
    found: dict[str, tuple[Shard, TensorEntry]] = {}
    for shard in shards:
        for name, entry in shard.header().items():
            if name in found:
                raise InvalidCartridge(f"{shard.path}: tensor {name!r:.80} is in {found[name][0].path.name} already")
            found[name] = (shard, entry)
    expected = tensor_shapes(manifest)
    if wrong := sorted(set(found) ^ set(expected)):
        raise InvalidCartridge(
            f"cartridge {manifest.cartridge_id!r}: expected {len(expected)} tensors, got {len(found)}; "
            f"the first that is missing or too many is {wrong[0]!r:.80}"
        )
    for name, (dtype, shape) in expected.items():
        shard, entry = found[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise InvalidCartridge(
                f"{shard.path}: {name} is {entry.dtype} {list(entry.shape)}, its manifest says {dtype} {list(shape)}"
            )
    return {name: found[name] for name in expected}


def _check_digests(shards: list[Shard], entries: tuple[FileEntry, ...], digests: list[str]) -> None:
    for shard, entry, digest in zip(shards, entries, digests, strict=False):
        if digest != entry.sha256:
            raise DamagedCartridge(
                f"{shard.path} has the SHA-256 {digest}, its manifest says {entry.sha256}",
                hint="fetch it anew, or make it anew: `kvist cartridge build`",
            )


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that is removed unless it is renamed, and that no `_sweep` takes meanwhile."""
    path = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    path.mkdir()
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # it is gone if all went well
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what writers to the same place left who were killed: nobody holds the lock of these."""
    left = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.tmp")
    for path in target.parent.iterdir():
        if not left.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError, NotADirectoryError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _write_text(path: Path, text: str) -> None:
    with path.open("xb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
