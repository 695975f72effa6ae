"""A page store over tiers and far stores: what is read from where, with how many calls, and always right."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import DamagedPage, InvalidInput, MissingPage, StoreError
from kvist.hashing import Buffer
from kvist.repo import Repository, gc
from kvist.repo.pages import PageStore
from kvist.repo.tier import PageTier, open_tier, stack
from kvist.store import MemoryStore, MeteredStore, Range, Store, WrapperStore
from kvist.testing.memory_tier import LyingTier, MemoryTier
from kvist.testing.page_tier import ManualClock, name_of, page, put, read_pages

from .making import halves, read_back, snapshot

WINDOW = 64 * 1024


class FarStore(MeteredStore):
    """Wants few and large reads."""

    has_views = True  # type: ignore[assignment]

    @property
    def window(self) -> int:
        return WINDOW

    @property
    def parallel(self) -> int:
        return 4


def data_of(count: int, size: int = 1000, seed: object = 0) -> list[bytes]:
    return [page(size, f"{seed}/{i}") for i in range(count)]


def calls(store: MeteredStore) -> dict[str, int]:
    return {kind: traffic.calls for kind, traffic in store.traffic().items()}


@pytest.fixture
def make(store: Store) -> Iterator[Callable[..., PageStore]]:
    """Opens page stores over ``store``, and closes them."""
    opened = []

    def make(*tiers: PageTier, over: Store | None = None) -> PageStore:
        opened.append(PageStore(over or store, "blake3", tiers=tiers))
        return opened[-1]

    yield make
    for pages in opened:
        pages.close()


# -- tiers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 32), lies=st.integers(1, 3), truth=st.integers(0, 1))
def test_tiers_that_lie_change_no_byte(seed: int, lies: int, truth: int) -> None:
    """Wrong bytes, half-filled buffers and failures, in any order of tiers, reads and puts."""
    chance = random.Random(seed)
    clock = ManualClock()
    tiers: list[PageTier] = [LyingTier(seed + i, clock=clock) for i in range(lies)]
    tiers += [MemoryTier() for _ in range(truth)]
    chance.shuffle(tiers)
    pages = PageStore(MemoryStore(), "blake3", tiers=tiers)
    data = [chance.randbytes(chance.choice([1, 100, 5000])) for _ in range(20)]
    names = pages.put(data).digests
    for _ in range(10):
        clock.now += chance.random()
        some = chance.choices(range(20), k=10)
        if chance.random() < 0.2:
            data.append(chance.randbytes(50))
            names += pages.put(data[-1:]).digests
        assert read_pages(pages, [names[i] for i in some], [data[i] for i in some]) == [data[i] for i in some]
    assert pages.damaged_places() == []
    pages.close()


def test_what_a_lower_tier_has_the_upper_one_gets(make: Callable[..., PageStore]) -> None:
    upper, lower = MemoryTier(), MemoryTier()
    data = data_of(5)
    names = make().put(data).digests
    lower.pages = dict(zip(names[:3], data[:3], strict=True))
    pages = make(upper, lower)
    assert read_pages(pages, names, data) == data
    pages.close()
    assert upper.pages == lower.pages == dict(zip(names, data, strict=True))
    assert [(stats.hits, stats.misses) for stats in pages.tier_stats()] == [(0, 5), (3, 2)]


def test_tiers_get_what_is_new_and_nothing_again(make: Callable[..., PageStore]) -> None:
    tier = MemoryTier()
    make().put(data_of(3))
    pages = make(tier)
    pages.put(data_of(5))
    pages.close()
    assert set(tier.pages) == {name_of(each) for each in data_of(5)[3:]}


def test_upkeep_reads_the_store_only(make: Callable[..., PageStore], store: Store) -> None:
    data = data_of(4)
    names = make().put(data).digests
    tier = MemoryTier()
    tier.pages = dict(zip(names, data, strict=True))
    pages = make(tier)
    (key,) = pages.homes(names[0])
    wrong = bytearray(store.get(key))
    wrong[0] ^= 1
    store.put(key, wrong)
    assert pages.verify(names) == [names[0]]
    with pytest.raises(DamagedPage):
        pages.rewrite(names)
    assert read_pages(pages, names, data) == data, "the tier has it still"
    (stats,) = pages.tier_stats()
    assert stats.hits == 4


def test_a_page_that_only_a_tier_has_is_read(make: Callable[..., PageStore], store: Store) -> None:
    tier = MemoryTier()
    data = data_of(2)
    pages = make(tier)
    names = pages.put(data[:1]).digests
    tier.pages[name_of(data[1])] = data[1]
    assert read_pages(pages, [*names, name_of(data[1])], data) == data
    with pytest.raises(MissingPage):
        read_pages(pages, [name_of(b"nowhere")], [b"nowhere"])


def test_a_buffer_of_another_length_is_refused(make: Callable[..., PageStore]) -> None:
    tier = MemoryTier()
    pages = make(tier)
    names = pages.put(data_of(1)).digests
    with pytest.raises(InvalidInput, match="has 1000 bytes, its buffer 999"):
        pages.get_into(names, [memoryview(bytearray(999))])


def test_a_slow_tier_keeps_nobody_waiting(make: Callable[..., PageStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has no room for is dropped, and counted; buffers are the caller's again at once."""
    monkeypatch.setattr(stack, "ROOM", 2500)
    monkeypatch.setattr(stack, "BUFFER_SIZE", 1)  # so that every page is too large to share a slab
    may_go = threading.Event()

    class SlowTier(MemoryTier):
        def _write(self, items: Sequence[tuple[str, Buffer]]) -> list[str]:
            may_go.wait()
            return super()._write(items)

    slow, quick = SlowTier(), MemoryTier()
    pages = make(slow, quick)
    buffers = [bytearray(each) for each in data_of(6)]
    names = pages.put(buffers).digests
    for buffer in buffers:
        buffer.clear()
    assert read_pages(pages, names, data_of(6)) == data_of(6)
    may_go.set()
    pages.close()
    assert pages.tier_stats()[0].dropped >= 4
    assert 0 < len(slow.pages) <= 2
    assert all(name_of(each) == name for name, each in [*slow.pages.items(), *quick.pages.items()])


