import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvist.errors import AlreadyExists, DamagedPage, IntegrityError, InvalidInput, MissingPage, StoreError, StoreFull
from kvist.hashing import Buffer
from kvist.repo import Repository, batch, fsck, gc, segment
from kvist.repo.pages import PageStore
from kvist.store import (
    LocalStore,
    MemoryStore,
    MeteredStore,
    ObjectInfo,
    ObjectWriter,
    Range,
    ReadOnlyStore,
    Store,
    WrapperStore,
)

from .making import LAYOUT, digest, halves, manifest, read_back, snapshot
from .processes import TESTS


@pytest.fixture
def pages(store: Store) -> Iterator[PageStore]:
    opened = PageStore(store, "blake3")
    yield opened
    opened.close()


def opened(store: Store) -> PageStore:
    return PageStore(store, "blake3")


def damage(store: Store, key: str, at: int = 0) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 1
    store.put(key, data)


def keys(store: Store) -> list[tuple[str, str]]:
    return [(info.key, info.etag) for info in store.list()]


# -- put and get ---------------------------------------------------------------------------------------------------


def test_reads_back(pages: PageStore) -> None:
    data = halves(8)
    put = pages.put(data)
    assert put.digests == [digest(half) for half in data]
    assert (put.new_pages, put.new_bytes) == (16, 16 * LAYOUT.page_bytes)
    assert [pages.get(name) for name in put.digests] == data


def test_a_duplicate_put_leaves_every_byte_as_it_was(pages: PageStore, store: Store) -> None:
    data = halves(8)
    pages.put(data)
    before = keys(store)
    put = pages.put(data)
    assert (put.new_pages, put.new_bytes) == (0, 0)
    assert keys(store) == before


def test_one_diverged_page_of_eight_costs_one_page(pages: PageStore, store: Store) -> None:
    data = halves(8)
    pages.put(data)
    before = sum(info.size for info in store.list())
    pages.put([*halves(1, 99), *data[2:]])
    assert sum(info.size for info in store.list()) - before < 2 * LAYOUT.page_bytes + 2048


def test_equal_pages_in_one_batch_are_stored_once(pages: PageStore) -> None:
    put = pages.put([b"a" * 8, b"b" * 8, b"a" * 8])
    assert put.digests[0] == put.digests[2]
    assert (put.new_pages, put.new_bytes) == (2, 16)


def test_nothing_put_stores_nothing(pages: PageStore, store: Store) -> None:
    assert pages.put([]).digests == []
    pages.get_into([], [])
    assert keys(store) == []


def test_one_page_asked_for_often_in_one_get(pages: PageStore) -> None:
    data = [b"a" * 8, b"b" * 8]
    a, b = pages.put(data).digests
    wanted = [a, b, a, a, b]
    outs = [bytearray(8) for _ in wanted]
    pages.get_into(wanted, [memoryview(out) for out in outs])
    assert [bytes(out[:1]) for out in outs] == [b"a", b"b", b"a", b"a", b"b"]


def test_pages_of_many_sizes_in_any_order(pages: PageStore) -> None:
    chance = random.Random(1)
    data = [chance.randbytes(chance.choice([1, 2, 3, 100, 4096, 3 << 20])) for _ in range(40)]
    names = pages.put(data).digests
    order = chance.sample(range(40), 40)
    outs = [bytearray(len(data[i])) for i in order]
    pages.get_into([names[i] for i in order], [memoryview(out) for out in outs])
    assert outs == [data[i] for i in order]
    assert pages.verify(names) == []


@pytest.mark.parametrize("form", ["H", "d"])
def test_pages_of_any_item_type_are_bytes(pages: PageStore, form: str) -> None:
    view = memoryview(bytes(range(64))).cast(form)
    put = pages.put([view, bytearray(b"x")])
    assert put.new_bytes == 65
    assert pages.get(put.digests[0]) == bytes(range(64))


