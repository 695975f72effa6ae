"""A store that tells of its calls is a store, and tells the truth."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from kvist.errors import NotFound
from kvist.store import LocalStore, MemoryStore, Store, open_store
from kvist.store.base import Range
from kvist.store.recorded import RecordedStore
from kvist.telemetry import Recorder, recording
from kvist.testing.store import StoreTests


class Calls(Recorder):
    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()

    def store_call(self, call: str, seconds: float, *, nbytes: int, error: str | None) -> None:
        assert seconds >= 0
        self.calls[call] += 1
        self.bytes[call] += nbytes
        if error is not None:
            self.errors[call, error] += 1


def test_calls_bytes_and_errors() -> None:
    calls = Calls()
    with recording(calls), RecordedStore(MemoryStore()) as store:
        store.put("a", b"12345")
        store.put_many([("b", b"12"), ("c", b"1")], mode="create")
        with store.writer("d") as writer:
            writer.write(b"123")
            writer.write(b"4")
            writer.commit()
        with store.writer("left"):
            pass
        assert store.get("a", size=2) == b"12"
        store.get_ranges("a", [Range(1, memoryview(bytearray(3)))])
        assert store.view("a", 0, 4) == b"1234"
        with pytest.raises(NotFound):
            store.get("nothing")
        assert store.head("nothing") is None
        assert len(list(store.list())) == 4
        next(store.list())  # and left
        store.delete(["a"])
    moved = {"put": 5, "put_many": 3, "writer": 4, "get": 2, "get_ranges": 3, "view": 4}
    assert calls.bytes == moved | dict.fromkeys(("head", "list", "delete"), 0)
    assert calls.calls == Counter(put=1, put_many=1, writer=1, get=2, get_ranges=1, view=1, head=1, list=2, delete=1)
    assert calls.errors == {("get", "not_found"): 1}


def test_nobody_listens() -> None:
    store = RecordedStore(MemoryStore())
    store.put("a", b"1")
    assert store.get("a") == b"1"
    assert store == store.store


class TestRecordedStore(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return RecordedStore(LocalStore(tmp_path / "store"))

    def reopen(self, store: Store) -> Store:
        return RecordedStore(open_store(store.url))
