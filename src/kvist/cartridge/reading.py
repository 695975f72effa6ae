"""A cartridge's directory, opened and checked: mapped, or read once into memory of our own.

Knows files and the manifest. Must not know how a directory is written, models, engines or the hub.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from blake3 import blake3
from torch import Tensor

from kvist.cartridge.manifest import CartridgeManifest, FileEntry
from kvist.cartridge.manifest_file import read_manifest
from kvist.cartridge.shards import (
    TOKEN_IDS,
    TORCH_DTYPES,
    TYPE_NAMES,
    Shard,
    TensorEntry,
    checksum_of_digests,
    content_checksum,
    is_finite,
    keys_name,
    not_finite,
    tensor_bytes,
    values_name,
)
from kvist.errors import DamagedCartridge, InvalidCartridge

_CHUNK: Final = 1 << 20  # stays in a core's cache from the reading to the last check
_MOMENT: Final = 100_000_000
"""Nanoseconds in which a file that is written to twice may keep its time: more than a tick of the kernel."""

_Place = tuple[Shard, TensorEntry]


@dataclass(frozen=True, slots=True)
class Opened:
    """An open directory: its manifest, and its tensors by name in canonical order, mapped."""

    manifest: CartridgeManifest
    tensors: dict[str, Tensor]


class Layers:
    """A cartridge's layers, each read once from its files, checked, and handed out in their order; see `open_layers`.

    Iterated in one thread. Two layers are in memory at a time: the next one is read while the caller copies one.

    Attributes:
        manifest: of the cartridge.
        token_ids: of its document, or ``None``; known to be these when the iteration has ended.
        stamps: those of its files when they were opened.
        fault: what was found wrong with its content; ``None``: nothing so far.
    """

    fault: DamagedCartridge | None = None

    def __init__(self, manifest: CartridgeManifest, shards: Sequence[Shard], *, verify: bool = True) -> None:
        """Read headers and token ids.

        Args:
            manifest: of which each byte must be.
            shards: its files, open; borrowed.
            verify: see `open_layers`.

        Raises:
            InvalidCartridge: they do not hold the tensors that the manifest says, or ids that are none.
            DamagedCartridge: they cannot be read.
        """
        self.manifest = manifest
        self._is_verified = verify
        self.stamps = tuple(shard.stamp for shard in shards)
        self._places = _places(manifest, shards)
        self._digests: list[str] = []  # of what comes before the layers
        self.token_ids = self._read_ids() if manifest.has_token_ids else None
        self._threads = ThreadPoolExecutor(2)

    def close(self) -> None:
        """End what reads ahead; before the files are closed."""
        self._threads.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each layer's number, keys and values, ``[tokens, heads, head_dim]``: valid until the next one is asked for.

        Raises:
            DamagedCartridge: a file ended early, a number is none, or, after the last layer, the checksum is another.
        """
        buffers: tuple[list[Tensor], list[Tensor]] = ([], [])
        digests = list(self._digests)
        ahead = self._start(0, buffers[0])
        for number in range(self.manifest.num_layers):
            (keys, digest), (values, other) = (one.result() for one in ahead)
            digests += [digest, other]
            if number + 1 < self.manifest.num_layers:
                ahead = self._start(number + 1, buffers[(number + 1) % 2])
            yield number, keys, values
        if self._is_verified:
            self._require_checksum(digests)

    def check(self) -> None:
        """Read all of it and keep nothing; raises as `__iter__`."""
        for _ in self:
            pass

    def _start(self, number: int, buffers: list[Tensor]) -> list[Future[tuple[Tensor, str]]]:
        """Begin to read a layer, into the buffers of the one before the last, where it has the same shape."""
        entries = [self._places[name][1] for name in (keys_name(number), values_name(number))]
        if [buffer.shape for buffer in buffers] != [entry.shape for entry in entries]:
            buffers[:] = [torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype]) for entry in entries]
        names = (keys_name(number), values_name(number))
        return [self._threads.submit(self._read, name, out) for name, out in zip(names, buffers, strict=True)]

    def _require_checksum(self, digests: list[str]) -> None:
        try:
            _require_checksum(self.manifest, checksum_of_digests(_named_shapes(self.manifest), digests))
        except DamagedCartridge as error:
            self.fault = error
            raise

    def _read(self, name: str, out: Tensor) -> tuple[Tensor, str]:
        shard, entry = self._places[name]
        digest, data, flat = blake3(), tensor_bytes(out), out.view(-1)
        for start in range(0, len(data), _CHUNK):
            part = data[start : start + _CHUNK]
            shard.fill(part, entry.start + start)
            if self._is_verified:
                digest.update(part)
                numbers = flat[start // out.itemsize : (start + len(part)) // out.itemsize]
                if not is_finite(numbers):
                    self.fault = _not_finite(self.manifest, name)
                    raise self.fault
        return out, digest.hexdigest()

    def _read_ids(self) -> tuple[int, ...]:
        entry = self._places[TOKEN_IDS][1]
        tensor, digest = self._read(TOKEN_IDS, torch.empty(entry.shape, dtype=torch.int64))
        self._digests.append(digest)
        return checked_ids(self.manifest, tensor)


@contextlib.contextmanager
def open_layers(directory: Path, manifest: CartridgeManifest, *, verify: bool = True) -> Iterator[Layers]:
    """Open a cartridge for who keeps a copy of it: an engine that loads.

    What is handed out is what was checked, whatever becomes of the files meanwhile. But it is known to be the cartridge
    only when all of it was read: until the iteration has ended without an error, nothing of it may be used. ::

        with open_layers(directory, manifest) as layers:
            for number, keys, values in layers:
                ...  # copy them
        ...  # now the copy may be used

    Args:
        directory: with its files.
        manifest: of which each byte must be; see `read_manifest` for that of the directory.
        verify: compare the checksum of the content, and refuse numbers that are none. The digests of the files are not
            looked at: they tell which file was transferred badly.

    Raises:
        InvalidCartridge: files that do not hold the tensors that the manifest says, or ids that are none.
        DamagedCartridge: a file is missing, or has another size.
    """
    with contextlib.ExitStack() as stack:
        shards = _open_shards(stack, directory, manifest)
        yield stack.enter_context(contextlib.closing(Layers(manifest, shards, verify=verify)))


class Loader:
    """Opens cartridges for a cache of loaded ones, and remembers which of them turned out to be damaged.

    A cache makes room before it loads, and damage may show only at the end of a load. So that who asks for a damaged
    one again and again does not empty the cache, its files are not read again until they are others, or were written
    to. One that was written to this very moment is not remembered: it may be once more, without a later time.
    Thread-safe.
    """

    def __init__(self, *, verify: bool = True) -> None:
        """``verify``: see `open_layers`."""
        self._is_verified = verify
        self._faults: dict[str, tuple[object, str]] = {}  # identity to the stamps of its files, and what was wrong

    def check(self, directory: Path, identity: str) -> None:
        """What can be seen before anything is read, see `open`; cheap."""
        with self.open(directory, identity):
            pass

    @contextlib.contextmanager
    def open(self, directory: Path, identity: str) -> Iterator[Layers]:
        """`open_layers` of a directory that must hold a cartridge of an identity.

        Raises:
            NotFound, InvalidCartridge: there is no cartridge.
            DamagedCartridge: one of another identity; or a file is missing, has another size, or was found to be
                damaged before and is still the same.
        """
        with open_layers(directory, read_manifest(directory, identity), verify=self._is_verified) as layers:
            stamps, said = self._faults.get(identity, (None, ""))
            if stamps == layers.stamps:
                raise DamagedCartridge(said, hint="replace its files")
            try:
                yield layers
            finally:
                newest = max(modified for *_, modified in layers.stamps)
                if layers.fault is not None and time.time_ns() - newest > _MOMENT:
                    self._faults[identity] = (layers.stamps, str(layers.fault))


def read_directory(directory: Path, *, verify: bool) -> Opened:
    """Open a cartridge. Nothing is mapped before every header is checked.

    Args:
        directory: with a manifest and the files that it names; they must not change while a tensor is looked at.
        verify: read every byte, and compare the digests of files, and the content as `verify_content` does.

    Raises:
        NotFound, InvalidCartridge: as `read_manifest`; and files that do not hold the tensors that the manifest says.
        DamagedCartridge: a file that is missing, or has not the size or, with ``verify``, the bytes that it should.
    """
    manifest = read_manifest(directory)
    with contextlib.ExitStack() as stack:
        shards = _open_shards(stack, directory, manifest)
        threads = stack.enter_context(ThreadPoolExecutor(min(8, len(shards))))
        digests = [threads.submit(shard.sha256) for shard in shards] if verify else []
        try:
            if verify:
                with contextlib.closing(Layers(manifest, shards)) as layers:
                    layers.check()
            tensors = {name: shard.tensor(entry) for name, (shard, entry) in _places(manifest, shards).items()}
        finally:  # a file that is another is why whatever else is wrong
            _check_digests(shards, manifest.files, [digest.result() for digest in digests])
    return Opened(manifest, tensors)


def verify_content(manifest: CartridgeManifest, tensors: Mapping[str, Tensor]) -> None:
    """Read all tensors, in memory: are they those of the checksum, and numbers?

    Raises:
        InvalidCartridge: the manifest promises tensors of other names, types or shapes.
        DamagedCartridge: they are not.
    """
    shapes = {name: (TYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if shapes != tensor_shapes(manifest):
        raise InvalidCartridge(f"cartridge {manifest.cartridge_id!r}: its tensors are not those that its manifest says")
    _require_checksum(manifest, content_checksum(tensors))
    name = not_finite(tensors)
    if name is not None:
        raise _not_finite(manifest, name)


def tensor_shapes(manifest: CartridgeManifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type, by safetensors' name, and shape of every tensor that it promises, in canonical order."""
    tokens, dtype = manifest.num_tokens_raw, TYPE_NAMES[getattr(torch, manifest.dtype)]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if manifest.has_token_ids:
        shapes[TOKEN_IDS] = ("I64", (tokens,))
    for number, layer in enumerate(manifest.layers):
        shape = (tokens, layer.num_kv_heads, layer.head_dim)
        shapes[keys_name(number)] = shapes[values_name(number)] = (dtype, shape)
    return shapes


def checked_ids(manifest: CartridgeManifest, tensor: Tensor) -> tuple[int, ...]:
    """A cartridge's token ids.

    Raises:
        InvalidCartridge: numbers that are no token ids.
    """
    ids: list[int] = tensor.tolist()
    if not all(0 <= token < 2**32 for token in ids):
        raise InvalidCartridge(
            f"cartridge {manifest.cartridge_id!r}: token ids must be in [0, 2^32), got {min(ids)} to {max(ids)}"
        )
    return tuple(ids)


def _named_shapes(manifest: CartridgeManifest) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, dtype, shape) for name, (dtype, shape) in tensor_shapes(manifest).items()]


def _require_checksum(manifest: CartridgeManifest, checksum: str) -> None:
    if checksum != manifest.checksum:
        raise DamagedCartridge(
            f"cartridge {manifest.cartridge_id!r}: its tensors have the checksum {checksum}, "
            f"its manifest says {manifest.checksum}"
        )


def _not_finite(manifest: CartridgeManifest, name: str) -> DamagedCartridge:
    return DamagedCartridge(f"cartridge {manifest.cartridge_id!r}: {name} holds a NaN or an infinity")


def _open_shards(stack: contextlib.ExitStack, directory: Path, manifest: CartridgeManifest) -> list[Shard]:
    """Its files, of the sizes that it says."""
    shards = [stack.enter_context(Shard(directory / entry.name)) for entry in manifest.files]
    for entry, shard in zip(manifest.files, shards, strict=True):
        if shard.size != entry.size:
            raise DamagedCartridge(f"{shard.path} has {shard.size} bytes, its manifest says {entry.size}")
    return shards


def _places(manifest: CartridgeManifest, shards: Sequence[Shard]) -> dict[str, _Place]:
    """Where each tensor is, in canonical order."""
    found: dict[str, _Place] = {}
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
