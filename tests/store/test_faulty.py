from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import IntegrityError, NotFound, StoreError, StoreFull
from kvist.store import LocalStore, Match, MemoryStore, Range, Store
from kvist.testing.faults import OPS, Delay, Fault, Full, Lag, Op, Refuse, Rot, Tear
from kvist.testing.faulty import FaultyStore
from kvist.testing.store import StoreTests

DATA = bytes(range(256)) * 40


class TestWithoutFaults(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return FaultyStore(LocalStore(tmp_path / "store", durable=False))

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, FaultyStore)
        return FaultyStore(store.store)


class TestWithFaultsThatNeverHappen(TestWithoutFaults):
    def make_store(self, tmp_path: Path) -> Store:
        never = (Refuse(chance=0), Tear(chance=0), Rot(at=()), Lag(calls=0), Full(room=1 << 40), Delay(seconds=0))
        return FaultyStore(MemoryStore(), *never)


CALLS: dict[Op, Callable[[Store], object]] = {
    "get": lambda store: store.get("a/1"),
    "get_ranges": lambda store: store.get_ranges("a/1", [Range(0, memoryview(bytearray(4)))]),
    "head": lambda store: store.head("a/1"),
    "list": lambda store: [*store.list("a/")],
    "put": lambda store: store.put("a/new", b"new"),
    "write": lambda store: write(store, "a/new", b"new"),
    "commit": lambda store: write(store, "a/new", b"new"),
    "delete": lambda store: store.delete(["a/1"]),
    "clean": lambda store: store.clean(0),
}


def write(store: Store, key: str, *pieces: bytes) -> None:
    with store.writer(key) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.commit()


def filled() -> MemoryStore:
    store = MemoryStore()
    for number, key in enumerate(("a/1", "a/2", "b/1")):
        store.put(key, bytes(number ^ byte for byte in DATA))  # no two alike at any place
    return store


def content(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_refused_call_has_no_effect_and_one_whose_answer_is_lost_has(op: Op, after: bool) -> None:
    below, healthy = filled(), filled()
    before = content(below)
    store = FaultyStore(below, Refuse(ops={op}, after=after, times=1))
    with pytest.raises(StoreError, match="the answer was lost" if after else "refused, as was wished"):
        CALLS[op](store)
    CALLS[op](healthy)
    has_effect = after and op != "write"  # a writer that failed once is finished
    assert content(below) == (content(healthy) if has_effect else before)
    assert [(fired.op, type(fired.fault)) for fired in store.fired] == [(op, Refuse)]
    if not has_effect:
        CALLS[op](store)
        assert content(below) == content(healthy)


def test_the_error_is_the_one_that_was_chosen() -> None:
    store = FaultyStore(MemoryStore(), Refuse(error=TimeoutError))
    with pytest.raises(TimeoutError):
        store.head("a")


def test_which_calls_it_hits() -> None:
    store = FaultyStore(filled(), Refuse(ops={"get"}, prefix="a/", at={2, 4}))
    store.get("a/1")
    store.get("b/1")
    with pytest.raises(StoreError):
        store.get("a/2")
    store.active = False
    for _ in range(5):
        store.get("a/1")
    store.active = True
    store.get("a/1")
    with pytest.raises(StoreError):
        store.get("a/1")
    assert store.calls == 5 and [fired.key for fired in store.fired] == ["a/2", "a/1"]


def test_objects_of_a_batch_and_keys_of_a_deletion_fail_one_by_one() -> None:
    below = filled()
    store = FaultyStore(below, Refuse(ops={"put"}, at={2}), Refuse(ops={"delete"}, at={2}))
    with pytest.raises(StoreError):
        store.put_many([("c/1", b""), ("c/2", b""), ("c/3", b"")], mode="create")
    with pytest.raises(StoreError):
        store.delete(["a/1", "a/2", "b/1"])
    gone = {"a/1", "a/2", "b/1"} - content(below).keys()  # in whatever order
    assert len(gone) == 1 and content(below).keys() == {"a/1", "a/2", "b/1", "c/1"} - gone


@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 3))
def test_a_seed_tells_all(seed: int, chance: float, times: int) -> None:
    def run() -> list[object]:
        store = FaultyStore(filled(), Rot(chance=chance), Refuse(chance=chance, times=times), seed=seed)
        found: list[object] = []
        for _ in range(20):
            try:
                found.append(store.get("a/1"))
            except StoreError as error:
                found.append(str(error))
        assert sum(isinstance(one, str) for one in found) == sum(isinstance(f.fault, Refuse) for f in store.fired)
        assert sum(isinstance(f.fault, Refuse) for f in store.fired) <= times
        return found

    assert run() == run()


def test_delays_are_slept_and_faults_add_up() -> None:
    slept: list[float] = []
    faults: list[Fault] = [Delay(seconds=1), Delay(seconds=2, ops={"get"}), Refuse(ops={"get"})]
    store = FaultyStore(filled(), *faults, sleep=slept.append)
    store.head("a/1")
    with pytest.raises(StoreError):
        store.get("a/1")
    assert slept == [1, 1, 2]


