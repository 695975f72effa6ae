from pathlib import Path

import pytest

from kvist.errors import AlreadyExists, Conflict, DamagedObject, InvalidInput, InvalidName, StoreError
from kvist.repo import Ref, RefKind
from kvist.repo.manifest import canonical_json
from kvist.repo.refs import Refs
from kvist.store import LocalStore, MemoryStore, Store
from kvist.testing.faults import Refuse
from kvist.testing.faulty import FaultyStore

A, B, C = ("sha256:" + c * 64 for c in "abc")
BRANCH, TAG = RefKind.BRANCH, RefKind.TAG


@pytest.fixture
def refs(store: Store) -> Refs:
    return Refs(store)


def test_a_branch_is_made_moved_deleted_and_made_again(refs: Refs) -> None:
    made = refs.create(BRANCH, "main", A)
    assert refs.read(BRANCH, "main") == made == Ref(BRANCH, "main", A, made.etag)
    moved = refs.move(made, B)
    assert refs.read(BRANCH, "main") == moved
    refs.delete(moved)
    assert refs.read(BRANCH, "main") is None
    assert list(refs.all()) == []
    assert refs.names(BRANCH) == ["main"]
    refs.create(BRANCH, "main", C)
    assert [ref.cid for ref in refs.all()] == [C]


def test_a_tag_is_for_ever(refs: Refs) -> None:
    made = refs.create(TAG, "v1", A)
    with pytest.raises(AlreadyExists):
        refs.create(TAG, "v1", B)
    refs.delete(made)
    with pytest.raises(AlreadyExists, match="never used again"):
        refs.create(TAG, "v1", A)


def test_a_tag_that_is_withdrawn_never_was(refs: Refs) -> None:
    made = refs.create(TAG, "v1", A)
    refs.withdraw(made)
    again = refs.create(TAG, "v1", B)
    refs.withdraw(made)
    assert refs.read(TAG, "v1") == again, "not ours any more"


def test_whoever_is_second_loses(refs: Refs) -> None:
    made = refs.create(BRANCH, "main", A)
    refs.move(made, B)
    with pytest.raises(Conflict, match=f"expected {A}, it names {B} now"):
        refs.move(made, C)
    with pytest.raises(Conflict):
        refs.delete(made)
    with pytest.raises(AlreadyExists):
        refs.create(BRANCH, "main", C)


def test_names_below_one_another_live_together(refs: Refs) -> None:
    for name in ("a", "a/b", "a/b/c", "a.b", "a0"):
        refs.create(BRANCH, name, A)
    assert refs.names(BRANCH) == sorted(["a", "a/b", "a/b/c", "a.b", "a0"])
    assert [ref.name for ref in refs.all()] == refs.names(BRANCH)
    assert refs.names(TAG) == []


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a//b", "..", "a/../b", ".a", "-a", "a b", "é", "a\n", "a.ref", "a.lock/b", "a" * 201,
             "a" * 64, "sha256:" + "a" * 64, 5, None]
)  # fmt: skip
def test_refuses_a_bad_name_and_touches_nothing(tmp_path: Path, name: object) -> None:
    refs = Refs(LocalStore(tmp_path / "store"))
    for act in (refs.read, lambda kind, name: refs.create(kind, name, A)):
        with pytest.raises(InvalidName):
            act(BRANCH, name)  # type: ignore[arg-type, no-untyped-call]
    assert not (tmp_path / "store").exists()


def test_refuses_a_bad_cid(refs: Refs) -> None:
    for cid in ("x", A.upper(), "blake3:" + "a" * 64):
        with pytest.raises(InvalidInput):
            refs.create(BRANCH, "main", cid)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"null", b"\xff", b'{"cid":"x","kind":"kvist-ref","version":1}', b'{"cid":null,"version":1}',
     b'{"cid":null,"kind":"other","version":1}', b'{"cid":null,"kind":"kvist-ref","version":2}',
     b'{"cid": null,"kind":"kvist-ref","version":1}', b'{"cid":[],"kind":"kvist-ref","version":1}'],
)  # fmt: skip
def test_a_damaged_record_is_named_and_mended(refs: Refs, store: Store, data: bytes) -> None:
    store.put("refs/branches/main.ref", data)
    with pytest.raises(DamagedObject, match="branch main is unreadable"):
        refs.read(BRANCH, "main")
    with pytest.raises(DamagedObject):
        refs.create(BRANCH, "main", A)
    assert refs.mend(BRANCH, "main", B) == refs.read(BRANCH, "main")
    with pytest.raises(AlreadyExists, match="not damaged"):
        refs.mend(BRANCH, "main", A)


def test_every_flipped_bit_of_a_record_is_damage() -> None:
    store = MemoryStore()  # which of them is all the same here, and two thousand puts are not
    refs = Refs(store)
    refs.create(BRANCH, "main", A)
    data = store.get("refs/branches/main.ref")
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        store.put("refs/branches/main.ref", damaged)
        with pytest.raises(DamagedObject):
            refs.read(BRANCH, "main")


def test_the_record_of_another_ref_is_damage(refs: Refs, store: Store) -> None:
    refs.create(BRANCH, "main", A)
    refs.create(TAG, "main", B)
    store.put("refs/branches/main.ref", store.get("refs/tags/main.ref"))
    with pytest.raises(DamagedObject, match="changed, or is another's"):
        refs.read(BRANCH, "main")


def test_a_record_without_its_check_is_damaged(refs: Refs, store: Store) -> None:
    store.put("refs/branches/main.ref", canonical_json({"cid": A, "kind": "kvist-ref", "nonce": "", "version": 1}))
    with pytest.raises(DamagedObject, match="check"):
        refs.read(BRANCH, "main")


def test_a_store_that_does_not_answer_says_nothing_of_the_record(store: Store) -> None:
    Refs(store).create(BRANCH, "main", A)
    for ops in ({"get"}, {"head"}):
        refs = Refs(FaultyStore(store, Refuse(ops=ops)))  # type: ignore[arg-type]
        for act in (refs.read, lambda kind, name, refs=refs: refs.mend(kind, name, B)):
            with pytest.raises(StoreError, match="refused, as was wished"):
                act(BRANCH, "main")
    assert [ref.cid for ref in Refs(store).all()] == [A]