def test_refuses_an_empty_page_and_stores_nothing(pages: PageStore, store: Store) -> None:
    with pytest.raises(InvalidInput, match="at least one byte"):
        pages.put([b"x", b""])
    assert keys(store) == []


def test_refuses_a_buffer_of_another_length(pages: PageStore) -> None:
    (name,) = pages.put([b"12345678"]).digests
    with pytest.raises(InvalidInput, match="has 8 bytes, its buffer 7"):
        pages.get_into([name], [memoryview(bytearray(7))])


@pytest.mark.parametrize(
    "name",
    [
        "blake3:" + "A" * 64,
        "blake3:" + "a" * 63,
        "md5:" + "a" * 64,
        "a" * 64,
        "sha256:" + "a" * 64,
        "blake3:" + "a" * 64 + "\n",
    ],
)
def test_refuses_a_name_that_is_no_digest_here(pages: PageStore, store: Store, name: str) -> None:
    for act in (pages.get, pages.size, pages.homes):
        with pytest.raises(InvalidInput):
            act(name)
    assert keys(store) == []


def test_sha256_repositories_name_pages_by_sha256(store: Store) -> None:
    with Repository.init(store, page_digest="sha256") as repo:
        data = halves(2)
        made = snapshot(repo, data)
        assert read_back(repo, made.cid) == data
        assert next(iter(repo.manifest(made.manifests[0]).digests)) == digest(data[0], "sha256")


def test_an_absent_page_is_its_own_error_and_reading_it_creates_nothing(tmp_path: Path) -> None:
    root = tmp_path / "store"
    pages = opened(LocalStore(root))
    with pytest.raises(MissingPage, match="is in no segment"):
        pages.get("blake3:" + "a" * 64)
    with pytest.raises(MissingPage):
        pages.get_into(["blake3:" + "a" * 64], [memoryview(bytearray(4))])
    assert pages.size("blake3:" + "a" * 64) is None
    assert pages.verify(["blake3:" + "a" * 64]) == ["blake3:" + "a" * 64]
    assert not root.exists()
    pages.close()


def test_reads_change_nothing(pages: PageStore, store: Store) -> None:
    names = pages.put(halves(4)).digests
    before = keys(store)
    for name in names:
        pages.get(name)
    pages.verify(names)
    pages.refresh()
    assert keys(store) == before


# -- damage --------------------------------------------------------------------------------------------------------


def test_damage_is_found_marked_and_healed_by_the_next_put(pages: PageStore, store: Store) -> None:
    data = halves(2)
    names = pages.put(data).digests
    (key,) = pages.homes(names[0])
    damage(store, key)
    with pytest.raises(DamagedPage, match=names[0]):
        pages.get(names[0])
    assert pages.damaged_places() == [(key, names[0])]
    assert pages.get(names[1]) == data[1]
    assert pages.size(names[0]) is None
    put = pages.put(data)
    assert put.new_pages == 1
    assert pages.get(names[0]) == data[0]
    assert key not in pages.homes(names[0])


def test_damage_is_known_after_reopening_and_healed_by_any_process(pages: PageStore, store: Store) -> None:
    data = halves(1)
    names = pages.put(data).digests
    stale = opened(store)
    damage(store, pages.homes(names[0])[0])
    with pytest.raises(DamagedPage):
        pages.get(names[0])
    again = opened(store)
    assert again.size(names[0]) is None
    assert stale.put(data).new_pages == 1, "it had the segment in memory, unmarked, before"
    assert pages.get(names[0]) == again.get(names[0]) == data[0]
    again.close()
    stale.close()


def test_another_process_heals(tmp_path: Path) -> None:
    import subprocess
    import sys

    pages = opened(LocalStore(tmp_path))
    (name,) = pages.put([b"a" * 8]).digests
    damage(LocalStore(tmp_path), pages.homes(name)[0])
    with pytest.raises(DamagedPage):
        pages.get(name)
    script = (
        "import sys; from pathlib import Path; from kvist.repo.pages import PageStore\n"
        "from kvist.store import LocalStore\n"
        "print(PageStore(LocalStore(Path(sys.argv[1])), 'blake3').put([b'a' * 8]).new_pages)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=TESTS, check=True
    )
    assert done.stdout == "1\n"
    assert pages.get(name) == b"a" * 8
    pages.close()


