import pytest

from kvist.store import MemoryStore
from kvist.testing.faults import CrashingStore, SimulatedCrash


@pytest.mark.parametrize("after", [False, True])
def test_it_dies_at_the_chosen_write_and_stays_dead(after: bool) -> None:
    below = MemoryStore()
    store = CrashingStore(below, 3, after=after)
    store.put("a", b"1")
    store.put("b", b"2")
    with pytest.raises(SimulatedCrash):
        store.put_many([("c", b"3"), ("d", b"4")], mode="create")
    assert [info.key for info in below.list()] == ["a", "b"] + ["c"] * after
    for act in (lambda: store.put("x", b""), lambda: store.delete(["a"]), lambda: store.writer("x")):
        with pytest.raises(SimulatedCrash):
            act()
    assert store.is_dead and below.get("a") == b"1"


def test_a_batch_of_deletions_and_a_writer() -> None:
    below = MemoryStore()
    for key in "abc":
        below.put(key, b"")
    store = CrashingStore(below)
    store.arm(2)
    with pytest.raises(SimulatedCrash):
        store.delete("abc")
    assert [info.key for info in below.list()] == ["b", "c"]
    store = CrashingStore(below, 1, after=True)
    with pytest.raises(SimulatedCrash), store.writer("w") as writer:
        writer.write(b"data")
        writer.commit()
    assert below.get("w") == b"data"
    store = CrashingStore(below, 1)
    with pytest.raises(SimulatedCrash), store.writer("v") as writer:
        writer.write(b"data")
        writer.commit()
    assert below.head("v") is None
    called = []
    store = CrashingStore(below, 1, crash=lambda: called.append(1))
    with pytest.raises(SimulatedCrash):
        store.put("z", b"")
    assert called == [1]
