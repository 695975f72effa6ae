"""The container of `torch.save`: a zip file whose records lie uncompressed, read record by record.

Knows the zip format and torch's names of records. Must not know pickles. Nothing is extracted to a disk, so that a
record's name cannot lead anywhere; nothing is decompressed, so that a record cannot be larger than the file; and every
record's checksum is compared as it is read.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, Final, Self

from kvist.errors import DamagedCartridge, InvalidCartridge, UnsafeCheckpoint

MAGIC: Final = b"PK\x03\x04"
"""How the container begins."""

_CHUNK: Final = 16 << 20
_DIRECTORY_MAX: Final = 32 << 20
_ENTRIES_MAX: Final = 100_000
_PICKLE_MAX: Final = 1 << 20
"""That of a cartridge of 200 layers has 100 kB: the numbers are in other records."""

_END: Final = struct.Struct("<4sHHHHIIH")
_END64: Final = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR: Final = struct.Struct("<4sIQI")
_BROKEN: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""What `zipfile` raises over files that were not written by a zip writer."""


class TorchArchive:
    """An open file of `torch.save`.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the list of records. The caller keeps ``file`` open and closes it.

        Raises:
            InvalidCartridge: it is no archive, or none that `torch.save` writes.
            UnsafeCheckpoint: it holds a TorchScript program.
        """
        self.path = path
        size = os.fstat(file.fileno()).st_size
        _check_directory(path, file, size)
        try:
            self._zip = zipfile.ZipFile(file)
        except _BROKEN as error:
            raise InvalidCartridge(f"{path} is a broken zip file: {error}") from None
        infos = self._zip.infolist()
        self._records = {info.filename: info for info in infos}
        parts = [name.split("/") for name in self._records]
        roots = [part[0] for part in parts if part[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise InvalidCartridge(f"{path} is a zip file, but not of torch.save: {len(roots)} records named data.pkl")
        self._root = roots[0]
        if self._has("constants.pkl") or any(part[:2] == [self._root, "code"] for part in parts):
            raise UnsafeCheckpoint(f"{path} is a TorchScript program, not a checkpoint of tensors")
        self._check(infos, size)
        order = self._read("byteorder", 16) if self._has("byteorder") else b"little"
        if order != b"little":
            raise InvalidCartridge(f"{path} must be of a little-endian machine, got {bytes(order)!r}")

    def _check(self, infos: list[zipfile.ZipInfo], size: int) -> None:
        """Refuse what `torch.save` does not write, and what could come out larger than the file."""
        if not len(infos) == len(self._records) <= _ENTRIES_MAX:
            raise InvalidCartridge(
                f"{self.path}: expected at most {_ENTRIES_MAX} records, each name once, got {len(infos)}"
            )
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise InvalidCartridge(
                    f"{self.path}: record {info.filename!r:.80} is compressed, which torch.save does not do"
                )
            if info.flag_bits & 1:
                raise InvalidCartridge(f"{self.path}: record {info.filename!r:.80} is encrypted")
        if sum(info.file_size for info in infos) > size:
            raise InvalidCartridge(f"{self.path}: its records are larger than the file, so they overlap")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def pickle(self) -> bytes:
        """The record that says which tensors there are.

        Raises:
            InvalidCartridge: it is larger than any of a cartridge.
        """
        return bytes(self._read("data.pkl", _PICKLE_MAX))

    def storage_size(self, key: str) -> int | None:
        """Bytes of a storage; ``None``: there is none by that key."""
        info = self._records.get(f"{self._root}/data/{key}")
        return None if info is None else info.file_size

    def storage(self, key: str) -> bytearray:
        """The bytes of a storage that is there; the caller's own.

        Raises:
            DamagedCartridge: they do not have the checksum that the file says.
        """
        return self._read(f"data/{key}", 1 << 62)

    def _has(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._records

    def _read(self, name: str, at_most: int) -> bytearray:
        info = self._records[f"{self._root}/{name}"]
        if info.file_size > at_most:
            raise InvalidCartridge(f"{self.path}: {name} has {info.file_size:,} bytes, expected at most {at_most:,}")
        data = bytearray(info.file_size)
        done = 0
        try:
            with self._zip.open(info) as record:
                while chunk := record.read(_CHUNK):  # on to the end, where the checksum is compared
                    data[done : done + len(chunk)] = chunk
                    done += len(chunk)
        except _BROKEN as error:
            raise DamagedCartridge(f"{self.path}: cannot read its record {name}: {error}") from None
        if done != len(data):
            raise DamagedCartridge(f"{self.path}: its record {name} has {done} bytes, expected {len(data)}")
        return data


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Refuse a list of records that is too long, before it is read."""
    tail_size = _END64.size + _LOCATOR.size + _END.size
    file.seek(max(0, size - tail_size))
    tail = file.read(tail_size)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise InvalidCartridge(f"{path} is cut off, or no file of torch.save: it does not end as a zip file")
    directory = _END.unpack(tail[-_END.size :])[5]
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\x06\x07" and len(tail) == tail_size:
        directory = _END64.unpack(tail[: _END64.size])[8]
    if directory > _DIRECTORY_MAX:
        raise InvalidCartridge(
            f"{path}: its list of records has {directory:,} bytes, at most {_DIRECTORY_MAX:,} may be"
        )
