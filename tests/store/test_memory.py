from pathlib import Path

from kvist.store import MemoryStore, ObjectWriter, Store, WrapperStore
from kvist.testing.store import StoreTests


class TestMemoryStore(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return MemoryStore()

    def test_instances_share_nothing(self) -> None:
        one, two = MemoryStore(), MemoryStore()
        one.put("a", b"x")
        assert two.head("a") is None
        assert one.url != two.url


class SlowStore(WrapperStore):
    """Only what a backend must write itself: the rest are the contract's slow defaults."""

    get_ranges = Store.get_ranges
    put_many = Store.put_many
    clean = Store.clean

    def writer(self, key: str) -> ObjectWriter:
        return Store.writer(self, key)


class TestSlowDefaults(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return SlowStore(MemoryStore())
