"""Signatures: keys and their files, what a signature vouches for, and the policy at checkout."""

import os
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import AlreadyExists, InvalidInput, NotFound, UntrustedSnapshot
from kvist.pager import SyntheticCachePager, capture, restore
from kvist.repo import Repository
from kvist.repo.signing import PrivateKey, PublicKey, Trust, sign, signature_prefix, signers
from kvist.store import MemoryStore

from .making import LAYOUT, halves, snapshot

CID = "sha256:" + "ab" * 32


def trust(*keys: PrivateKey) -> Trust:
    return Trust(tuple(key.public for key in keys))


def test_a_signature_by_a_trusted_key_is_found_and_any_other_refused() -> None:
    store, mine, other = MemoryStore(), PrivateKey.new("mine"), PrivateKey.new("other")
    with pytest.raises(UntrustedSnapshot, match="nobody has signed it") as refused:
        trust(mine).require(store, CID)
    assert "kvist sign" in (refused.value.hint or "")
    sign(store, CID, other)
    with pytest.raises(UntrustedSnapshot, match=f"signed by {other.public.id[:16]} only"):
        trust(mine).require(store, CID)
    assert sign(store, CID, mine) == f"{signature_prefix(CID)}{mine.public.id}"
    sign(store, CID, mine)  # the same again
    assert trust(mine).require(store, CID) == mine.public
    assert trust(other, mine).require(store, CID) == other.public
    assert sorted(signers(store, CID)) == sorted([mine.public.id, other.public.id])


def test_a_signature_of_another_snapshot_or_key_does_not_count() -> None:
    store, mine, other = MemoryStore(), PrivateKey.new(), PrivateKey.new()
    elsewhere = "sha256:" + "cd" * 32
    moved = store.get(sign(store, elsewhere, mine))
    store.put(signature_prefix(CID) + mine.public.id, moved)
    with pytest.raises(UntrustedSnapshot, match="does not verify"):
        trust(mine).require(store, CID)
    store.put(signature_prefix(CID) + mine.public.id, store.get(sign(store, CID, other)))
    with pytest.raises(UntrustedSnapshot, match="does not verify"):
        trust(mine).require(store, CID)


@given(st.data())
def test_no_changed_byte_goes_unseen(data: st.DataObject) -> None:
    store, mine = MemoryStore(), PrivateKey.new()
    where = sign(store, CID, mine)
    whole = store.get(where)
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytes([*whole[:at], whole[at] ^ data.draw(st.integers(1, 255)), *whole[at + 1 :]])
    store.put(where, data.draw(st.sampled_from([changed, whole[:at], whole + b" ", b""])))
    with pytest.raises(UntrustedSnapshot):
        trust(mine).require(store, CID)
    sign(store, CID, mine)  # heals it
    trust(mine).require(store, CID)


def test_a_private_key_is_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    key, path = PrivateKey.new("me"), tmp_path / "key"
    before = os.umask(0)
    try:
        key.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert PrivateKey.load(path).public.id == key.public.id
    with pytest.raises(AlreadyExists, match="never replaced"):
        key.save(path)
    path.chmod(0o640)
    with pytest.raises(InvalidInput, match="others can read") as refused:
        PrivateKey.load(path)
    assert "chmod 600" in (refused.value.hint or "")
    with pytest.raises(NotFound):
        PrivateKey.load(tmp_path / "none")


def test_a_passphrase_is_asked_for_and_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, path = PrivateKey.new(), tmp_path / "key"
    monkeypatch.setenv("KVIST_KEY_PASSPHRASE", "correct horse")
    key.save(path)
    assert b"ENCRYPTED" in path.read_bytes()
    assert PrivateKey.load(path).public == key.public
    assert PrivateKey.load(path, "correct horse").public == key.public
    for wrong in ("wrong horse", ""):
        monkeypatch.setenv("KVIST_KEY_PASSPHRASE", wrong)
        with pytest.raises(InvalidInput, match="passphrase") as refused:
            PrivateKey.load(path)
        assert not wrong or wrong not in str(refused.value)
    assert "PRIVATE" not in repr(key) and key.public.id[:8] not in repr(key._key)


def test_other_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    for data in (b"", b"no key", generate_private_key(SECP256R1()).private_bytes(*form)):
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(InvalidInput, match="no Ed25519 private key"):
            PrivateKey.load(path)


def test_a_file_of_trusted_keys(tmp_path: Path) -> None:
    one, two, path = PrivateKey.new("one of us"), PrivateKey.new(), tmp_path / "trusted"
    path.write_text(f"# who may sign\n\n{one.public.encode()}\n  {two.public.encode()}  \n")
    path.chmod(0o644)
    loaded = Trust.load(path)
    assert loaded.keys == (one.public, two.public) and loaded.keys[0].name == "one of us"
    path.chmod(0o664)
    with pytest.raises(InvalidInput, match="others can change"):
        Trust.load(path)
    path.chmod(0o600)
    for wrong in ("", "# nobody\n", "ed25519 AAAA\n", "rsa " + one.public.encode(), one.public.encode()[:-20], "\xff"):
        path.write_bytes(wrong.encode("latin-1"))
        with pytest.raises(InvalidInput):
            Trust.load(path)
    with pytest.raises(NotFound):
        Trust.load(tmp_path / "none")


@given(st.binary(min_size=32, max_size=32), st.text(st.characters(categories=["L", "N"]), max_size=10))
def test_a_public_key_reads_back(raw: bytes, name: str) -> None:
    key = PublicKey(raw, name)
    assert PublicKey.parse(key.encode()) == key
    assert not key.has_signed(CID, b"") and not key.has_signed(CID, bytes(64))


def test_checkout_under_a_policy(tmp_path: Path) -> None:
    store, key = MemoryStore(), PrivateKey.new()
    with Repository.init(store) as repo:
        cid = snapshot(repo, halves(2)).cid
    with Repository.open(store, trust=trust(key)) as repo:
        with pytest.raises(UntrustedSnapshot):
            repo.require_trusted(cid)
        sign(store, cid, key)
        repo.require_trusted(cid)
        fork = repo.fork(cid, 1)[0].cid
        with pytest.raises(UntrustedSnapshot):  # a snapshot vouches for its bytes, not for who continues it
            repo.require_trusted(fork)


def test_restore_asks_for_the_signature() -> None:
    store, key = MemoryStore(), PrivateKey.new()
    with Repository.init(store, salt="5a" * 32) as repo:
        pager = SyntheticCachePager(LAYOUT)
        done = capture(pager, repo, branch="main")
    with Repository.open(store, trust=trust(key)) as repo:
        with pytest.raises(UntrustedSnapshot):
            restore(SyntheticCachePager(LAYOUT), repo, "main")
        sign(store, done.snapshot.cid, key)
        restore(SyntheticCachePager(LAYOUT), repo, "main")