@pytest.mark.parametrize("silent", [True, False])
def test_a_torn_write_leaves_a_prefix(silent: bool) -> None:
    below = MemoryStore()
    store = FaultyStore(below, Tear(keep=0.25, silent=silent))
    for act in (lambda: store.put("p", DATA), lambda: write(store, "w", DATA[:100], DATA[100:])):
        if silent:
            act()
        else:
            with pytest.raises(StoreError, match="cut short"):
                act()
    assert content(below) == {key: DATA[: len(DATA) // 4] for key in "pw"}


def test_a_full_store_takes_no_more_and_leaves_nothing_half_written() -> None:
    below = filled()
    store = FaultyStore(below, Full(room=10, prefix="a/"))
    before = content(below)
    with pytest.raises(StoreFull, match="0 of 10 bytes are used, wanted 11 more"):
        store.put("a/3", bytes(11))
    with pytest.raises(StoreFull):
        write(store, "a/3", bytes(6), bytes(6))
    assert content(below) == before
    write(store, "a/3", bytes(6))
    store.put("b/2", bytes(100))
    with pytest.raises(StoreFull):
        store.put("a/4", bytes(5))
    store.put("a/4", bytes(4))
    store.delete(["a/3", "a/none"])
    store.put("a/5", bytes(6))
    assert {type(fired.fault) for fired in store.fired} == {Full}


@pytest.mark.parametrize("how", ["flip", "cut", "zero", "other"])
def test_rot_gives_wrong_bytes_and_leaves_what_is_stored(how: str) -> None:
    below = filled()
    before = content(below)
    whole = before["a/1"]
    for seed in range(20):
        store = FaultyStore(below, Rot(how=how, times=1), seed=seed)  # type: ignore[arg-type]
        read = store.get("a/1")
        assert store.get("a/1") == whole
        match how:
            case "flip":
                assert sum((a ^ b).bit_count() for a, b in zip(read, whole, strict=True)) == 1
            case "cut":
                assert len(read) < len(whole) and whole.startswith(read)
            case "zero":
                assert len(read) == len(whole)
                assert all(a == b or a == 0 for a, b in zip(read, whole, strict=True))
            case "other":
                assert read == before["a/2"]
        outs = [bytearray(10), bytearray(50)]
        store = FaultyStore(below, Rot(how=how, times=1), seed=seed)  # type: ignore[arg-type]
        ranges = [Range(0, memoryview(outs[0])), Range(30, memoryview(outs[1]))]
        if how == "cut":
            with pytest.raises(IntegrityError, match="ends early"):
                store.get_ranges("a/1", ranges)
        else:
            store.get_ranges("a/1", ranges)
            assert how == "zero" or (bytes(outs[0]) != whole[:10]) != (bytes(outs[1]) != whole[30:80])
    assert content(below) == before


def test_nothing_rots_to_nothing_and_the_only_object_is_flipped() -> None:
    below = MemoryStore()
    below.put("a", b"")
    assert FaultyStore(below, Rot()).get("a") == b""
    below.put("a", b"x")
    (found,) = FaultyStore(below, Rot(how="other")).get("a")
    assert (found ^ ord("x")).bit_count() == 1


def test_listings_lag() -> None:
    below = filled()
    store = FaultyStore(below, Lag(ops={"list"}, calls=2))
    store.put("a/3", b"new")
    assert store.get("a/3") == b"new"
    assert [info.key for info in store.list("a/")] == ["a/1", "a/2"]
    assert [info.key for info in store.list("a/")] == ["a/1", "a/2", "a/3"]
    store.delete(["a/1", "b/1"])
    assert [info.key for info in store.list("a/")] == ["a/1", "a/2", "a/3"]
    assert store.head("a/1") is None
    assert [info.key for info in store.list()] == ["a/2", "a/3"]


def test_reads_lag_and_a_swap_by_an_old_etag_still_fails() -> None:
    below = MemoryStore()
    store = FaultyStore(below, Lag(calls=3, prefix="n"))
    old = store.put("n", b"1")
    with pytest.raises(NotFound):
        store.get("n")
    assert store.head("n") is None
    with pytest.raises(NotFound):
        store.get_ranges("n", [])
    assert store.get("n") == b"1"
    store.put("n", b"two", mode=Match(old))
    assert store.get("n") == b"1"
    out = bytearray(1)
    store.get_ranges("n", [Range(0, memoryview(out))])
    assert out == b"1"
    info = store.head("n")
    assert info is not None and (info.etag, info.size) == (old, 1)
    with pytest.raises(StoreError.__base__, match="changed"):  # type: ignore[arg-type]
        store.put("n", b"3", mode=Match(info.etag))
    assert below.get("n") == b"two"