def test_a_second_copy_stands_in_for_a_damaged_one(store: Store) -> None:
    one, two = opened(store), opened(store)
    two.refresh = lambda: None  # type: ignore[method-assign]  # two writers at the same moment
    (name,) = one.put([b"a" * 8]).digests
    two.put([b"a" * 8])
    reader = opened(store)
    homes = reader.homes(name)
    assert len(homes) == 2
    damage(store, homes[0])
    assert reader.get(name) == b"a" * 8
    assert reader.homes(name) == homes[1:]
    damage(store, homes[1])
    with pytest.raises(DamagedPage):
        reader.get(name)
    for each in (one, two, reader):
        each.close()


def test_a_truncated_segment_is_damage(pages: PageStore, store: Store) -> None:
    data = halves(2)
    names = pages.put(data).digests
    (key,) = pages.homes(names[0])
    store.put(key, store.get(key)[:10])
    with pytest.raises(DamagedPage):
        pages.get(names[-1])
    again = opened(store)
    assert key in again.broken_segments()
    with pytest.raises(MissingPage):
        again.get(names[-1])
    assert again.put(data).new_pages == 4
    assert again.get(names[-1]) == data[-1]
    again.close()


class UnreadableStore(WrapperStore):
    """Cannot read the bytes at ``bad``, as a `LocalStore` on a disk with a bad block."""

    bad: tuple[str, range] | None = None
    has_views = False  # type: ignore[assignment]

    def _check(self, key: str, start: int, size: int) -> None:
        if self.bad is None or key != self.bad[0]:
            return
        if start < self.bad[1].stop and self.bad[1].start < start + size:
            raise IntegrityError(f"cannot read {key}: Input/output error")

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        data = super().get(key, start=start, size=size)
        self._check(key, start, len(data))
        return data

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        for each in ranges:
            self._check(key, each.start, len(each.out))
        super().get_ranges(key, ranges)


def test_a_page_that_the_disk_cannot_read_is_damaged_and_its_neighbours_are_not(store: Store) -> None:
    disk = UnreadableStore(store)
    pages = opened(disk)
    data = halves(4)
    put = pages.put(data)
    (key,) = pages.homes(put.digests[0])
    size = LAYOUT.page_bytes
    disk.bad = key, range(3 * size + 5, 3 * size + 6)
    outs = [bytearray(size) for _ in data]
    with pytest.raises(DamagedPage, match=put.digests[3]):
        pages.get_into(put.digests, [memoryview(out) for out in outs])
    assert pages.damaged_places() == [(key, put.digests[3])]
    assert pages.put(data).new_pages == 1
    assert [pages.get(name) for name in put.digests] == data
    pages.close()


def test_a_segment_whose_index_the_disk_cannot_read_is_broken_and_hinders_nobody(store: Store) -> None:
    with Repository.init(store) as repo:
        data = halves(2)
        snapshot(repo, data)
        (segment,) = repo.pages.segments()
    disk = UnreadableStore(store)
    disk.bad = segment.key, range(segment.data_bytes, segment.data_bytes + 9)
    with Repository.open(disk) as repo:
        assert list(repo.pages.broken_segments()) == [segment.key]
        assert {finding.code for finding in fsck.check(repo).findings} == {
            fsck.Code.DAMAGED_SEGMENT,
            fsck.Code.MISSING_PAGE,
        }
        repo.put_pages(data)
        assert fsck.check(repo).is_whole
        gc.apply(repo, gc.plan(repo, min_age=0))
        assert fsck.check(repo).is_clean and read_back(repo, "main") == data


