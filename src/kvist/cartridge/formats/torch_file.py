"""Files of `torch.save`: the archive and the pickle in it, as a tree of values with described tensors at its leaves.

Knows how torch lays tensors over storages. Must not know families.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kvist.cartridge.formats.archive import MAGIC, TorchArchive
from kvist.cartridge.formats.pickled import Place, read
from kvist.cartridge.formats.stored import READABLE, StoredTensor
from kvist.cartridge.manifest_file import open_regular
from kvist.errors import InvalidCartridge, UnsafeCheckpoint

_PICKLES: Final = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch before 1.6 begin: a pickle of their magic number."""


@contextmanager
def open_torch_file(path: Path) -> Iterator[Any]:
    """The tree of a file; its tensors can be read until the context ends.

    Raises:
        InvalidCartridge, UnsafeCheckpoint, DamagedCartridge: see `TorchArchive` and `pickled.read`.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise InvalidCartridge(f"cannot read {path}: {error.strerror}") from None
    with file:
        _refuse_others(path, file.read(len(_LEGACY)))
        with TorchArchive(path, file) as archive:
            storages = _Storages(archive)
            yield read(archive.pickle(), storages.describe, str(path))


def _refuse_others(path: Path, head: bytes) -> None:
    if head.startswith(MAGIC):
        return
    if head == _LEGACY:
        raise InvalidCartridge(
            f"{path} is in the format of torch before 1.6",
            hint="write it anew, where you trust it: torch.save(torch.load(path, weights_only=True), path)",
        )
    if head.startswith(_PICKLES):
        raise UnsafeCheckpoint(
            f"{path} is a bare pickle, which can only be read by running it", hint="write it with torch.save"
        )
    raise InvalidCartridge(f"{path} is neither a file of torch.save nor of safetensors: it begins with {head!r}")


class _Storages:
    """The numbers below the tensors of one archive. Each storage is read when a tensor of it is, and once.

    Many tensors may lie over one storage, and a tree may hold one tensor many times: what is read of a storage is
    therefore counted, so that no more comes out of a file than is in it.
    """

    def __init__(self, archive: TorchArchive) -> None:
        self._archive = archive
        self._read: dict[tuple[str, str], Tensor] = {}
        self._taken: Counter[str] = Counter()  # bytes of a storage that tensors were read of

    def describe(self, place: Place) -> StoredTensor:
        """A tensor that can be read. Refuses one that does not lie within its storage, or more than once in it."""
        where, width = self._archive.path, getattr(torch, place.dtype).itemsize
        size = self._archive.storage_size(place.key)
        expected = place.count if place.is_in_bytes else place.count * width
        if size != expected:
            raise InvalidCartridge(f"{where}: storage {place.key!r:.80} has {size} bytes, expected {expected}")
        if size % width:
            raise InvalidCartridge(
                f"{where}: storage {place.key!r:.80} of {place.dtype} has {size} bytes, expected a multiple of {width}"
            )
        elements = math.prod(place.shape)
        if len(place.shape) != len(place.strides):
            raise InvalidCartridge(f"{where}: a tensor of {len(place.shape)} axes has {len(place.strides)} strides")
        last = sum((axis - 1) * stride for axis, stride in zip(place.shape, place.strides, strict=True))
        if elements and place.offset + last >= size // width:
            raise InvalidCartridge(f"{where}: a tensor of shape {list(place.shape)} reaches out of its storage")
        if elements > size // width:
            raise InvalidCartridge(
                f"{where}: a tensor of shape {list(place.shape)} lies over {size // width} elements more than once",
                hint="save it contiguous: tensor.contiguous()",
            )
        return StoredTensor(place.dtype, place.shape, lambda: self._tensor(place))

    def _tensor(self, place: Place) -> Tensor:
        if not math.prod(place.shape):
            return torch.empty(place.shape, dtype=READABLE[place.dtype])
        name = (place.key, place.dtype)
        self._taken[place.key] += math.prod(place.shape) * READABLE[place.dtype].itemsize
        if self._taken[place.key] > (size := self._archive.storage_size(place.key) or 0):
            raise InvalidCartridge(
                f"{self._archive.path}: keys and values lie more than once over the {size} bytes of storage "
                f"{place.key!r:.80}",
                hint="save each as a tensor of its own: tensor.clone()",
            )
        if name not in self._read:
            data = self._archive.storage(place.key)
            self._read[name] = torch.frombuffer(data, dtype=READABLE[place.dtype])
        return self._read[name].as_strided(place.shape, place.strides, place.offset)
