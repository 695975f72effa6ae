"""`PageTierTests`: what every `PageTier` must do.

class TestMine(PageTierTests):
    def make_tier(self, tmp_path: Path) -> PageTier:
        return MyTier(tmp_path)

    def make_down(self, tmp_path: Path, clock: Clock) -> PageTier:
        return MyTier("nowhere", clock=clock)
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.hashing import Buffer
from kvist.repo.pages import PageStore
from kvist.repo.tier import PageTier, TierStats, open_tier
from kvist.repo.tier.base import FIRST_PAUSE_S, LAST_PAUSE_S, Clock
from kvist.store import MemoryStore, MeteredStore, Store

SIZES: Final = (1, 511, 4096, 65536, (1 << 20) + 5)


def page(size: int, seed: object = 0) -> bytes:
    """``size`` bytes that no other seed gives."""
    return random.Random(f"{seed}").randbytes(size)


def name_of(data: Buffer) -> str:
    """The digest that names a page."""
    return f"blake3:{blake3(data).hexdigest()}"


def any_name() -> str:
    """A digest that nothing has."""
    return name_of(uuid.uuid4().bytes)


def read(tier: PageTier, names: Sequence[str], sizes: Sequence[int]) -> list[bytes | None]:
    """What a tier gives."""
    outs = [bytearray(size) for size in sizes]
    found = tier.read(names, [memoryview(out) for out in outs])
    return [bytes(out) if is_here else None for is_here, out in zip(found, outs, strict=True)]


class ManualClock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Its time, in seconds."""
        return self.now


