import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("redis")

from kvist.repo.pages import PageStore
from kvist.repo.tier import PageTier, open_tier
from kvist.repo.tier.base import FIRST_PAUSE_S, Clock
from kvist.repo.tier.redis import RedisTier
from kvist.store import MemoryStore
from kvist.testing.page_tier import ManualClock, PageTierTests, name_of, page, read, read_pages
from kvist.testing.processes import free_port
from kvist.testing.tier_servers import REDIS, redis_server

pytestmark = pytest.mark.skipif(REDIS is None, reason="needs redis-server or valkey-server")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with redis_server() as port:
        yield port


class TestRedisTier(PageTierTests):
    @pytest.fixture(autouse=True)
    def _at(self, port: int) -> None:
        self.port = port

    def make_tier(self, tmp_path: Path) -> PageTier:
        return RedisTier("127.0.0.1", self.port, timeout=10)

    def make_down(self, tmp_path: Path, clock: Clock) -> PageTier:
        return RedisTier("127.0.0.1", free_port(), clock=clock)


def test_a_server_that_does_not_answer_costs_one_time_out(port: int) -> None:
    """Also while eight threads ask it; and what it is asked for comes from the store."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        clock = ManualClock()
        tier = RedisTier("127.0.0.1", silent.getsockname()[1], timeout=0.2, clock=clock)
        data = [page(10_000, i) for i in range(50)]
        pages = PageStore(MemoryStore(), "blake3", tiers=[tier])
        names = pages.put(data).digests
        started = time.monotonic()
        threads = [threading.Thread(target=read_pages, args=(pages, names, data)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tier.stats().errors <= 9  # each reader's, and the writer's
        errors = tier.stats().errors
        for _ in range(100):
            assert read_pages(pages, names, data) == data
        assert tier.stats().errors == errors
        assert time.monotonic() - started < 100 * 0.2
        pages.close()


def test_a_server_that_comes_back_is_used_again() -> None:
    clock, port = ManualClock(), free_port()
    tier = RedisTier("127.0.0.1", port, clock=clock, timeout=10)
    item = name_of(page(1000)), page(1000)
    with redis_server(port=port):
        tier.write([item])
        assert read(tier, [item[0]], [1000]) == [item[1]]
    assert read(tier, [item[0]], [1000]) == [None]
    with redis_server(port=port):
        assert read(tier, [item[0]], [1000]) == [None]
        assert tier.stats().is_down
        clock.now += FIRST_PAUSE_S
        tier.write([item])
        assert read(tier, [item[0]], [1000]) == [item[1]]
        assert not tier.stats().is_down
    tier.close()


def test_a_server_without_memory_stops_writing_only(caplog: pytest.LogCaptureFixture) -> None:
    with redis_server("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as port:
        tier = RedisTier("127.0.0.1", port, timeout=10)
        items = [(name_of(data), data) for data in (page(100_000, i) for i in range(60))]
        for i in range(0, 60, 10):
            tier.write(items[i : i + 10])
        assert tier.stats().is_down and tier.stats().errors == 1
        assert "is not written for now" in caplog.text
        assert read(tier, [items[0][0]], [100_000]) == [items[0][1]]
        tier.close()


def test_what_to_keep_is_the_servers_to_decide() -> None:
    with redis_server("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru") as port:
        tier = RedisTier("127.0.0.1", port, timeout=10)
        for i in range(60):
            tier.write([(name_of(page(100_000, i)), page(100_000, i))])
        names = [name_of(page(100_000, i)) for i in range(60)]
        got = read(tier, names, [100_000] * 60)
        assert 10 < sum(each is not None for each in got) < 60
        assert all(each in (None, page(100_000, i)) for i, each in enumerate(got))
        assert tier.stats().errors == 0
        tier.close()


def test_pages_go_after_their_time(port: int) -> None:
    import redis

    with open_tier(f"redis://127.0.0.1:{port}/1?ttl=1000") as tier:
        assert tier.url == f"redis://127.0.0.1:{port}/1?ttl=1000"
        name = name_of(b"page")
        tier.write([(name, b"page")])
        with redis.Redis(port=port, db=1) as client:
            assert 0 < client.ttl(f"kvist:page:{name}") <= 1000
    with open_tier(f"redis://127.0.0.1:{port}?timeout=2.5&ttl=7") as tier:
        assert tier.url == f"redis://127.0.0.1:{port}/0?ttl=7&timeout=2.5"
    with open_tier(f"redis://127.0.0.1:{port}") as tier:
        assert tier.url == f"redis://127.0.0.1:{port}/0"
        assert read(tier, [name], [4]) == [None], "another database"


def test_credentials_come_from_the_environment_and_are_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server("--requirepass", "hunter2") as port:
        clock = ManualClock()
        tier = RedisTier("127.0.0.1", port, timeout=10, clock=clock)
        tier.write([(name_of(b"x"), b"x")])
        assert tier.stats().errors == 1, "refused without"
        monkeypatch.setenv("KVIST_REDIS_PASSWORD", "hunter2")
        with RedisTier("127.0.0.1", port, timeout=10) as allowed:
            allowed.write([(name_of(b"x"), b"x")])
            assert read(allowed, [name_of(b"x")], [1]) == [b"x"]
            assert "hunter2" not in repr(allowed) + allowed.url
        monkeypatch.setenv("KVIST_REDIS_PASSWORD", "letmein")
        with RedisTier("127.0.0.1", port, timeout=10) as wrong:
            assert read(wrong, [name_of(b"x")], [1]) == [None]
        assert "letmein" not in caplog.text and "hunter2" not in caplog.text
        tier.close()