def test_a_deleted_segment_is_missing_pages(pages: PageStore, store: Store) -> None:
    names = pages.put(halves(2)).digests
    store.delete(pages.homes(names[0]))
    with pytest.raises(MissingPage):
        pages.get(names[0])
    assert pages.damaged_places() == []


def test_damage_on_a_read_only_store_is_found_and_not_forgotten(pages: PageStore, store: Store) -> None:
    (name,) = pages.put([b"a" * 8]).digests
    damage(store, pages.homes(name)[0])
    reader = opened(ReadOnlyStore(store))
    for _ in range(2):
        with pytest.raises(DamagedPage):
            reader.get(name)
        reader.refresh()
        assert reader.size(name) is None
    assert not [*store.list("damaged/")]
    reader.close()


def test_an_index_damaged_after_it_was_read_does_not_harm_reading(pages: PageStore, store: Store) -> None:
    data = halves(2)
    names = pages.put(data).digests
    (key,) = pages.homes(names[0])
    damage(store, key, -1)
    assert pages.get(names[0]) == data[0]


# -- several writers, several segments -----------------------------------------------------------------------------


def test_a_reader_finds_what_others_wrote_since(pages: PageStore, store: Store) -> None:
    other = opened(store)
    (name,) = other.put([b"late" * 2]).digests
    assert pages.get(name) == b"late" * 2
    (name,) = other.put([b"later"]).digests
    out = bytearray(5)
    pages.get_into([name], [memoryview(out)])
    assert out == b"later"
    other.close()


