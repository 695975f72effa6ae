"""The part of `StoreTests` in which threads race, over two stores on the same data where the store can be reopened."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvist.errors import AlreadyExists, Conflict
from kvist.store import Match, PutMode, Store


def content(size: int, seed: int = 0) -> bytes:
    """``size`` bytes whose every 251-byte period differs from its shifted self, so that misplaced pieces show."""
    period = bytes((i + seed) % 251 for i in range(251))
    return (period * (size // 251 + 1))[:size]


class StoreRaceTests:
    """Needs the fixtures ``store``, and ``other``: the same data seen through another instance."""

    @pytest.mark.parametrize("how", ["create", "match", "writer"])
    def test_one_of_many_wins(self, store: Store, other: Store, how: str) -> None:
        """Of 16 threads that create, or swap against one etag, exactly one succeeds, and its bytes stay."""
        for turn in range(5):
            key = f"k/{turn}"
            mode: PutMode = Match(store.put(key, b"start")) if how == "match" else "create"
            start = threading.Barrier(16)

            def attempt(i: int, key: str = key, mode: PutMode = mode, start: threading.Barrier = start) -> int | None:
                mine = (store, other)[i % 2]
                start.wait()
                try:
                    if how == "writer":
                        with mine.writer(key) as writer:
                            writer.write(b"%d" % i)
                            writer.commit()
                    else:
                        mine.put(key, b"%d" % i, mode=mode)
                except (AlreadyExists, Conflict):
                    return None
                return i

            with ThreadPoolExecutor(16) as pool:
                winners = [i for i in pool.map(attempt, range(16)) if i is not None]
            assert len(winners) == 1
            assert store.get(key) == b"%d" % winners[0]

    def test_swaps_in_a_loop_lose_no_update(self, store: Store, other: Store) -> None:
        """Eight threads count up one number by compare-and-swap."""
        store.put("n", b"0")

        def count(mine: Store) -> None:
            for _ in range(10):
                while True:
                    info = mine.head("n")
                    assert info is not None
                    try:
                        mine.put("n", b"%d" % (int(mine.get("n")) + 1), mode=Match(info.etag))
                        break
                    except Conflict:
                        continue

        with ThreadPoolExecutor(8) as pool:
            [*pool.map(count, [store, other] * 4)]
        assert store.get("n") == b"80"

    def test_readers_see_old_or_new(self, store: Store, other: Store) -> None:
        """While a thread flips an object between two contents of unequal sizes, every read is one of them whole."""
        contents = (content(300_000, 1), content(200_000, 2))
        store.put("a", contents[0])
        stop = threading.Event()

        def flip() -> None:
            for i in itertools.count(1):
                if stop.is_set():
                    return
                store.put("a", contents[i % 2])

        with ThreadPoolExecutor(1) as pool:
            flipping = pool.submit(flip)
            try:
                for _ in range(200):
                    assert other.get("a") in contents
                    assert [info.size in (300_000, 200_000) for info in other.list()] == [True]
            finally:
                stop.set()
            flipping.result()
