"""The config: its two versions, salts, limits; and what a salted repository's pages and objects are."""

import hashlib
import hmac
import json
from dataclasses import replace

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import Conflict, InvalidInput, InvalidManifest, StoreFull
from kvist.hashing import DIGESTS, block_root, block_salt, keyed_digest
from kvist.repo import Repository, record
from kvist.repo.config import CONFIG, CONFIG_MAX, RepositoryConfig
from kvist.repo.manifest import Manifest
from kvist.store import MemoryStore, Quota

from .making import LAYOUT, halves, manifest, snapshot

SALT, OTHER = "5a" * 32, "5b" * 32


@given(
    st.sampled_from(["blake3", "sha256"]),
    st.sampled_from(["", SALT]),
    st.builds(Quota, st.none() | st.integers(0, 2**62), st.none() | st.integers(0, 2**62)),
)
def test_reads_back(page_digest: str, salt: str, quota: Quota) -> None:
    config = RepositoryConfig("id", page_digest, salt, quota)
    assert RepositoryConfig.decode(config.encode(), "here") == config
    document = json.loads(config.encode())
    assert document["version"] == (2 if salt else 1)
    assert ("salt" in document, "quota" in document) == (bool(salt), bool(quota))
    assert SALT not in repr(config) + config.page_identity + config.block_salt


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3}, {"version": 2}, {"version": True}, {"salt": SALT}, {"version": 2, "salt": SALT[:-1]},
        {"version": 2, "salt": SALT.upper()}, {"version": 2, "salt": 5}, {"id": None}, {"page_digest": "md5"},
        {"quota": []}, {"quota": {"pages": 1}}, {"quota": {"bytes": -1}}, {"quota": {"bytes": "1"}}, {"format": "x"},
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(changes: dict[str, object]) -> None:
    document = {"format": "kvist-repository", "id": "abc", "page_digest": "blake3", "version": 1} | changes
    with pytest.raises(InvalidManifest, match="here") as refused:
        RepositoryConfig.decode(record.encode(CONFIG, document), "here")
    assert SALT not in str(refused.value)
    with pytest.raises(InvalidManifest):
        RepositoryConfig.decode(b" " * (CONFIG_MAX + 1), "here")


def test_a_changed_digit_is_seen() -> None:
    """A changed salt would make every page look damaged."""
    data = RepositoryConfig("abc", salt=SALT).encode()
    with pytest.raises(InvalidManifest, match="check"):
        RepositoryConfig.decode(data.replace(b"5a5a", b"5a5b", 1), "here")


def test_keyed_digests() -> None:
    raw = bytes.fromhex(SALT)
    key = blake3(raw, derive_key_context="kvist page digest v1").digest()
    assert keyed_digest("blake3", raw)(b"x") == blake3(b"x", key=key).digest()
    assert keyed_digest("sha256", raw)(b"x") == hmac.digest(key, b"x", hashlib.sha256)
    for algorithm in DIGESTS:
        found = {DIGESTS[algorithm](b"x"), *(keyed_digest(algorithm, bytes.fromhex(s))(b"x") for s in (SALT, OTHER))}
        assert len(found) == 3 and {len(each) for each in found} == {32}
    salts = {block_salt(raw), block_salt(bytes.fromhex(OTHER)), key.hex(), SALT}
    assert len(salts) == 4
    assert block_root(block_salt(raw)) != block_root()


@pytest.mark.parametrize("page_digest", ["blake3", "sha256"])
def test_pages_of_a_salted_repository(page_digest: str) -> None:
    data, stores = halves(3), (MemoryStore(), MemoryStore(), MemoryStore())
    named = []
    for store, salt in zip(stores, (SALT, OTHER, ""), strict=True):
        with Repository.init(store, page_digest=page_digest, salt=salt) as repo:
            put = repo.put_pages(data)
            assert put.new_pages == 6 and repo.put_pages(data).new_pages == 0
            assert [repo.pages.get(name) for name in put.digests] == data
            assert repo.pages.verify(put.digests) == []
            named.append(set(put.digests))
        with Repository.open(store) as repo:
            assert repo.config.salt == salt and repo.pages.verify(put.digests) == []
    assert not named[0] & named[1] and not named[0] & named[2] and not named[1] & named[2]
    assert len({RepositoryConfig("i", page_digest, salt).page_identity for salt in (SALT, OTHER, "")}) == 3


def test_a_snapshot_of_a_salted_repository() -> None:
    store = MemoryStore()
    with Repository.init(store, salt=SALT) as repo:
        digests = repo.put_pages(halves(2)).digests
        pages = tuple(
            replace(page, k=digests[2 * number], v=digests[2 * number + 1])
            for number, page in enumerate(manifest(halves(2)).pages)
        )
        made = repo.commit([Manifest(LAYOUT, pages)], branch="main")
        assert repo.snapshot("main").cid == made.cid
        fork = repo.fork("main", 2)
        assert len(fork) == 2


def test_a_quota_counts_for_whoever_opens_it_next() -> None:
    store = MemoryStore()
    with Repository.init(store) as repo:
        snapshot(repo, halves(1))
        repo.set_quota(Quota(max_snapshots=1))
        snapshot(repo, halves(2))  # it was open
    with Repository.open(store) as repo:
        assert repo.config.quota == Quota(max_snapshots=1)
        with pytest.raises(StoreFull, match="the limit is 1"):
            snapshot(repo, halves(3))
        repo.set_quota(Quota())
    with Repository.open(store) as repo:
        snapshot(repo, halves(3))
        assert repo.store is store


def test_two_who_set_a_quota() -> None:
    class Slow(MemoryStore):
        def get(self, key: str, **more: int) -> bytes:  # type: ignore[override]
            found = super().get(key, **more)
            if key == CONFIG and racing:
                racing.pop()
                super().put(CONFIG, RepositoryConfig("x", quota=Quota(1)).encode())
            return found

    racing: list[bool] = []
    with Repository.init(Slow()) as repo:
        racing.append(True)
        with pytest.raises(Conflict):
            repo.set_quota(Quota(2))


def test_damaged_pages_heal_at_the_limit() -> None:
    store = MemoryStore()
    data = halves(2)
    with Repository.init(store) as repo:
        digests = repo.put_pages(data).digests
        (info,) = store.list("segments/")
        whole = store.get(info.key)
        repo.set_quota(Quota(max_bytes=sum(each.size for each in store.list()) + 200))
    store.put(info.key, bytes([whole[0] ^ 1]) + whole[1:])
    with Repository.open(store) as repo:
        with pytest.raises(StoreFull):
            repo.put_pages(halves(1, seed=9))
        assert repo.pages.verify(digests) == digests[:1]
        assert repo.put_pages(data).new_pages == 1
        assert repo.pages.verify(digests) == []


def test_a_salt_is_32_bytes() -> None:
    with pytest.raises(InvalidInput) as refused:
        Repository.init(MemoryStore(), salt="secret")
    assert "secret" not in str(refused.value)