class PageTierTests:
    """Subclass it, and give `make_tier` and `make_down`; give `reopen` if the place can be opened twice."""

    def make_tier(self, tmp_path: Path) -> PageTier:
        """A tier with room for all that the tests write, some 32 MiB; ``tmp_path`` is a directory for it alone."""
        raise NotImplementedError

    def make_down(self, tmp_path: Path, clock: Clock) -> PageTier:
        """A tier that cannot be reached and whose pauses are measured by ``clock``."""
        raise NotImplementedError

    def reopen(self, tier: PageTier) -> PageTier | None:
        """Another instance on the same place, as another process would open it; ``None`` if there is no such."""
        return open_tier(tier.url)

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[PageTier]:
        """The tier under test."""
        with self.make_tier(tmp_path) as tier:
            yield tier

    @pytest.fixture
    def other(self, tier: PageTier) -> Iterator[PageTier]:
        """The same place seen from elsewhere; for a tier that cannot be reopened, the tier itself."""
        other = self.reopen(tier)
        if other is None:
            yield tier
        else:
            with other:
                yield other

    # -- read, write, forget -------------------------------------------------------------------------------------

    def test_what_is_not_there_is_not_given(self, tier: PageTier) -> None:
        """A miss is False, and no error."""
        assert read(tier, [any_name(), any_name()], [10, 0x10000]) == [None, None]
        assert tier.stats().misses == 2

    def test_nothing_asked_for(self, tier: PageTier) -> None:
        """The zero case of every call."""
        assert tier.read([], []) == []
        tier.write([])
        tier.forget([])
        assert tier.stats() == TierStats(tier.url)

    @pytest.mark.parametrize("size", SIZES)
    def test_a_page_is_read_back(self, tier: PageTier, other: PageTier, size: int) -> None:
        """Whatever its size, by any instance."""
        data = page(size)
        tier.write([(name_of(data), data)])
        assert read(other, [name_of(data)], [size]) == [data]
        assert (tier.stats().pages_written, tier.stats().bytes_written) == (1, size)
        assert (other.stats().hits, other.stats().bytes_read) == (1, size)

    def test_many_at_once_some_of_them_missing(self, tier: PageTier, other: PageTier) -> None:
        """Answers come in the order of the questions."""
        data = [page(1 + 977 * i, i) for i in range(100)]
        tier.write([(name_of(each), each) for each in data[::2]])
        expected = [each if i % 2 == 0 else None for i, each in enumerate(data)]
        assert read(other, [name_of(each) for each in data], [len(each) for each in data]) == expected
        twice = [data[0], data[2], data[0]]
        assert read(other, [name_of(each) for each in twice], [len(each) for each in twice]) == twice

    def test_another_length_is_a_miss(self, tier: PageTier) -> None:
        """A copy that is shorter or longer than the buffer is no copy."""
        data = page(1000)
        tier.write([(name_of(data), data)])
        assert read(tier, [name_of(data)] * 2, [999, 1001]) == [None, None]
        assert read(tier, [name_of(data)], [1000]) == [data]

    def test_write_takes_every_kind_of_buffer(self, tier: PageTier) -> None:
        """And keeps no reference to any."""
        data = bytearray(page(5000))
        whole, part = bytes(data), bytes(data[1:-1])
        tier.write([(name_of(whole), data), (name_of(part), memoryview(data)[1:-1])])
        data.clear()  # raises BufferError while a view of it is held
        assert read(tier, [name_of(whole), name_of(part)], [5000, 4998]) == [whole, part]

    def test_to_write_again_is_no_error(self, tier: PageTier, other: PageTier) -> None:
        """In one call or in several, by one or by two."""
        item = name_of(page(100)), page(100)
        tier.write([item, item])
        other.write([item])
        tier.write([item])
        assert read(other, [item[0]], [100]) == [item[1]]

    def test_what_is_forgotten_is_gone_for_all_and_can_come_again(self, tier: PageTier, other: PageTier) -> None:
        """As a copy that was found wrong is, and then read from the store."""
        data = [page(100, i) for i in range(3)]
        names = [name_of(each) for each in data]
        tier.write([(names[0], b"\0" * 100), *zip(names[1:], data[1:], strict=True)])
        other.forget([names[0], any_name()])
        assert read(tier, names, [100] * 3) == [None, *data[1:]]
        assert other.stats().bad == 2
        tier.write([(names[0], data[0])])
        assert read(other, names, [100] * 3) == data

    def test_a_page_takes_the_place_of_a_torn_one(self, tier: PageTier) -> None:
        """A copy of another length, which no reader can have, does not keep the page out."""
        data = page(1000)
        tier.write([(name_of(data), data[:500])])
        assert read(tier, [name_of(data)], [1000]) == [None]
        tier.write([(name_of(data), data)])
        assert read(tier, [name_of(data)], [1000]) == [data]

    def test_forgetting_where_nothing_is(self, tier: PageTier) -> None:
        """Is no error: what is written next is there."""
        data = page(100)
        tier.forget([name_of(data)])
        tier.write([(name_of(data), data)])
        assert read(tier, [name_of(data)], [100]) == [data]
        assert tier.stats().errors == 0

    def test_the_url_opens_the_same_place(self, tier: PageTier) -> None:
        """And the other's url is the same again."""
        other = self.reopen(tier)
        if other is None:
            pytest.skip("it cannot be opened twice")
        with other:
            assert other.url == tier.url

    def test_close_is_idempotent(self, tier: PageTier) -> None:
        """Twice is once."""
        tier.close()
        tier.close()

    def test_any_history(self, tier: PageTier, other: PageTier) -> None:
        """What a tier gives is what was last written under the name, and not forgotten since."""

        @settings(max_examples=25)
        @given(st.lists(st.tuples(st.sampled_from(["read", "write", "forget"]), st.sets(st.integers(0, 5)))))
        def check(history: list[tuple[str, set[int]]]) -> None:
            data = [page(16 + 3000 * i, uuid.uuid4()) for i in range(6)]  # none twice
            names = [name_of(each) for each in data]
            held: set[int] = set()
            for turn, (act, which) in enumerate(history):
                mine = (tier, other)[turn % 2]
                match act:
                    case "write":
                        mine.write([(names[i], data[i]) for i in which])
                        held |= which
                    case "forget":
                        mine.forget([names[i] for i in which])
                        held -= which
                    case _:
                        got = read(mine, [names[i] for i in which], [len(data[i]) for i in which])
                        assert got == [data[i] if i in held else None for i in which]

        check()

    def test_threads_read_whole_pages_or_none(self, tier: PageTier, other: PageTier) -> None:
        """While four threads write, drop and read the same pages through two instances."""
        data = [page(100_000 + i, i) for i in range(8)]
        names = [name_of(each) for each in data]
        start = threading.Barrier(4)

        def work(number: int) -> int:
            mine, chance = (tier, other)[number % 2], random.Random(number)
            start.wait()
            hits = 0
            for _ in range(60):
                i = chance.randrange(8)
                match chance.randrange(4):
                    case 0:
                        mine.write([(names[i], data[i])])
                    case 1:
                        mine.forget([names[i]])
                    case _:
                        (got,) = read(mine, [names[i]], [len(data[i])])
                        assert got in (None, data[i])
                        hits += got is not None
            return hits

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) > 0

    # -- below a page store --------------------------------------------------------------------------------------

    def test_what_one_puts_another_reads_without_the_store(self, tier: PageTier, other: PageTier) -> None:
        """Pages that one process puts come to another from the tier."""
        if tier is other:
            pytest.skip("it cannot be opened twice")
        store = MemoryStore()
        data = [page(50_000 + i, uuid.uuid4()) for i in range(40)]
        names = put(store, data, [tier])
        metered = MeteredStore(store)
        pages = PageStore(metered, "blake3", tiers=[other])
        metered.reset()
        assert read_pages(pages, names, data) == data
        assert metered.bytes_read == 0
        (stats,) = pages.tier_stats()
        assert (stats.hits, stats.misses, stats.bad) == (40, 0, 0)
        pages.close()

    def test_what_was_read_from_the_store_is_there_the_next_time(self, tier: PageTier, other: PageTier) -> None:
        """Reads fill the tier."""
        if tier is other:
            pytest.skip("it cannot be opened twice")
        store = MemoryStore()
        data = [page(50_000 + i, uuid.uuid4()) for i in range(40)]
        names = put(store, data, [])
        first = PageStore(store, "blake3", tiers=[tier])
        assert read_pages(first, names, data) == data
        first.close()
        metered = MeteredStore(store)
        second = PageStore(metered, "blake3", tiers=[other])
        metered.reset()
        assert read_pages(second, names, data) == data
        assert metered.bytes_read == 0
        second.close()

    def test_wrong_copies_are_never_pages(self, tier: PageTier) -> None:
        """They are found, dropped, read from the store, and right the next time."""
        store = MemoryStore()
        data = [page(10_000, uuid.uuid4()) for _ in range(20)]
        names = put(store, data, [])
        copies = [each if i % 2 else page(10_000, i) for i, each in enumerate(data)]
        tier.write(list(zip(names, copies, strict=True)))
        pages = PageStore(store, "blake3", tiers=[tier])
        assert read_pages(pages, names, data) == data
        (stats,) = pages.tier_stats()
        assert (stats.hits, stats.bad) == (20, 10)
        assert pages.damaged_places() == [], "the store is not to blame"
        pages.close()

    # -- being down ----------------------------------------------------------------------------------------------

    def test_down(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It costs one attempt, then none until the pause is over; one line is logged; nothing is raised."""
        clock = ManualClock()
        with self.make_down(tmp_path, clock) as tier:
            for expected in (1, 1, 1):
                assert read(tier, [any_name()], [10]) == [None]
                assert tier.stats().errors == expected
            assert tier.stats().is_down
            clock.now += FIRST_PAUSE_S
            for expected in (2, 2):
                assert read(tier, [any_name()], [10]) == [None]
                assert tier.stats().errors == expected
            clock.now += FIRST_PAUSE_S  # the second pause is longer
            assert read(tier, [any_name()], [10]) == [None]
            assert tier.stats().errors == 2
            tier.write([(name_of(b"x"), b"x")])
            tier.forget([any_name()])
            clock.now += LAST_PAUSE_S
            tier.write([(name_of(b"x"), b"x")])
            assert tier.stats().pages_written == 0
        down = [record for record in caplog.records if "is not read" in record.message]
        assert len(down) == 1 and down[0].levelname == "WARNING"

    def test_down_below_a_page_store(self, tmp_path: Path) -> None:
        """Puts and reads go on."""
        data = [page(10_000, i) for i in range(20)]
        pages = PageStore(MemoryStore(), "blake3", tiers=[self.make_down(tmp_path, ManualClock())])
        names = pages.put(data).digests
        assert read_pages(pages, names, data) == data
        pages.close()


def put(store: Store, data: Sequence[bytes], tiers: Sequence[PageTier]) -> list[str]:
    """Put pages, and wait until the tiers have them. Closes the tiers."""
    pages = PageStore(store, "blake3", tiers=tiers)
    names = pages.put(data).digests
    pages.close()
    return names


def read_pages(pages: PageStore, names: Sequence[str], data: Sequence[bytes]) -> list[bytes]:
    """Read pages of known lengths."""
    outs = [bytearray(len(each)) for each in data]
    pages.get_into(names, [memoryview(out) for out in outs])
    return list(map(bytes, outs))
