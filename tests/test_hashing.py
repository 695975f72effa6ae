import hashlib

from blake3 import blake3

from kvist.hashing import DIGESTS, block_root, extend_block_hashes, sha256_cid

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_known_digests() -> None:
    assert sha256_cid(b"") == "sha256:" + EMPTY
    assert DIGESTS["sha256"](b"").hex() == EMPTY
    assert DIGESTS["blake3"](b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    for digest in DIGESTS.values():
        assert digest(b"abc") == digest(bytearray(b"abc")) == digest(memoryview(b"abc"))
        assert len(digest(b"abc")) == 32
    assert DIGESTS["sha256"](b"abc") == hashlib.sha256(b"abc").digest()


def test_block_hashes_name_the_whole_prefix() -> None:
    ids = list(range(100))
    hashes: list[bytes] = []
    extend_block_hashes(hashes, ids, 16)
    assert len(hashes) == 6, "the last block is not full"
    first = blake3(block_root() + b"".join(i.to_bytes(4, "little") for i in range(16))).digest()
    assert hashes[0] == first
    other: list[bytes] = []
    extend_block_hashes(other, [*ids[:20], 999, *ids[21:]], 16)
    assert [a == b for a, b in zip(hashes, other, strict=True)] == [True] + [False] * 5


def test_growing_gives_the_same_as_all_at_once() -> None:
    ids = list(range(70))
    whole: list[bytes] = []
    extend_block_hashes(whole, ids, 8)
    grown: list[bytes] = []
    for end in (0, 3, 8, 9, 40, 70, 70):
        extend_block_hashes(grown, ids[:end], 8)
    assert grown == whole
    salted: list[bytes] = []
    extend_block_hashes(salted, ids, 8, salt="tenant")
    assert not set(salted) & set(whole)
