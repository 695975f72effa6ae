"""Values read at a bounded rate."""

from __future__ import annotations

import threading
import time

from kvist.errors import NotFound, StoreError
from kvist.server.aged import Aged


class Source:
    """Counts readings; each waits until it is let go."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.error: Exception | None = None

    def read(self) -> int:
        self.began.set()
        self.gate.wait()
        self.count += 1
        if self.error is not None:
            raise self.error
        return self.count


def test_read_once_for_many_who_ask() -> None:
    source = Source()
    source.gate.clear()
    aged = Aged(source.read, least_s=1000)
    assert aged.peek() is None
    found: list[int | None] = []
    threads = [threading.Thread(target=lambda: found.append(aged.get().value)) for _ in range(8)]
    for thread in threads:
        thread.start()
    source.gate.set()
    for thread in threads:
        thread.join()
    assert found == [1] * 8
    assert aged.get().value == aged.fresh().value == 1
    reading = aged.peek()
    assert reading is not None and 0 <= reading.age_s < 1000


def test_what_is_old_is_read_again_in_the_background() -> None:
    source = Source()
    aged = Aged(source.read, least_s=0)
    assert aged.get().value is not None
    source.gate.clear()
    for _ in range(100):  # though readings are due, and cannot end, nobody waits
        assert aged.get().value is not None
    before = aged.get().value
    source.gate.set()
    while aged.get().value == before:
        time.sleep(0.001)


def test_fresh_waits_for_what_is_due() -> None:
    source = Source()
    aged = Aged(source.read, least_s=0)
    first = aged.fresh().value
    assert first == 1
    found = 1
    while found == 1:
        found = aged.fresh().value or 0
    assert found > 1


def test_expired_values_are_not_shown() -> None:
    source = Source()
    aged = Aged(source.read, least_s=1000)
    assert aged.get().value == 1
    aged.expire()
    assert aged.get().value == 2
    assert aged.fresh().value == 2


def test_what_was_read_before_it_expired_does_not_count() -> None:
    source = Source()
    source.gate.clear()
    aged = Aged(source.read, least_s=1000)
    aged.peek()
    source.began.wait()
    aged.expire()  # while the first reading runs
    source.gate.set()
    assert aged.get().value == 2


def test_an_error_leaves_what_is_known() -> None:
    source = Source()
    source.error = StoreError("out of reach")
    aged = Aged(source.read, least_s=1000)
    reading = aged.get()
    assert reading.value is None
    assert reading.error is source.error
    source.error = None
    aged.expire()
    known = aged.get()
    assert (known.value, known.error) == (source.count, None)
    source.error = NotFound("gone")
    aged.expire()
    reading = aged.get()
    assert (reading.value, reading.error) == (known.value, source.error)
    assert reading.at == known.at


def test_a_bug_is_an_error_too() -> None:
    source = Source()
    source.error = ZeroDivisionError()
    reading = Aged(source.read, least_s=1000).get()
    assert reading.value is None
    assert reading.error is not None and "ZeroDivisionError" in str(reading.error)
