"""Numbers as people read them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.server.ui import figures


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (12_900_000, "12.3 MiB"),
        (1023 * 2**30, "1023 GiB"), (2**40, "1.00 TiB"), (2**62, "4.00 EiB"),
    ],
)  # fmt: skip
def test_bytes(size: int, text: str) -> None:
    assert figures.nbytes(size) == text


@given(st.integers(0, 2**63))
def test_bytes_never_mislead(size: int) -> None:
    value, unit = figures.nbytes(size).split()
    scale = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB").index(unit)
    assert abs(float(value) * scale - size) <= max(0.006 * size, 0.5)
    assert len(value.replace(".", "")) <= 4


@given(st.floats(0, 1))
def test_percent_is_none_or_all_only_if_it_is(part: float) -> None:
    text = figures.percent(part)
    assert (text == "0%") == (part == 0)
    assert (text == "100%") == (100 * part == 100)


@pytest.mark.parametrize(
    ("span", "text"),
    [(0, "0 ms"), (0.00042, "0.42 ms"), (0.035, "35.0 ms"), (1.2, "1.20 s"), (59.9, "59.9 s"), (185, "3 min 5 s"),
     (7260, "2 h 1 min")],
)  # fmt: skip
def test_seconds(span: float, text: str) -> None:
    assert figures.seconds(span) == text


def test_ages() -> None:
    assert figures.ago(0.2) == figures.ago(-5) == "just now"
    assert figures.ago(12.7) == "12 s ago"
    assert figures.ago(3 * 86400) == "3 d ago"
    assert figures.since(time.time_ns() - 61 * 10**9) == "1 min ago"
    assert figures.moment(0) == "1970-01-01 00:00:00 UTC"
    assert figures.moment(2**63 - 1)
    assert figures.times(13.24) == "13.2×"
    assert figures.count(1234567) == "1,234,567"
