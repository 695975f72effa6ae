"""The pool of arrays against one of lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.sim.pool import SlotPool


class SlowPool:
    """Slots by number; blanks are taken first, the last given back first, then the least recently used."""

    def __init__(self, slots: int) -> None:
        self.content: list[int | None] = [None] * slots
        self.refs = [0] * slots
        self.blank = list(range(slots))[::-1]
        self.idle: list[int] = []
        self.slots: dict[int, list[int]] = {}
        self.moves: list[tuple[bool, int]] = []

    def find(self, contents: list[int]) -> list[int]:
        found = []
        for content in contents:
            if content not in self.slots:
                break
            found.append(self.slots[content][0])
        return found

    def acquire(self, found: list[int], fresh: int) -> list[int] | None:
        free = len(self.blank) + sum(slot not in found for slot in self.idle)
        if fresh > free:
            return None
        for slot in found:
            if not self.refs[slot]:
                self.idle.remove(slot)
            self.refs[slot] += 1
        kept = max(len(self.blank) - fresh, 0)
        taken, self.blank = self.blank[kept:], self.blank[:kept]
        while len(taken) < fresh:
            taken.append(self.evict())
        for slot in taken:
            self.refs[slot] = 1
        return taken

    def evict(self) -> int:
        slot = self.idle.pop(0)
        content, self.content[slot] = self.content[slot], None
        assert content is not None
        self.slots[content].remove(slot)
        if not self.slots[content]:
            del self.slots[content]
            self.moves.append((False, content))
        return slot

    def cache(self, slots: list[int], contents: list[int]) -> None:
        for slot, content in zip(slots, contents, strict=True):
            self.content[slot] = content
            if content not in self.slots:
                self.moves.append((True, content))
            self.slots.setdefault(content, []).append(slot)

    def release(self, slots: list[int]) -> None:
        blank = []
        for slot in slots:
            self.refs[slot] -= 1
            if not self.refs[slot]:
                (blank if self.content[slot] is None else self.idle).append(slot)
        self.blank += blank


def moves_of(pool: SlotPool) -> list[tuple[bool, int]]:
    told = [(stored, content) for stored, contents, _ in pool.moves for content in contents.tolist()]
    pool.moves = []
    return told


def array(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@settings(max_examples=200)
@given(st.integers(1, 12), st.data())
def test_equals_the_slow_pool(slots: int, data: st.DataObject) -> None:
    """Sequences come with a part of one of three chains, have some of their blocks cached, and go."""
    pool, slow = SlotPool(slots, 3, tell=True), SlowPool(slots)
    pool.grow(30)
    held: list[tuple[list[int], list[int], int]] = []  # slots, chain, of it cached
    for what in data.draw(st.lists(st.sampled_from("aaacr"), max_size=80)):
        if what == "a":
            family, length = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 9))
            chain = [10 * family + block for block in range(length)]
            limit = data.draw(st.integers(0, length))
            found = slow.find(chain[:limit])
            assert pool.find(array(chain[:limit])).tolist() == found
            assert pool.num_held(array(found).astype(np.int32)) == sum(slow.refs[slot] > 0 for slot in found)
            fresh = data.draw(st.integers(0, 6))
            expected = slow.acquire(found, fresh)
            got = pool.acquire(pool.find(array(chain[:limit])), fresh)
            assert (None if got is None else got.tolist()) == expected
            if expected is not None:
                held.append((found + expected, [10 * family + at for at in range(10)], len(found)))
        elif what == "c" and held:
            number = data.draw(st.integers(0, len(held) - 1))
            taken, chain, start = held[number]
            end = data.draw(st.integers(start, min(len(taken), len(chain))))
            if start < end:
                slow.cache(taken[start:end], chain[start:end])
                kept = pool.cache(np.array(taken[start:end], dtype=np.int32), array(chain[:end]))
                assert kept.tolist() == taken[start:end]
                held[number] = (taken, chain, end)
        elif what == "r" and held:
            taken, _, _ = held.pop(data.draw(st.integers(0, len(held) - 1)))
            slow.release(taken[::-1])
            pool.release(np.array(taken[::-1], dtype=np.int32))
        assert pool.num_free == len(slow.blank) + len(slow.idle)
        assert pool.num_used == sum(refs > 0 for refs in slow.refs)
        # What is stored and removed by one call may be told in another order.
        assert sorted(moves_of(pool)) == sorted(slow.moves)
        slow.moves = []
    contents = set(slow.slots)
    assert {content for content in range(30) if len(pool.find(array([content])))} == contents


def test_a_full_queue_is_packed() -> None:
    """More slots go back than the queue is long, in an order that tells the least recently used."""
    pool = SlotPool(4, 4)
    chain = array([0, 1, 2, 3])
    fresh = pool.acquire(array([]).astype(np.int32), 4)
    assert fresh is not None
    pool.release(pool.cache(fresh, chain)[::-1])
    for turn in range(1000):
        found = pool.find(chain[: 1 + turn % 4])
        assert len(found) == 1 + turn % 4
        assert pool.acquire(found, 0) is not None
        pool.release(found[::-1])
    assert pool.num_evicted == 0
    pool.release(pool.acquire(pool.find(chain[:0]), 2))  # type: ignore[arg-type]
    assert pool.num_evicted == 2
    assert len(pool.find(chain)) == 2