def test_an_error_that_is_not_ours_stops_nothing(make: Callable[..., PageStore]) -> None:
    tier = MemoryTier()
    pages = make(tier)
    tier.fails = ZeroDivisionError("a bug")
    names = pages.put(data_of(3)).digests
    assert read_pages(pages, names, data_of(3)) == data_of(3)
    pages.close()
    assert pages.tier_stats()[0].errors == 2


def test_a_tier_that_cannot_forget_fails_no_read(make: Callable[..., PageStore]) -> None:
    """And is not asked to again for a while."""

    class Stubborn(MemoryTier):
        def _forget(self, names: Sequence[str]) -> None:
            raise ZeroDivisionError("native code says no")

    tier = Stubborn(clock=ManualClock())
    names = make().put(data_of(3)).digests
    tier.pages = dict.fromkeys(names, bytes(1000))
    pages = make(tier)
    for _ in range(2):
        assert read_pages(pages, names, data_of(3)) == data_of(3)
    (stats,) = pages.tier_stats()
    assert (stats.hits, stats.bad, stats.errors) == (6, 6, 1)


@pytest.mark.parametrize("how", [{"page_digest": "sha256"}, {"salt": "ab" * 32}])
def test_digests_of_every_kind_go_through_tiers(how: dict[str, str]) -> None:
    store, tier = MeteredStore(MemoryStore()), MemoryTier()
    with Repository.init(store, **how) as repo:
        names = repo.put_pages(data_of(3)).digests
    for _ in range(2):
        store.reset()
        with Repository.open(store, tiers=[tier]) as repo:
            assert read_pages(repo.pages, names, data_of(3)) == data_of(3)
    assert not {"get_ranges", "view"} & calls(store).keys()
    assert tier.pages == dict(zip(names, data_of(3), strict=True))


def test_a_repository_opens_tiers_by_their_urls(store: Store, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/tier?max_bytes=10MB"
    with Repository.init(store):
        pass
    with Repository.open(store, tiers=[url]) as repo:
        names = repo.put_pages(data_of(3)).digests
        assert [stats.url for stats in repo.pages.tier_stats()] == [f"file://{tmp_path}/tier?max_bytes=10000000"]
    with Repository.open(store, tiers=[url]) as repo:
        assert read_pages(repo.pages, names, data_of(3)) == data_of(3)
        assert repo.pages.tier_stats()[0].hits == 3


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nfs://host/x", "starts with 'nfs'"),
        ("/a/path", "starts with ''"),
        ("file:///tmp/x", "its bound"),
        ("file://host/tmp/x?max_bytes=1", "absolute path"),
        ("file:///tmp/x?max_bytes=lots", "expected a size"),
        ("file:///tmp/x?max_bytes=0", "expected a size"),
        ("file:///tmp/x?max_bytes=1&max_bytes=2", "each once"),
        ("file:///tmp/x?max_bytes=1&speed=9", "takes only max_bytes"),
        ("redis://user:hunter2@host/0", "holds a user or a password"),
        ("redis://host/0?password=hunter2", "never carries a secret"),
        ("redis://host/name", "number as its database"),
        ("redis://host:port/0", "no such form"),
        ("redis:///0", "needs a host"),
        ("redis://host?ttl=0", "ttl"),
        ("redis://host?timeout=0", "timeout"),
        ("redis://host?timeout=soon", "timeout"),
        ("redis://host#a", "no '#'"),
    ],
)
def test_urls_that_open_nothing(url: str, said: str) -> None:
    if url.startswith("redis"):
        pytest.importorskip("redis")
    with pytest.raises(InvalidInput, match=said) as raised:
        open_tier(url)
    assert "hunter2" not in str(raised.value)


