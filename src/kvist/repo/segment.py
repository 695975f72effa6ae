"""Segments: files that hold many pages back to back, with their index at the end.

Knows the byte format of one segment (docs/spec/repository.md). Must not know which pages anybody needs.

    pages, back to back | index: (digest 32 B, length u64) a page | footer, 64 B

The footer is magic, version, algorithm, page count, bytes of all pages and the BLAKE3 of the index; integers are
little-endian. The index comes last so that a segment is written in one pass; a segment becomes visible under its key
only when it is complete, so one without a good footer is damaged, never half-written.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from kvist.errors import DamagedObject
from kvist.ids import ALGORITHMS
from kvist.store import Store

PREFIX: Final = "segments/"
_MAGIC: Final = b"KVISTSEG"
_FOOTER: Final = struct.Struct("<8sIIQQ32s")
_ENTRY: Final = struct.Struct("<32sQ")
_GUESS: Final = 64 * 1024
_GUESS_MAX: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """The index of one segment.

    Attributes:
        key: its key in the store.
        digests: raw digests of its pages, in order.
        offsets: where each page starts; one more entry than pages, the last is the bytes of all pages.
        modified: when it was written, seconds since the epoch by the store's clock.
    """

    key: str
    digests: Sequence[bytes]
    offsets: array[int]
    modified: float

    @property
    def data_bytes(self) -> int:
        """Bytes of all its pages."""
        return self.offsets[-1]

    def span(self, entry: int) -> tuple[int, int]:
        """Offset and length of page number ``entry``."""
        start = self.offsets[entry]
        return start, self.offsets[entry + 1] - start


def encode_index(algorithm: str, digests: Sequence[bytes], lengths: Sequence[int]) -> bytes:
    """Index and footer for pages already written."""
    index = b"".join(map(_ENTRY.pack, digests, lengths))
    footer = _FOOTER.pack(_MAGIC, 1, ALGORITHMS.index(algorithm), len(digests), sum(lengths), blake3(index).digest())
    return index + footer


def index_of(key: str, digests: Sequence[bytes], lengths: Iterable[int], modified: float) -> Segment:
    """The index of a segment of these pages."""
    return Segment(key, digests, array("Q", itertools.accumulate(lengths, initial=0)), modified)


def read_index(store: Store, key: str, size: int, modified: float, algorithm: str) -> Segment:
    """Read and check the index of a segment of ``size`` bytes.

    Raises:
        DamagedObject: it is too short, or footer and index do not agree.
        NotFound: it is gone.
    """
    tail = store.get(key, start=max(0, size - _GUESS))
    if len(tail) < _FOOTER.size:
        raise DamagedObject(f"{key}: {size} bytes are too few for a segment")
    magic, version, code, count, data_bytes, checksum = _FOOTER.unpack(tail[-_FOOTER.size :])
    if magic != _MAGIC or version != 1:
        raise DamagedObject(f"{key}: no segment footer at its end; it is cut short or overwritten")
    if code >= len(ALGORITHMS) or ALGORITHMS[code] != algorithm:
        raise DamagedObject(f"{key}: its footer names digest algorithm {code}, the repository uses {algorithm}")
    index_bytes = count * _ENTRY.size
    if data_bytes + index_bytes + _FOOTER.size != size:
        raise DamagedObject(
            f"{key}: its footer tells of {data_bytes + index_bytes + _FOOTER.size} bytes, it has {size}"
        )
    index = (
        tail[-_FOOTER.size - index_bytes : -_FOOTER.size]
        if index_bytes + _FOOTER.size <= len(tail)
        else store.get(key, start=data_bytes, size=index_bytes)
    )
    if blake3(index).digest() != checksum:
        raise DamagedObject(f"{key}: its index does not match the checksum in its footer")
    entries = list(_ENTRY.iter_unpack(index))
    lengths = [length for _, length in entries]
    if sum(lengths) != data_bytes or 0 in lengths:
        raise DamagedObject(
            f"{key}: its index tells of {sum(lengths)} bytes in pages of {min(lengths, default=0)} bytes or more, "
            f"its footer of {data_bytes}"
        )
    return index_of(key, [digest for digest, _ in entries], lengths, modified)


def guess_lengths(store: Store, key: str, size: int) -> list[int]:
    """Lengths of the pages of a segment of ``size`` bytes whose index cannot be trusted; none where they do not fit.

    The entries are read from the last to the first, until pages, entries and footer together make up the segment: the
    one number of them at which they do, were it not damaged.
    """
    tail = store.get(key, start=max(0, size - _GUESS_MAX))
    lengths: list[int] = []
    total = _FOOTER.size
    for end in range(len(tail) - _FOOTER.size, _ENTRY.size - 1, -_ENTRY.size):
        _, length = _ENTRY.unpack_from(tail, end - _ENTRY.size)
        lengths.append(length)
        total += length + _ENTRY.size
        if total >= size or not length:
            break
    return lengths[::-1] if total == size else []
