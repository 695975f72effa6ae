from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvist.errors import NotFound, StoreError
from kvist.store import (
    DelayedStore,
    MemoryStore,
    MeteredStore,
    Range,
    ReadOnlyStore,
    Store,
    Traffic,
    WrapperStore,
)
from kvist.testing.store import StoreTests


class TestWrapperStore(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return WrapperStore(MemoryStore())

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, WrapperStore)
        return WrapperStore(store.store)


class TestMeteredStore(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return MeteredStore(MemoryStore())

    def test_counts(self) -> None:
        store = MeteredStore(MemoryStore())
        store.put("a", b"12345")
        store.put_many([("b", b"1"), ("c", memoryview(b"22"))], mode="create")
        with store.writer("d") as writer:
            writer.write(b"xy")
            writer.write(b"z")
            writer.commit()
        store.get("a", size=2)
        store.get_ranges("a", [Range(0, memoryview(bytearray(3))), Range(4, memoryview(bytearray(1)))])
        store.view("a", 1, 3)
        store.head("a")
        store.delete(["a", "b"])
        [*store.list()]
        with pytest.raises(NotFound):
            store.get("a")
        assert store.traffic() == {
            "put": Traffic(1, 1, 5),
            "put_many": Traffic(1, 2, 3),
            "writer": Traffic(1, 1, 3),
            "get": Traffic(2, 2, 2),
            "get_ranges": Traffic(1, 1, 4),
            "view": Traffic(1, 1, 3),
            "head": Traffic(1, 1, 0),
            "delete": Traffic(1, 2, 0),
            "list": Traffic(1, 0, 0),
        }
        assert (store.bytes_written, store.bytes_read) == (11, 9)
        store.reset()
        assert store.traffic() == {}

    def test_threads_lose_no_count(self) -> None:
        store = MeteredStore(MemoryStore())
        with ThreadPoolExecutor(8) as pool:
            [*pool.map(lambda i: store.put(f"k/{i % 8}", b"123"), range(4000))]
        assert store.traffic() == {"put": Traffic(4000, 4000, 12_000)}


class TestDelayedStore(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return DelayedStore(MemoryStore(), latency=1.0, bandwidth=1.0, sleep=lambda seconds: None)

    def test_delays(self) -> None:
        slept: list[float] = []
        store = DelayedStore(MemoryStore(), latency=0.5, bandwidth=10.0, sleep=slept.append)

        def seconds() -> float:
            total = sum(slept)
            slept.clear()
            return total

        store.put("a", bytes(20))
        assert seconds() == 2.5
        store.put_many([("b", bytes(10)), ("c", bytes(5))], mode="create")
        assert seconds() == 2.0
        store.get("a", size=5)
        assert seconds() == 1.0
        store.get_ranges("a", [Range(0, memoryview(bytearray(10))), Range(10, memoryview(bytearray(10)))])
        assert seconds() == 2.5
        store.view("a", 5, 15)
        assert seconds() == 2.0
        with store.writer("d") as writer:
            writer.write(bytes(15))
            writer.commit()
        assert seconds() == 2.0
        for act in (lambda: store.head("a"), store.list, lambda: store.delete(["a", "b"])):
            act()
            assert seconds() == 0.5

    def test_boundless(self) -> None:
        slept: list[float] = []
        store = DelayedStore(MemoryStore(), latency=0.25, sleep=slept.append)
        store.put("a", bytes(1000))
        assert sum(slept) == 0.25


def test_read_only() -> None:
    below = MemoryStore()
    below.put("a/b", b"123")
    store = ReadOnlyStore(below)
    for call in (
        lambda: store.put("c", b""),
        lambda: store.put_many([], mode="create"),
        lambda: store.writer("c"),
        lambda: store.delete([]),
        lambda: store.clean(0),
    ):
        with pytest.raises(StoreError, match="read only"):
            call()
    assert store.get("a/b") == b"123"
    out = bytearray(2)
    store.get_ranges("a/b", [Range(1, memoryview(out))])
    assert store.view("a/b", 1, 2) == b"23"
    assert out == b"23"
    assert [*store.list("a/")] == [store.head("a/b")]