# -- far stores ----------------------------------------------------------------------------------------------------


def test_a_restore_from_afar_is_few_calls(make: Callable[..., PageStore], store: Store) -> None:
    """Two listings and the index of each segment to open; then as many reads as there are windows, and no more."""
    data = data_of(600)
    names = make().put(data).digests
    far = FarStore(store)
    pages = make(over=far)
    assert calls(far) == {"list": 2, "get": 1}
    far.reset()
    assert read_pages(pages, names, data) == data
    assert calls(far) == {"view": -(-600 // (WINDOW // 1000))}
    far.reset()
    late = make().put(data_of(10, seed="late")).digests
    assert read_pages(pages, late, data_of(10)) == data_of(10, seed="late")
    assert calls(far) == {"list": 2, "get": 1, "view": 1}, "what came since is looked for once"


def test_a_put_to_afar_is_few_calls(make: Callable[..., PageStore], store: Store) -> None:
    far = FarStore(store)
    pages = make(over=far)
    far.reset()
    pages.put(data_of(600))
    assert calls(far) == {"list": 2, "writer": 1, "head": 1}
    far.reset()
    pages.put(data_of(600))
    assert calls(far) == {"list": 2}


def test_indices_are_read_together(store: Store, make: Callable[..., PageStore]) -> None:
    """Those of many segments, all at once."""
    writer = make()
    for i in range(8):
        writer.put(data_of(1, seed=i))
    together = threading.Barrier(4)

    class Waiting(FarStore):
        def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
            together.wait(30)
            return super().get(key, start=start, size=size)

    assert len(make(over=Waiting(store)).segments()) == 8


class WrongOnce(WrapperStore):
    """Answers each read with one wrong byte the first time, like a bad cable."""

    has_views = False  # type: ignore[assignment]

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.seen: set[tuple[str, int]] = set()

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        data = bytearray(super().get(key, start=start, size=size))
        if (key, start) not in self.seen:
            self.seen.add((key, start))
            data[-1] ^= 1
        return bytes(data)

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        super().get_ranges(key, ranges)
        if (key, -1) not in self.seen:
            self.seen.add((key, -1))
            ranges[0].out[0] ^= 1


def test_what_comes_wrong_once_is_no_damage(make: Callable[..., PageStore], store: Store) -> None:
    data = data_of(5)
    names = make().put(data).digests
    pages = make(over=WrongOnce(store))
    assert pages.broken_segments() == {}
    assert read_pages(pages, names, data) == data
    assert pages.damaged_places() == []
    assert not [*store.list("damaged/")]


def test_a_mark_that_is_withdrawn_is_forgotten_by_all(make: Callable[..., PageStore], store: Store) -> None:
    data = data_of(2)
    pages = make()
    names = pages.put(data).digests
    (key,) = pages.homes(names[0])
    right = store.get(key)
    store.put(key, b"?" + right[1:])
    with pytest.raises(DamagedPage):
        pages.get(names[0])
    store.put(key, right)
    store.delete([info.key for info in store.list("damaged/")])
    assert pages.get(names[0]) == data[0]


def test_a_gc_leaves_tiers_alone(store: Store) -> None:
    """What a tier has of pages that are gone is bytes without a name."""
    tier = MemoryTier()
    with Repository.init(store):
        pass
    with Repository.open(store, tiers=[tier]) as repo:
        snapshot(repo, halves(2), None)
        gc.apply(repo, gc.plan(repo, min_age=0))
        kept = snapshot(repo, halves(3))
        assert read_back(repo, kept.cid) == halves(3)


def test_a_store_that_fails_is_an_error_also_with_tiers(make: Callable[..., PageStore], store: Store) -> None:
    class Broken(WrapperStore):
        has_views = False  # type: ignore[assignment]

        def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
            raise StoreError("the network is down")

    names = put(store, data_of(3), [])
    tier = MemoryTier()
    tier.pages[names[0]] = data_of(1)[0]
    pages = make(tier, over=Broken(store))
    assert read_pages(pages, names[:1], data_of(1)) == data_of(1)
    with pytest.raises(StoreError, match="network is down"):
        read_pages(pages, names, data_of(3))
