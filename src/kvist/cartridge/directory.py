"""A cartridge's directory, written whole or not at all.

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
from pathlib import Path
from typing import Final

from torch import Tensor

from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.manifest_file import MANIFEST, read_manifest
from kvist.cartridge.reading import read_directory
from kvist.cartridge.shards import plan_shards, write_shard
from kvist.errors import AlreadyExists, DamagedCartridge, InvalidCartridge, InvalidInput, StoreError
from kvist.store.posix import sync_directories

_BESIDE: Final = f".{MANIFEST}.tmp"
"""A manifest that is not renamed yet. Only who holds the directory's lock has one, so the next one takes it away."""


def write_directory(
    target: Path, manifest: CartridgeManifest, tensors: Mapping[str, Tensor], max_shard_size: int
) -> CartridgeManifest:
    """Write a cartridge's directory, atomically.

    Where the same cartridge is there already, by id and identity, only its manifest is written anew, with its files as
    they are.

    Args:
        target: not there, empty, or the same cartridge; a link is followed.
        manifest: files and sizes in it are not looked at.
        tensors: as `tensor_shapes` of it, contiguous on the CPU.
        max_shard_size: bytes of data a file.

    Returns:
        The manifest that was written.

    Raises:
        AlreadyExists: something else is there.
        DamagedCartridge: the same cartridge is there, and is damaged; it is not touched.
        InvalidInput: it is the working directory.
        StoreError: the disk refused.
    """
    try:
        target = Path(os.path.realpath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise AlreadyExists(f"{target} is there, and is no directory; it is not touched")
        if target.exists() and any(target.iterdir()):
            return _rewrite_manifest(target, manifest)
        if target.is_dir() and target.samefile("."):
            raise InvalidInput(
                f"{target} is the working directory: a directory renamed into its place would leave this process, and "
                "the shell that began it, in one that is removed",
                hint="name one that is not there yet",
            )
        _sweep(target)
        with _staging(target) as staging:
            written = _write(staging, manifest, tensors, max_shard_size)
            try:
                staging.rename(target)
            except OSError:
                if not target.exists():
                    raise
                raise AlreadyExists(f"{target} came to be while it was written; it is not touched") from None
            sync_directories([target.parent])
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
    sync_directories([staging])
    return written


def _rewrite_manifest(target: Path, manifest: CartridgeManifest) -> CartridgeManifest:
    """Say something else of the same content, which is read to see that it is there."""
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
    try:
        read_directory(target, verify=True)
    except (DamagedCartridge, InvalidCartridge) as error:
        raise DamagedCartridge(
            f"{target} holds this cartridge already, and is damaged: {error}",
            hint="remove it, and save the cartridge again",
        ) from None
    written = dataclasses.replace(
        manifest, files=there.files, file_size_bytes=there.file_size_bytes, created_at=there.created_at
    )
    handle, beside = _lock(target), target / _BESIDE
    try:
        beside.unlink(missing_ok=True)
        _write_text(beside, written.to_json())
        beside.replace(target / MANIFEST)
        sync_directories([target])
    finally:
        beside.unlink(missing_ok=True)
        os.close(handle)
    return written


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that is removed unless it is renamed, and that no `_sweep` takes meanwhile."""
    path, handle = _make_staging(target)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # it is gone if all went well
        os.close(handle)


def _make_staging(target: Path) -> tuple[Path, int]:
    """Make the directory, and lock it; also returns the handle that has the lock."""
    while True:
        path = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        path.mkdir()
        with contextlib.suppress(FileNotFoundError):
            handle = _lock(path)
            if path.exists():
                return path, handle
            os.close(handle)  # a sweep came between


def _lock(directory: Path, how: int = fcntl.LOCK_EX) -> int:
    """Take a directory's lock. Returns the handle that has it, until it is closed."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, how)
    except OSError:
        os.close(handle)
        raise
    return handle


def _sweep(target: Path) -> None:
    """Remove what writers to the same place left who were killed: nobody holds the lock of these."""
    left = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.tmp")
    for path in target.parent.iterdir():
        if not left.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError, NotADirectoryError):
            handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _write_text(path: Path, text: str) -> None:
    with path.open("xb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
