"""How long passes take, to the nanosecond."""

from __future__ import annotations

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


def test_a_table_has_straight_lines_between_its_points_and_beyond() -> None:
    table = Table(**AXES)
    assert [table.prefill_ms(tokens) for tokens in (0, 50, 150, 300, 500)] == [0.0, 5.0, 15.0, 40.0, 80.0]
    assert table.decode_ms(10, np.array([500]), 1).tolist() == [(3.0 + 9.0) / 2]
    assert table.decode_ms(1, np.array([2000]), 1)[0] > 12.0


def test_tables_that_can_not_be() -> None:
    with pytest.raises(InvalidInput, match="prefill_isl must be 2 or more ascending numbers"):
        Table(**AXES | {"prefill_isl": np.array([1.0, 1.0, 2.0])})
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
    with pytest.raises(InvalidInput, match=r"nothing\.json"):
        load_timing(tmp_path / "nothing.json")


@pytest.mark.parametrize("values", [(1.0, 2.0), (1.0, -1.0, 0.0), (1.0, float("nan"), 0.0)])
def test_fits_that_can_not_be(values: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match="prefill must be 3 numbers, each 0 or more"):
        Linear(values, (0.0, 0.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="mixed_ms must be 0 or less"):
        Linear((0.0, 0.0, 1.0), (0.0, 0.0, 1.0), -3.0)
