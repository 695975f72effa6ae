"""Operations and who counts them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from kvist.errors import Conflict
from kvist.telemetry import Recorder, counted, operation, recorders, recording


class Counting(Recorder):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, str | None]] = []

    def operation(self, name: str, seconds: float, *, nbytes: int, pages: int, error: str | None) -> None:
        assert seconds >= 0
        self.seen.append((name, nbytes, pages, error))


def test_nobody_counts_unless_asked() -> None:
    code = "from kvist.telemetry import operation, recorders; operation('snapshot').__enter__(); print(recorders())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "()\n"


def test_bytes_pages_and_failures() -> None:
    counting = Counting()
    with recording(counting):
        with operation("put_pages", branch="main") as done:
            done.add(nbytes=10, pages=2)
            done.add(nbytes=1)
        with pytest.raises(Conflict), operation("gc") as done:
            done.add(nbytes=7)
            raise Conflict("somebody was first")
        with pytest.raises(ZeroDivisionError), operation("gc"):
            raise ZeroDivisionError
        with pytest.raises(asyncio.CancelledError), operation("gc"):
            raise asyncio.CancelledError
    with operation("later"):
        pass
    assert counting.seen == [
        ("put_pages", 11, 2, None),
        ("gc", 7, 0, "conflict"),
        ("gc", 0, 0, "internal"),
        ("gc", 0, 0, "cancelled"),
    ]


def test_a_function_counted() -> None:
    @counted("copy", lambda size: (size, 1))
    def copy(size: int) -> int:
        """Copies."""
        return size

    one, two = Counting(), Counting()
    with recording(one), recording(two):
        assert copy(3) == 3
    assert one.seen == two.seen == [("copy", 3, 1, None)]
    assert copy.__doc__ == "Copies."


def test_recorders_come_and_go_in_any_order() -> None:
    before = recorders()

    def work() -> None:
        for _ in range(200):
            with recording(Counting()), operation("x"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorders() == before


def test_the_core_imports_no_telemetry_library() -> None:
    """Neither Prometheus nor OpenTelemetry is imported by what a command line needs; spans are when there is one."""
    code = "import sys, kvist.repo, kvist.store, kvist.telemetry\n" + (
        "print([name for name in ('prometheus_client', 'opentelemetry', 'starlette') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
