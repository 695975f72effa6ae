"""`StoreTests`: what every `Store` must do, one test a sentence of the contract in `kvist.store.base`.

class TestMine(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return MyStore(tmp_path / "data")

    def reopen(self, store: Store) -> Store:
        return MyStore(...)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from kvist.errors import AlreadyExists, Conflict, IntegrityError, InvalidInput, InvalidName, NotFound
from kvist.store import Match, Range, Store
from kvist.testing.store_machine import store_machine
from kvist.testing.store_races import StoreRaceTests, content

MIB: Final = 1 << 20
SIZES: Final = (0, 1, 4095, 4096, 4097, 16 * MIB + 5)
"""Around the blocks that a file system writes directly, and above the buffers of a streaming writer."""

BAD_KEYS: Final = (
    *("", "/", ".", "..", ".x", "../x", "/x", "x/", "a//b", "a/../b", "a/.b", "a\0b", "a b", "a\n", "ä", "a\\b"),
    *("-x", "_x", "a/-", "*", "a:b", "x" * 256, "/".join(["x" * 100] * 11)),
)
GOOD_KEYS: Final = ("a", "0", "A.b_c+d@e-f", "a/b/c/d/e", "x" * 255, "/".join(["x" * 100] * 9), "a..b", "a.tmp")


class StoreTests(StoreRaceTests):
    """Subclass it, and give `make_store`; give `reopen` if the data can be opened twice.

    Attributes:
        examples: runs of the state machine; fewer for a store that is far away.
    """

    examples = 20

    def make_store(self, tmp_path: Path) -> Store:
        """A new, empty store; ``tmp_path`` is a directory for it alone."""
        raise NotImplementedError

    def reopen(self, store: Store) -> Store | None:
        """Another instance on ``store``'s data, as another process would open it; ``None`` if there is no such."""
        return None

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """The store under test."""
        with self.make_store(tmp_path) as store:
            yield store

    @pytest.fixture
    def other(self, store: Store) -> Iterator[Store]:
        """The same data seen from elsewhere; for a store that cannot be reopened, the store itself."""
        other = self.reopen(store)
        if other is None:
            yield store
        else:
            with other:
                yield other

    # -- keys ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_every_method_refuses_a_bad_key(self, store: Store, key: str) -> None:
        """Every method that takes a key raises `InvalidName` for a bad one, and stores nothing."""
        calls: list[Callable[[], object]] = [
            lambda: store.get(key),
            lambda: store.get_ranges(key, []),
            lambda: store.view(key, 0, 1),
            lambda: store.put(key, b"x"),
            lambda: store.put_many([(key, b"x")], mode="create"),
            lambda: store.head(key),
            lambda: store.delete([key]),
            lambda: store.writer(key),
        ]
        for call in calls:
            with pytest.raises(InvalidName):
                call()
        assert [*store.list()] == []

    @pytest.mark.parametrize("prefix", ["a", "/", "../", "a//", ".x/", "a/b"])
    def test_list_refuses_a_bad_prefix(self, store: Store, prefix: str) -> None:
        """A prefix is ``""`` or a key and a slash; a bad one is refused before the first item is asked for."""
        with pytest.raises(InvalidName):
            store.list(prefix)

    @pytest.mark.parametrize("key", GOOD_KEYS)
    def test_good_keys_work(self, store: Store, other: Store, key: str) -> None:
        """Whatever `check_key` takes, the store takes."""
        store.put(key, b"x", mode="create")
        assert other.get(key) == b"x"
        assert [info.key for info in other.list()] == [key]

    # -- get, put, head ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", SIZES)
    def test_put_get_of_every_size(self, store: Store, other: Store, size: int) -> None:
        """What is put is read back, by any instance."""
        data = content(size)
        store.put("a/b", data)
        assert other.get("a/b") == data

    def test_put_takes_every_kind_of_buffer(self, store: Store) -> None:
        """bytes, bytearray, memoryviews, slices of them; and keeps no reference to any."""
        data = bytearray(content(10_000))
        expected = bytes(data)
        with store.writer("w") as writer:
            writer.write(memoryview(data)[:3_000])
            writer.write(memoryview(expected)[3_000:])
            store.put("a", data)
            store.put("b", memoryview(data)[1:-1])
            store.put_many([("c", data), ("d", memoryview(data).toreadonly())], mode="create")
            data[:] = bytes(len(data))
            writer.commit()
        data.clear()  # raises BufferError while a view of it is held
        assert [store.get(key) for key in "awcd"] == [expected] * 4
        assert store.get("b") == expected[1:-1]

    def test_get_parts(self, store: Store) -> None:
        """From ``start``, at most ``size`` bytes; nothing from past the end."""
        data = content(1000)
        store.put("a", data)
        for start, size in itertools.product((0, 1, 999, 1000, 5000), (None, 0, 1, 500, 1000, 5000)):
            expected = data[start:] if size is None else data[start : start + size]
            assert store.get("a", start=start, size=size) == expected

    def test_get_of_what_is_not_there(self, store: Store) -> None:
        """NotFound, also for no ranges, for a directory of keys, and below a key."""
        store.put("a/b", b"x")
        for key in ("nope", "a", "nope/nope", "a/b/c"):
            with pytest.raises(NotFound):
                store.get(key)
            with pytest.raises(NotFound):
                store.get_ranges(key, [])
            with pytest.raises(NotFound):
                store.get_ranges(key, [Range(0, memoryview(bytearray(1)))])
            for size in (0, 1):
                with pytest.raises(NotFound):
                    store.view(key, 0, size)
            assert store.head(key) is None

    def test_head(self, store: Store, other: Store) -> None:
        """Size, etag and time without reading; the etag is the one that put returned."""
        etag = store.put("a/b", b"12345")
        info = other.head("a/b")
        assert info is not None
        assert (info.key, info.size, info.etag) == ("a/b", 5, etag)
        assert 1.6e9 < info.modified < 1e11
        assert [*other.list()] == [info]

    def test_etag_changes_with_every_overwrite(self, store: Store) -> None:
        """However fast the puts follow each other, and though the sizes are equal."""
        etags = [store.put("a", bytes([i])) for i in range(200)]
        assert len(set(etags)) == len(etags)

    def test_create(self, store: Store, other: Store) -> None:
        """Create refuses a taken key and leaves it alone."""
        store.put("a", b"1", mode="create")
        with pytest.raises(AlreadyExists):
            other.put("a", b"2", mode="create")
        assert store.get("a") == b"1"
        store.delete(["a"])
        other.put("a", b"3", mode="create")
        assert store.get("a") == b"3"

    def test_compare_and_swap(self, store: Store, other: Store) -> None:
        """Match replaces only the object with that etag: not a newer one, not one that is gone or never was."""
        first = store.put("a", b"1")
        second = other.put("a", b"2", mode=Match(first))
        assert second != first
        for stale in (Match(first), Match("nonsense")):
            with pytest.raises(Conflict):
                store.put("a", b"3", mode=stale)
        assert store.get("a") == b"2"
        store.delete(["a"])
        for key in ("a", "never/was"):
            with pytest.raises(Conflict):
                store.put(key, b"4", mode=Match(second))
            assert store.head(key) is None

    def test_overwrite(self, store: Store, other: Store) -> None:
        """Overwrite replaces whatever is there, also with less."""
        for data in (b"long content", b"", b"short"):
            store.put("a", data)
            assert other.get("a") == data

    # -- ranges --------------------------------------------------------------------------------------------------

    def test_get_ranges(self, store: Store) -> None:
        """Adjacent, apart and empty ranges each fill their own buffer and touch nothing around it."""
        data = content(100_000)
        store.put("a", data)
        spans = [(0, 10), (10, 4096), (4106, 0), (4106, 1), (5000, 5000), (10_000, 7), (99_000, 1000), (100_000, 0)]
        arena = bytearray(b"\xff" * 120_000)
        ranges = [Range(start, memoryview(arena)[start + i : start + i + n]) for i, (start, n) in enumerate(spans)]
        store.get_ranges("a", ranges)
        for (start, size), r in zip(spans, ranges, strict=True):
            assert r.out == data[start : start + size]
        assert arena.count(b"\xff") == len(arena) - sum(size for _, size in spans)

    def test_view(self, store: Store) -> None:
        """The bytes asked for; short of them is an error, as with `get_ranges`."""
        data = content(100_000)
        store.put("a", data)
        for start, size in ((0, 10), (5000, 70_000), (99_999, 1), (0, 100_000), (7, 0)):
            assert store.view("a", start, size) == data[start : start + size]
        for start in (99_995, 100_000, 200_000):
            with pytest.raises(IntegrityError):
                store.view("a", start, 11)

    def test_get_many_adjacent_ranges(self, store: Store) -> None:
        """More ranges than one system call takes, of uneven sizes."""
        sizes = [1 + i % 7 for i in range(5000)]
        data = content(sum(sizes) + 3)
        store.put("a", data)
        out = memoryview(bytearray(sum(sizes)))
        ends = [*itertools.accumulate(sizes)]
        store.get_ranges(
            "a", [Range(3 + end - size, out[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        )
        assert out == data[3:]

    @pytest.mark.parametrize("start", [0, 1, 10, 11, 1000])
    def test_a_range_past_the_end(self, store: Store, start: int) -> None:
        """IntegrityError, wherever the object ends."""
        store.put("a", content(10))
        with pytest.raises(IntegrityError):
            store.get_ranges("a", [Range(start, memoryview(bytearray(11)))])

    # -- list, delete --------------------------------------------------------------------------------------------

    def test_list_ascends_by_whole_key(self, store: Store, other: Store) -> None:
        """Keys sort as strings, so ``a.b`` comes before ``a/b`` and ``a/b`` before ``a0``."""
        keys = ["a-b", "a.b", "a/b", "a/b.c", "a/c/d", "a0", "a@", "aa/b", "B", "b/a-/c", "b/a/c", "b/a.c", "0/1"]
        for key in keys:
            store.put(key, key.encode())
        infos = [*other.list()]
        assert [info.key for info in infos] == sorted(keys)
        assert all(info == store.head(info.key) for info in infos)

    def test_list_by_prefix(self, store: Store) -> None:
        """Only keys below the prefix; a prefix of nothing lists nothing."""
        for key in ("a/x", "a/y/z", "ab/x", "b"):
            store.put(key, b"")
        assert [info.key for info in store.list("a/")] == ["a/x", "a/y/z"]
        assert [info.key for info in store.list("a/y/")] == ["a/y/z"]
        assert [*store.list("c/")] == [*store.list("b/")] == []

    def test_an_empty_store(self, store: Store) -> None:
        """Nothing is there, and asking for it is no error."""
        assert [*store.list()] == []
        assert store.head("a") is None
        store.delete(["a", "b/c"])
        assert store.clean(0) == 0

    def test_delete(self, store: Store, other: Store) -> None:
        """Deletes what exists, ignores what does not, takes a generator that lists the store."""
        store.put_many([(f"a/{i}", b"x") for i in range(10)], mode="create")
        store.delete(["a/3", "a/3", "nope", "a/4/x", "a"])
        assert [info.key for info in other.list()] == [f"a/{i}" for i in range(10) if i != 3]
        store.delete(["a/3"])
        store.delete(info.key for info in other.list())
        assert [*other.list()] == []

    # -- put_many, writer ----------------------------------------------------------------------------------------

    def test_put_many_create(self, store: Store, other: Store) -> None:
        """Existing objects are left alone and do not raise, also when the batch itself repeats a key."""
        store.put("d/7", b"old")
        store.put_many([(f"d/{i}", b"new%d" % i) for i in range(300)] + [("d/8", b"again")], mode="create")
        assert other.get("d/7") == b"old"
        assert all(other.get(f"d/{i}") == b"new%d" % i for i in range(300) if i != 7)

    def test_put_many_overwrite(self, store: Store, other: Store) -> None:
        """Existing objects are replaced, the last of equal keys wins, and no items are no error."""
        store.put("d/1", b"old")
        store.put_many([("d/1", b"new"), ("d/2", b""), ("d/2", b"last")], mode="overwrite")
        store.put_many([], mode="overwrite")
        assert [other.get(key) for key in ("d/1", "d/2")] == [b"new", b"last"]

    @pytest.mark.parametrize("size", SIZES)
    def test_writer_of_every_size(self, store: Store, other: Store, size: int) -> None:
        """In uneven pieces, and invisible until commit."""
        data = content(size)
        with store.writer("s/1") as writer:
            for start in range(0, size, MIB + 13):
                writer.write(data[start : start + MIB + 13])
            assert other.head("s/1") is None
            assert [*other.list()] == []
            writer.commit()
            writer.abort()  # does nothing any more
        info = other.head("s/1")
        assert info is not None
        assert info.size == size
        assert other.get("s/1") == data

    def test_writer_abort(self, store: Store) -> None:
        """Leaving without commit, by abort or an exception, leaves nothing; the key stays free."""
        with store.writer("a") as writer:
            writer.write(content(9 * MIB))
        writer = store.writer("a")
        writer.abort()
        writer.abort()
        with pytest.raises(ZeroDivisionError), store.writer("a") as writer:
            writer.write(b"x")
            raise ZeroDivisionError
        assert [*store.list()] == []
        assert store.clean(0) == 0
        store.put("a", b"free", mode="create")

    def test_writer_of_a_taken_key(self, store: Store) -> None:
        """Commit refuses a key that was taken meanwhile, and discards the object."""
        with store.writer("a") as writer:
            writer.write(b"late")
            store.put("a", b"first")
            with pytest.raises(AlreadyExists):
                writer.commit()
        assert store.get("a") == b"first"

    def test_a_finished_writer_refuses(self, store: Store) -> None:
        """After commit, abort or failure, write and commit raise `InvalidInput` and change nothing."""
        done, dropped = store.writer("done"), store.writer("dropped")
        done.write(b"x")
        done.commit()
        dropped.abort()
        failed = store.writer("done")
        with pytest.raises(AlreadyExists):
            failed.commit()
        for writer in (done, dropped, failed):
            with pytest.raises(InvalidInput):
                writer.write(b"y")
            with pytest.raises(InvalidInput):
                writer.commit()
        assert [(info.key, info.size) for info in store.list()] == [("done", 1)]

    # -- the whole -----------------------------------------------------------------------------------------------

    def test_identity(self, store: Store, other: Store, tmp_path: Path) -> None:
        """Two stores with one url are equal; the url is in the repr."""
        assert store == other
        assert hash(store) == hash(other)
        assert store.url in repr(store)
        assert store != self.make_store(tmp_path / "another")

    def test_close_is_idempotent(self, store: Store) -> None:
        """Closing twice is no error."""
        store.close()
        store.close()

    def test_state_machine(self, tmp_path: Path) -> None:
        """Any sequence of operations agrees with a dict."""
        numbers = itertools.count()
        machine = store_machine(lambda: self.make_store(tmp_path / str(next(numbers))), self.reopen)
        quick = settings(
            max_examples=self.examples, stateful_step_count=20, deadline=None, suppress_health_check=[*HealthCheck]
        )
        run_state_machine_as_test(machine, settings=quick)