def test_big_batches_fill_several_segments(pages: PageStore, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SEGMENT_BYTES", 3 * LAYOUT.page_bytes)
    data = halves(5)
    names = pages.put(data).digests
    assert len([*store.list("segments/")]) == 4
    again = opened(store)
    assert [again.get(name) for name in names] == data
    again.close()


class FullStore(WrapperStore):
    """Full after so many bytes of writers."""

    left = 0

    def writer(self, key: str) -> ObjectWriter:
        store, below = self, super().writer(key)

        class Writer(ObjectWriter):
            def write(self, data: Buffer) -> None:
                store.left -= len(data)
                if store.left < 0:
                    raise StoreFull("full")
                below.write(data)

            def commit(self) -> None:
                below.commit()

            def abort(self) -> None:
                below.abort()

        return Writer()


@pytest.mark.parametrize("left", [0, 200, 700, 16 * LAYOUT.page_bytes + 40])
def test_a_full_store_leaves_nothing(store: Store, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SEGMENT_BYTES", 8 * LAYOUT.page_bytes)
    full = FullStore(store)
    full.left = left
    pages = opened(full)
    with pytest.raises(StoreFull):
        pages.put(halves(8))
    assert keys(store) == []
    if isinstance(store, LocalStore):
        assert not [*(Path(store.url.removeprefix("file://").partition("?")[0]) / ".tmp").iterdir()]
    full.left = 1 << 20
    assert pages.put(halves(8)).new_pages == 16
    pages.close()


def test_threads_put_and_get_at_once(pages: PageStore) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(6):
                data = halves(4, i) + halves(2, 100 * seed + i)
                names = pages.put(data).digests
                outs = [bytearray(len(half)) for half in data]
                pages.get_into(names, [memoryview(out) for out in outs])
                assert outs == data
                pages.refresh()
                assert pages.verify(names) == []
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_put_is_seen_by_a_refresh_that_began_before_it(store: Store) -> None:
    """The listing of a slow refresh lacks a segment that this process has just written: it must not be forgotten."""

    class Slow(WrapperStore):
        between = staticmethod(lambda: None)

        def list(self, prefix: str = ""):  # type: ignore[no-untyped-def]
            listed = [*super().list(prefix)]
            if prefix == segment.PREFIX:
                act, self.between = self.between, lambda: None  # type: ignore[method-assign,assignment]
                act()
            return iter(listed)

    def put() -> None:
        pages.refresh = lambda: None  # type: ignore[method-assign]  # its own ended before the slow one began
        pages.put([b"meanwhile"])

    slow = Slow(store)
    pages = opened(slow)
    slow.between = put  # type: ignore[method-assign,assignment]
    pages.refresh()
    assert pages.size(digest(b"meanwhile")) == 9
    pages.close()


def test_a_slow_refresh_brings_nothing_back_that_another_has_seen_deleted() -> None:
    class Slow(WrapperStore):
        """Waits once it has read an index."""

        read, go_on = threading.Event(), threading.Event()

        def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
            data = super().get(key, start=start, size=size)
            self.read.set()
            assert self.go_on.wait(10)
            return data

    store = MemoryStore()
    slow, writer = Slow(store), opened(store)
    pages = opened(slow)
    (name,) = writer.put([b"a"]).digests
    refreshes = [threading.Thread(target=pages.refresh) for _ in range(3)]
    refreshes[0].start()
    assert slow.read.wait(10)
    store.delete(writer.homes(name))
    for refresh in refreshes[1:]:
        refresh.start()
    slow.go_on.set()
    for refresh in refreshes:
        refresh.join()
    assert pages.homes(name) == []
    pages.close()
    writer.close()


def test_refreshes_that_wait_share_one_that_began_after_they_asked() -> None:
    class Slow(WrapperStore):
        listed, waiting, go_on = 0, threading.Event(), threading.Event()

        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            if prefix == segment.PREFIX:
                self.listed += 1
                self.waiting.set()
                assert self.go_on.wait(10)
            return super().list(prefix)

    slow = Slow(MemoryStore())
    slow.go_on.set()
    pages = opened(slow)
    slow.waiting.clear()
    slow.go_on.clear()
    refreshes = [threading.Thread(target=pages.refresh) for _ in range(5)]
    refreshes[0].start()
    assert slow.waiting.wait(10)
    for refresh in refreshes[1:]:
        refresh.start()
    time.sleep(0.1)
    slow.go_on.set()
    for refresh in refreshes:
        refresh.join()
    assert slow.listed < 1 + 5
    pages.close()


def test_an_index_that_came_wrong_is_read_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    writer = opened(store)
    (name,) = writer.put([b"a"]).digests
    (key,) = writer.homes(name)
    whole = store.get(key)
    store.put(key, whole[:-1])
    pages = opened(store)
    for _ in range(2):
        assert list(pages.broken_segments()) == [key]
        pages.refresh()
    assert sum("count as missing" in message for message in caplog.messages) == 1
    store.put(key, whole)
    assert pages.get(name) == b"a" and pages.broken_segments() == {}
    pages.close()
    writer.close()


def test_a_refresh_reads_only_what_is_new() -> None:
    store = MeteredStore(MemoryStore())
    pages = opened(store)
    for i in range(10):
        pages.put([bytes([i]) * 10])
    store.reset()
    pages.refresh()
    traffic = store.traffic()
    assert traffic["list"].calls == 2 and store.bytes_read == 0
    again = opened(store)
    assert store.traffic()["get"].calls == 10
    again.close()
    pages.close()


def test_readers_go_on_while_a_gc_rewrites(repo: Repository) -> None:
    data = halves(4)
    repo.put_pages(data)
    made = repo.commit([manifest(data[:2])], branch="main")
    reader = Repository.open(repo.store)
    gc.apply(repo, gc.plan(repo, min_age=0))
    assert read_back(reader, made.cid) == data[:2]
    with pytest.raises(MissingPage):
        reader.pages.get(digest(data[2]))
    reader.pages.close()


def test_close_is_idempotent_and_errors_of_the_store_come_through(store: Store) -> None:
    class Failing(WrapperStore):
        def list(self, prefix: str = ""):  # type: ignore[no-untyped-def]
            raise StoreError("no")

    with pytest.raises(StoreError):
        opened(Failing(store))
    pages = opened(store)
    pages.close()
    pages.close()
    assert issubclass(AlreadyExists, Exception)
