from pathlib import Path

import pytest

from kvist.errors import InvalidName
from kvist.store import LocalStore, MemoryStore, PrefixStore, Store, WrapperStore, open_store
from kvist.testing.store import StoreTests


class TestInMemory(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        below = MemoryStore()
        below.put("t/a.b", b"a neighbour")
        below.put("t/aa/x", b"another")
        return PrefixStore(below, "t/a")


class TestOnDisk(StoreTests):
    """The other instance is opened at the directory itself: both must agree, also while they race."""

    def make_store(self, tmp_path: Path) -> Store:
        return PrefixStore(LocalStore(tmp_path, durable=False), "tenants/a")

    def reopen(self, store: Store) -> Store:
        return open_store(store.url)


def test_it_reaches_nothing_beside_it() -> None:
    below = MemoryStore()
    below.put("a/b", b"inside")
    below.put("ab", b"outside")
    store = PrefixStore(below, "a")
    assert [info.key for info in store.list()] == ["b"]
    for key in ("../ab", "/ab", ".", ""):
        with pytest.raises(InvalidName):
            store.get(key)
    store.delete(["b"])
    assert [info.key for info in below.list()] == ["ab"]


@pytest.mark.parametrize("prefix", ["", "/", "a/", "../a", "a//b", ".a"])
def test_the_prefix_is_a_key(prefix: str) -> None:
    with pytest.raises(InvalidName):
        PrefixStore(MemoryStore(), prefix)


def test_prefixes_within_prefixes_are_one_store() -> None:
    below = MemoryStore()
    deep = PrefixStore(PrefixStore(below, "a"), "b")
    assert deep == PrefixStore(below, "a/b")
    deep.put("c", b"x")
    assert below.get("a/b/c") == b"x"


def test_urls() -> None:
    assert PrefixStore(LocalStore(Path("/r"), durable=False), "a/b").url == "file:///r/a/b?durable=0"
    assert PrefixStore(LocalStore(Path("/")), "a").url == "file:///a"
    assert PrefixStore(open_store("memory:"), "a").url.endswith("/a")


def test_closing_it_leaves_the_store_below_open() -> None:
    class Closing(MemoryStore):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    below = Closing()
    PrefixStore(below, "a").close()
    assert not below.is_closed


def test_it_passes_on_how_to_read() -> None:
    class Far(MemoryStore):
        window, parallel, has_views = 123, 45, True  # type: ignore[assignment]

    store = PrefixStore(WrapperStore(Far()), "a")
    assert (store.window, store.parallel, store.has_views) == (123, 45, True)
    assert not PrefixStore(MemoryStore(), "a").has_views
