"""How long passes take, to the nanosecond."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput
from kvist.sim.timing import Clock, Fixed, Linear, Polynomial, Table, load_timing

AXES = {
    "prefill_isl": np.array([100.0, 200.0, 400.0]),
    "prefill_ttft_ms": np.array([10.0, 20.0, 60.0]),
    "decode_active_kv_tokens": np.array([0.0, 1000.0]),
    "decode_context_length": np.array([0.0, 100.0]),
    "decode_itl": np.array([[2.0, 4.0], [6.0, 12.0]]),
}


def test_dynamos_polynomials() -> None:
    clock = Clock(Polynomial(), 96 * 64)
    assert clock.prefill_ns(512) == 24_385_704
    assert clock.prefill_ns(0) == 0
    assert clock.decode_ns(1, 512, 1).tolist() == [10_062_083]
    # A fuller pool takes no longer than a full one; at that the polynomial gives 34.01.
    assert clock.decode_ns(2, 96 * 64 - 1, 3).tolist()[1:] == [34_010_000, 34_010_000]


@pytest.mark.parametrize(
    "timing", [Polynomial(), Fixed(3.0, 1.5), Linear((1e-6, 0.01, 1.0), (0.5, 0.001, 2.0)), Table(**AXES)]
)
def test_a_row_of_passes_is_its_passes(timing: Polynomial | Fixed | Linear | Table) -> None:
    clock = Clock(timing, 1000, speedup=1.3, decode_speedup=1.1)
    row = clock.decode_ns(3, 100, 20).tolist()
    assert row == [int(clock.decode_ns(3, 100 + 3 * at, 1)[0]) for at in range(20)]


@given(st.floats(0, 1e5), st.sampled_from([1.0, 2.0]))
def test_the_nearest_nanosecond(ms: float, speedup: float) -> None:
    """Of the seconds as they are in memory, without an error of multiplying; a tie is as good either way."""
    exact = Fraction(ms / 1e3) * 10**9
    got = Clock(Fixed(ms, ms), 1).prefill_ns(1)
    assert abs(got - exact) <= Fraction(1, 2)
    assert abs(Clock(Fixed(ms, ms), 1, speedup=speedup).prefill_ns(1) - got / speedup) <= 1


@pytest.mark.parametrize("timing", [Polynomial(), Fixed(3.0, 1.5)])
@pytest.mark.parametrize("capacity", [700, 5000, 2**21 + 5000])
def test_times_do_not_depend_on_what_is_kept(timing: Polynomial | Fixed, capacity: int) -> None:
    """On the pool's size, on what was asked for before, and beyond the pool."""
    clock = Clock(timing, capacity, speedup=1.3)
    for batch, length, passes in ((1, 1, 3), (7, 600, 40), (3, 4990, 9), (2, capacity - 5, 9), (5, 100, 2)):
        lengths = np.arange(length, length + batch * passes, batch)
        plain = timing.decode_ms(1, np.minimum(lengths, capacity), capacity)
        assert clock.decode_ns(batch, length, passes).tolist() == Clock._rounded(plain, 1.3).tolist()


def test_a_large_pool_costs_no_more_than_a_small_one() -> None:
    tracemalloc.start()
    clock = Clock(Polynomial(), 10**12)
    assert clock.decode_ns(4, 10**11, 5).shape == (5,)
    clock.decode_ns(4, 10**5, 5)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200e6


@pytest.mark.parametrize("ms", [-50.0, float("nan"), float("inf"), 1e308, "1"])
def test_times_that_can_not_be(ms: float) -> None:
    with pytest.raises(InvalidInput, match=r"prefill_each_ms must be a number of ms, 0 to 1e.07; got"):
        Fixed(ms, 1.0)
    with pytest.raises(InvalidInput, match=r"decode_each_ms must be a number of ms, 0 to 1e.07; got"):
        Fixed(1.0, ms)
    with pytest.raises(InvalidInput, match="least_decode_ms must be a number of ms"):
        Polynomial(least_decode_ms=ms)


def test_polynomials_that_can_not_be() -> None:
    with pytest.raises(InvalidInput, match="prefill must be 3 numbers, each 0 to"):
        Polynomial(prefill=(0.0, -1.0, 0.0))
    with pytest.raises(InvalidInput, match=r"decode must be 3 numbers, each -1e.07 to 1e.07"):
        Polynomial(decode=(0.0, float("nan"), 0.0))


def test_a_pass_without_end_is_refused() -> None:
    with pytest.raises(
        InvalidInput, match=r"timing: a pass must take at most 1e.07 ms; got 1000 ms, at a speedup of 1e-06"
    ):
        Clock(Fixed(1e3, 1.0), 100, speedup=1e-6).prefill_ns(1)
    with pytest.raises(InvalidInput, match="timing: a pass must take at most"):
        Clock(Linear((0.0, 0.0, 1.0), (0.0, 1e6, 1.0)), 10**6).decode_ns(1, 10**6, 1)


def test_a_table_has_straight_lines_between_its_points_and_beyond() -> None:
    table = Table(**AXES)
    assert [table.prefill_ms(tokens) for tokens in (0, 50, 150, 300, 500)] == [0.0, 5.0, 15.0, 40.0, 80.0]
    assert table.decode_ms(10, np.array([500]), 1).tolist() == [(3.0 + 9.0) / 2]
    assert table.decode_ms(1, np.array([2000]), 1)[0] > 12.0


def test_tables_that_can_not_be() -> None:
    with pytest.raises(InvalidInput, match="prefill_isl must be 2 or more ascending numbers"):
        Table(**AXES | {"prefill_isl": np.array([1.0, 1.0, 2.0])})
    with pytest.raises(InvalidInput, match="prefill_isl must be 2 or more ascending numbers"):
        Table(**AXES | {"prefill_isl": np.array([1.0, 2.0, np.inf])})
    with pytest.raises(InvalidInput, match=r"decode_itl must be finite numbers of shape \(2, 2\)"):
        Table(**AXES | {"decode_itl": np.ones((2, 3))})


def test_profiles_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "profile.npz", **AXES)  # type: ignore[arg-type]
    read = load_timing(tmp_path / "profile.npz")
    assert read.prefill_ms(150) == 15.0
    less = {name: values for name, values in AXES.items() if name != "decode_itl"}
    np.savez(tmp_path / "less.npz", **less)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="decode_itl"):
        load_timing(tmp_path / "less.npz")
    for name, data in (("x.npz", b"PK\x03\x04junk"), ("y.npz", b""), ("z.json", b'{"fit":' + b"[" * 100_000)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidInput, match=name):
            load_timing(tmp_path / name)
    with pytest.raises(InvalidInput, match=r"nothing\.json"):
        load_timing(tmp_path / "nothing.json")


@pytest.mark.parametrize("values", [(1.0, 2.0), (1.0, -1.0, 0.0), (1.0, float("nan"), 0.0)])
def test_fits_that_can_not_be(values: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"prefill must be 3 numbers, each 0 to 1e.07; got"):
        Linear(values, (0.0, 0.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="mixed_ms must be 0 or less"):
        Linear((0.0, 0.0, 1.0), (0.0, 0.0, 1.0), -3.0)
