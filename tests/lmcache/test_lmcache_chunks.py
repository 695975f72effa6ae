"""Chunks in a repository: what is read is what was put, whatever else happens; bounds and pins hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from no_lmcache import LAYOUT

from kvist.blocks.policy import Lru, Policy
from kvist.engines.paged.chunks import Chunks
from kvist.engines.paged.pins import Pinning, Pins
from kvist.errors import InvalidInput, PoolExhausted
from kvist.repo.gc import apply, plan
from kvist.repo.repository import Repository
from kvist.store import MemoryStore
from kvist.testing.policy import PolicyTests

Make = Callable[..., Chunks]
HALF = LAYOUT.page_bytes


class TestPinningWithoutPins(PolicyTests):
    """A policy as any other."""

    def make_policy(self) -> Policy[int]:
        return Pinning(Lru(), Pins(1.0, lambda: 0.0))


class TestPinning(PolicyTests):
    """One that keeps what is pinned from outside."""

    def make_policy(self) -> Policy[int]:
        pins: Pins[int] = Pins(1.0, lambda: 0.0)
        pins.pin(100)  # and what it does not hold is nothing to it
        return Pinning(Lru(), pins)

    def test_pins_hold_until_the_last_is_taken_back(self) -> None:
        pins: Pins[int] = Pins(1.0, lambda: 0.0)
        policy = Pinning(Lru(), pins)
        policy.insert([1])
        policy.insert([2])
        pins.pin(1)
        pins.pin(1)
        assert policy.evict(1) == [2]
        assert pins.unpin(1)
        with pytest.raises(PoolExhausted):
            policy.evict(1)
        assert pins.unpin(1)
        assert not pins.unpin(1)
        assert policy.evict(1) == [1]


def test_a_pin_that_nobody_takes_back_ends() -> None:
    now = [0.0]
    pins: Pins[str] = Pins(10.0, lambda: now[0])
    pins.pin("a")
    now[0] = 9.0
    pins.pin("a")  # heard of again
    now[0] = 18.0
    assert "a" in pins
    now[0] = 19.0
    assert "a" not in pins
    assert not pins.held()
    assert not pins.unpin("a")
    pins.pin("a")
    assert pins.unpin("a")
    pins.pin("a")
    pins.forget("a")
    assert "a" not in pins


def block(number: int) -> str:
    return f"{number:064x}"


def content(number: int) -> tuple[bytes, bytes]:
    return bytes([number % 256]) * HALF, bytes([(number + 1) % 256]) * HALF


def put(chunks: Chunks, *numbers: int) -> int:
    return chunks.put([block(n) for n in numbers], lambda index: content(numbers[index])).result()


def read(chunks: Chunks, *numbers: int) -> list[tuple[bytes, bytes] | None]:
    outs = [(memoryview(bytearray(HALF)), memoryview(bytearray(HALF))) for _ in numbers]
    done = chunks.read([block(n) for n in numbers], outs)
    return [(bytes(k), bytes(v)) if is_read else None for (k, v), is_read in zip(outs, done, strict=True)]


def test_put_read_remove(chunks: Make) -> None:
    one = chunks()
    assert put(one, 1, 2, 1) == 2
    assert read(one, 2, 3, 1) == [content(2), None, content(1)]
    assert len(one) == 2
    assert one.nbytes == 3 * HALF  # V of 1 is K of 2
    assert one.remove(block(1))
    assert read(one, 1, 2) == [None, content(2)]
    one.flush()
    assert put(one, 1) == 1
    assert read(one, 1) == [content(1)]
    metrics = one.metrics
    assert (metrics.stored, metrics.read, metrics.missed, metrics.damaged) == (3, 4, 2, 0)
    assert metrics.bytes_stored == 3 * HALF
    assert metrics.bytes_read == 4 * 2 * HALF


def test_a_removed_chunk_stays_away_from_another_server(chunks: Make) -> None:
    one, two = chunks(), chunks()
    put(one, 1, 2)
    put(two, 3)  # learns of them
    assert one.remove(block(1))
    put(two, 4)  # moves the branch, which still named it
    one.flush()
    assert block(1) not in one
    two.flush()
    assert read(chunks(), 1, 2, 3, 4) == [None, content(2), content(3), content(4)]


def test_what_failed_to_copy_is_not_waited_for(chunks: Make) -> None:
    one = chunks()

    def copy(index: int) -> Any:
        raise MemoryError("no more")

    with pytest.raises(MemoryError):
        one.put([block(1)], copy)
    assert not one.is_waiting(block(1))
    assert put(one, 1) == 1


def test_a_callback_that_fails_harms_nobody(chunks: Make) -> None:
    one, told = chunks(), []

    def done(name: str) -> None:
        told.append(name)
        raise RuntimeError("not ours")

    assert one.put([block(1), block(2)], lambda index: content(index + 1), done).result() == 2
    assert told == [block(1), block(2)]
    assert put(one, 3) == 1


def test_a_bound_that_no_chunk_fits(chunks: Make) -> None:
    with pytest.raises(InvalidInput, match="max_bytes cannot be"):
        chunks(max_bytes=2 * HALF - 1)


def test_a_gc_takes_what_was_evicted_and_leaves_what_is_named(chunks: Make, url: str) -> None:
    one = chunks(max_bytes=4 * 2 * HALF)
    for number in range(0, 40, 2):
        put(one, number)
    with Repository.open(url) as repo:
        apply(repo, plan(repo, min_age=0.0))
    two = chunks(max_bytes=4 * 2 * HALF)
    assert 0 < len(two) <= 4
    there = [number for number in range(0, 40, 2) if block(number) in two]
    assert read(two, *there) == [content(number) for number in there]


def test_readers_beside_writers(chunks: Make) -> None:
    one = chunks(max_bytes=10 * 2 * HALF, policy="sieve")
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(40):
            number = (first + 3 * turn) % 30
            put(one, number)
            (got,) = read(one, number)
            if got is not None and got != content(number):
                wrong.append(number)
            if turn % 7 == 0:
                one.remove(block(number))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert one.nbytes <= 10 * 2 * HALF


def test_writers_beside_a_close(chunks: Make) -> None:
    """Every write ends: stored, or dropped once it is closed."""
    for _ in range(20):
        one, done = chunks(), threading.Event()
        ended: list[int] = []

        def work(one: Chunks = one, done: threading.Event = done, ended: list[int] = ended) -> None:
            for number in range(200):
                ended.append(put(one, number))
                done.set()

        thread = threading.Thread(target=work)
        thread.start()
        done.wait()
        one.close()
        thread.join()
        assert len(ended) == 200
        assert not any(one.is_waiting(block(number)) for number in range(200))
        assert one.metrics.stored + one.metrics.dropped == 200
        one.flush()
        two = chunks()
        assert all(two.remove(block(number)) for number in range(sum(ended)))
        two.close()


class ChunksMachine(RuleBasedStateMachine):
    """Any order of calls: a read gives what was put, or nothing; nothing more is kept than may be."""

    numbers = st.integers(0, 11)
    room = 6

    @initialize()
    def begin(self) -> None:
        self.store = MemoryStore()
        Repository.init(self.store).close()
        self.pinned: dict[int, int] = {}
        self.was_put: set[int] = set()
        self.open()

    def open(self) -> None:
        self.chunks = Chunks(
            Repository.open(self.store), LAYOUT, max_bytes=self.room * 2 * HALF, refresh_s=0.0, pin_timeout_s=1e9
        )

    @rule(numbers=st.lists(numbers, max_size=4, unique=True))
    def put(self, numbers: list[int]) -> None:
        new = [number for number in numbers if block(number) not in self.chunks]
        assert put(self.chunks, *numbers) <= len(new)
        self.was_put.update(numbers)

    @rule(numbers=st.lists(numbers, max_size=4, unique=True))
    def read(self, numbers: list[int]) -> None:
        there = [block(number) in self.chunks for number in numbers]
        got = read(self.chunks, *numbers)
        assert got == [content(n) if is_there else None for n, is_there in zip(numbers, there, strict=True)]

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        if block(number) in self.chunks and len(self.pinned) < self.room // 2:
            self.chunks.pins.pin((0, block(number)))
            self.pinned[number] = self.pinned.get(number, 0) + 1

    @rule(number=numbers)
    def unpin(self, number: int) -> None:
        assert self.chunks.pins.unpin((0, block(number))) == (number in self.pinned)
        self.pinned[number] = self.pinned.get(number, 1) - 1
        if self.pinned[number] == 0:
            del self.pinned[number]

    @rule(number=numbers, force=st.booleans())
    def remove(self, number: int, force: bool) -> None:
        can_go = block(number) in self.chunks and (force or number not in self.pinned)
        assert self.chunks.remove(block(number), force=force) == can_go
        if can_go:
            self.pinned.pop(number, None)
            self.was_put.discard(number)
        self.chunks.flush()

    @rule()
    def reopen(self) -> None:
        names = {number for number in range(12) if block(number) in self.chunks}
        self.chunks.close()
        self.open()
        assert {number for number in range(12) if block(number) in self.chunks} == names
        self.pinned.clear()

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "chunks"):
            assert self.chunks.nbytes <= self.room * 2 * HALF
            assert {number for number in range(12) if block(number) in self.chunks} <= self.was_put
            assert all(block(number) in self.chunks for number in self.pinned)

    def teardown(self) -> None:
        if hasattr(self, "chunks"):
            self.chunks.close()


TestChunksMachine = ChunksMachine.TestCase
TestChunksMachine.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_store_that_is_gone_is_a_miss(chunks: Make, tmp_path: Path) -> None:
    one = chunks()
    put(one, 1)
    (tmp_path / "store").rename(tmp_path / "away")
    assert read(one, 1) == [None]
    (tmp_path / "away").rename(tmp_path / "store")
