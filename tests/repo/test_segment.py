import struct

import pytest
from blake3 import blake3

from kvist.errors import DamagedObject, NotFound
from kvist.repo.segment import encode_index, read_index
from kvist.store import MemoryStore

PAGES = [b"a" * 10, b"b" * 3, b"c" * 7]


def made(algorithm: str = "blake3") -> bytes:
    digests = [blake3(page).digest() for page in PAGES]
    return b"".join(PAGES) + encode_index(algorithm, digests, [len(page) for page in PAGES])


def read(data: bytes, algorithm: str = "blake3"):  # type: ignore[no-untyped-def]
    store = MemoryStore()
    store.put("segments/x", data)
    return read_index(store, "segments/x", len(data), 5.0, algorithm)


def test_index_reads_back() -> None:
    segment = read(made())
    assert segment.key == "segments/x" and segment.modified == 5.0
    assert segment.digests == [blake3(page).digest() for page in PAGES]
    assert [segment.span(i) for i in range(3)] == [(0, 10), (10, 3), (13, 7)]
    assert segment.data_bytes == 20


def test_the_format_is_pinned() -> None:
    digest = blake3(b"page").digest()
    index = digest + struct.pack("<Q", 4)
    footer = b"KVISTSEG" + struct.pack("<IIQQ", 1, 0, 1, 4) + blake3(index).digest()
    assert encode_index("blake3", [digest], [4]) == index + footer
    assert len(footer) == 64
    assert encode_index("sha256", [digest], [4])[52:56] == struct.pack("<I", 1)


def test_an_index_longer_than_one_read() -> None:
    digests = [blake3(bytes([i % 256, i // 256])).digest() for i in range(3000)]
    data = b"x" * 3000 + encode_index("blake3", digests, [1] * 3000)
    assert read(data).digests == digests


def test_every_flipped_bit_after_the_pages_is_found() -> None:
    data = made()
    for bit in range(8 * 20, 8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedObject):
            read(bytes(damaged))


def test_every_truncation_and_extension_is_found() -> None:
    data = made()
    for size in range(len(data)):
        with pytest.raises(DamagedObject):
            read(data[:size])
    with pytest.raises(DamagedObject):
        read(data + b"\0")
    with pytest.raises(DamagedObject):
        read(b"\0" + data)


def test_an_index_that_lies_under_a_good_checksum_is_refused() -> None:
    digest = blake3(b"page").digest()
    for lengths in ([2**63, 2**63], [0, 4], [2**64 - 1, 5]):
        index = b"".join(digest + struct.pack("<Q", length) for length in lengths)
        footer = b"KVISTSEG" + struct.pack("<IIQQ", 1, 0, 2, 4) + blake3(index).digest()
        with pytest.raises(DamagedObject):
            read(b"page" + index + footer)


def test_another_algorithm_is_refused() -> None:
    with pytest.raises(DamagedObject, match="uses sha256"):
        read(made(), "sha256")


def test_a_segment_that_is_gone_is_not_found() -> None:
    with pytest.raises(NotFound):
        read_index(MemoryStore(), "segments/x", 100, 0.0, "blake3")
