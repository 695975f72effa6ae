"""The sketch estimates uses, never too few, and forgets."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.blocks.policy.tinylfu import TinyLfu, key_bytes


def test_an_unused_key() -> None:
    assert TinyLfu(100).estimate(42) == 0
    assert TinyLfu(1).estimate(b"") == 0


def test_it_counts_to_fifteen() -> None:
    sketch = TinyLfu(100)
    for times in range(1, 20):
        sketch.count(42)
        assert sketch.estimate(42) == min(times, 15)


def test_counts_are_halved_after_ten_uses_for_each_key() -> None:
    """Those of a key that is at fifteen do not count for that."""
    sketch = TinyLfu(100)
    for _ in range(2000):
        sketch.count(-1)
    assert sketch.estimate(-1) == 15
    for key in range(985):
        assert sketch.estimate(-1) == 15, key
        sketch.count(key)
    assert sketch.estimate(-1) == 7


@settings(deadline=None)
@given(keys=st.lists(st.integers(0, 40) | st.binary(max_size=2), max_size=99), capacity=st.integers(10, 200))
def test_it_never_counts_too_few(keys: list[int | bytes], capacity: int) -> None:
    sketch = TinyLfu(capacity)
    for key in keys:
        sketch.count(key)
    for key, times in Counter(keys).items():
        assert sketch.estimate(key) >= min(times, 15)


def test_it_tells_as_many_keys_apart_as_its_capacity_says() -> None:
    """Of as many that were used once each, and as many that were not, few are taken for more."""
    sketch = TinyLfu(4096)
    for key in range(4096):
        sketch.count(key)
    assert sum(sketch.estimate(key) > 1 for key in range(4096)) < 820
    assert sum(sketch.estimate(key) > 0 for key in range(4096, 8192)) < 820


@pytest.mark.parametrize(
    ("key", "data"),
    [
        (0, bytes(8)),
        (1, b"\x01" + bytes(7)),
        (-1, b"\xff" * 8),
        (2**64 - 1, b"\xff" * 8 + b"\x00"),
        (2**127, bytes(15) + b"\x80\x00"),
        (b"ab", b"ab"),
    ],
)
def test_what_is_hashed(key: int | bytes, data: bytes) -> None:
    assert key_bytes(key) == data
