"""Host memory: slots, pins, and pages that stay while there is room."""

from __future__ import annotations

import threading

import pytest

from kvist.engines.paged.staging import HostPool
from kvist.errors import InvalidInput


def test_a_page_stays_after_its_release_until_the_slot_is_needed() -> None:
    pool = HostPool(4 * 16, 16)
    (slot,) = pool.take(1, wait=False)
    pool.view(slot, 3)[:] = b"abc"
    pool.name(slot, "page")
    pool.release([slot])
    found = pool.find("page")
    assert found == slot
    assert bytes(pool.view(slot, 3)) == b"abc"
    pool.release([slot])
    assert len(pool.take(4, wait=False)) == 4
    assert pool.find("page") is None


def test_the_oldest_page_goes_first() -> None:
    pool = HostPool(2 * 16, 16)
    for name in "ab":
        (slot,) = pool.take(1, wait=False)
        pool.name(slot, name)
        pool.release([slot])
    used = pool.find("a")
    assert used is not None
    pool.release([used])
    pool.take(1, wait=False)
    assert pool.find("b") is None
    assert pool.find("a") == used


def test_pinned_slots_are_never_handed_out() -> None:
    pool = HostPool(3 * 16, 16)
    first = pool.take(2, wait=False)
    pool.name(first[0], "x")
    again = pool.find("x")
    pool.release([first[0]])
    assert again == first[0]  # pinned once more by find
    assert len(pool.take(5, wait=False)) == 1
    assert pool.take(1, wait=False) == []


def test_waiting_for_a_slot_ends_when_one_is_released() -> None:
    pool = HostPool(16, 16)
    held = pool.take(1, wait=True)
    timer = threading.Timer(0.05, pool.release, [held])
    timer.start()
    assert pool.take(1, wait=True) == held
    timer.join()


def test_a_page_that_two_slots_hold_is_found_in_the_first() -> None:
    pool = HostPool(2 * 16, 16)
    a, b = pool.take(2, wait=False)
    pool.name(a, "p")
    pool.name(b, "p")
    pool.release([a, b])
    assert pool.find("p") == a
    assert pool.take(2, wait=False) == [b]


def test_a_pool_without_room_for_one_page_is_refused() -> None:
    with pytest.raises(InvalidInput, match="a page of 32 bytes"):
        HostPool(31, 32)
