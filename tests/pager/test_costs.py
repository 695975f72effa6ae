"""Load or compute: the estimates, what they withstand, and how they heal."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput
from kvist.pager.costs import ENOUGH, RETRY_EVERY, LoadCost

TOKEN_BYTES = 1000
SIZES = [32, 64, 512, 128, 1024, 256, 2048, 96]


def taught(
    *, per_token: float = 1e-3, per_byte: float = 1e-9, fixed: float = 0.01, rounds: int = 2, noise: float = 0.0
) -> LoadCost:
    cost = LoadCost()
    chance = random.Random(0)
    for tokens in SIZES * rounds:
        factor = 1 + noise * chance.uniform(-1, 1)
        cost.observe_compute(tokens, per_token * tokens * factor)
        cost.observe_load(tokens * TOKEN_BYTES, (fixed + per_byte * tokens * TOKEN_BYTES) * factor)
    return cost


def test_before_enough_is_known_it_explores() -> None:
    cost = LoadCost()
    assert cost.loads_faster(1, 10**12)
    for _ in range(ENOUGH):
        cost.observe_compute(1000, 0.001)
    assert all(cost.loads_faster(1, 10**12) for _ in range(100))
    for _ in range(ENOUGH):
        cost.observe_load(1000, 1.0)
    assert not cost.loads_faster(1000, 1000)


def test_nothing_to_compute_is_nothing_to_load() -> None:
    assert not LoadCost().loads_faster(0, 0)


def test_the_models_are_found() -> None:
    cost = taught()
    assert cost.compute_seconds(10_000) == pytest.approx(10)
    assert cost.load_seconds(10**9) == pytest.approx(1.01)
    assert cost.load_seconds(1) == pytest.approx(0.01)


def test_the_fixed_part_makes_short_loads_not_worth_it() -> None:
    cost = taught()  # equal at 0.01 / (1e-3 - 1e-6) tokens: just above 10
    assert not cost.loads_faster(8, 8 * TOKEN_BYTES)
    assert cost.loads_faster(16, 16 * TOKEN_BYTES)


def test_a_slow_store_is_refused() -> None:
    assert not taught(per_byte=1e-5).loads_faster(500, 500 * TOKEN_BYTES)


@pytest.mark.parametrize("at", [0, 3, 15])
def test_one_outlier_changes_nothing_much(at: int) -> None:
    cost = LoadCost()
    for i, tokens in enumerate(SIZES * 2):
        cost.observe_compute(tokens, 1e-3 * tokens + (30 if i == at else 0))
        cost.observe_load(tokens * TOKEN_BYTES, 0.01 + 1e-9 * tokens * TOKEN_BYTES + (30 if i == at else 0))
    assert cost.compute_seconds(1000) == pytest.approx(1, rel=0.05)
    assert cost.load_seconds(10**6) == pytest.approx(0.011, rel=0.05)


def test_noise_is_averaged() -> None:
    cost = taught(noise=0.3, rounds=3)
    assert cost.compute_seconds(1000) == pytest.approx(1, rel=0.3)
    assert cost.loads_faster(500, 500 * TOKEN_BYTES)


def test_one_size_is_taken_as_proportional() -> None:
    cost = LoadCost()
    for _ in range(ENOUGH):
        cost.observe_compute(100, 0.5)
    assert cost.compute_seconds(200) == pytest.approx(1)


def test_it_forgets_how_it_was() -> None:
    cost = taught(rounds=3)
    for tokens in SIZES * 2:
        cost.observe_load(tokens * TOKEN_BYTES, 1e-5 * tokens * TOKEN_BYTES)
    assert not cost.loads_faster(500, 500 * TOKEN_BYTES)


def test_refused_loads_are_tried_now_and_then() -> None:
    cost = taught(per_byte=1e-5)
    tried = [cost.loads_faster(500, 500 * TOKEN_BYTES) for _ in range(3 * RETRY_EVERY)]
    assert [i for i, yes in enumerate(tried, 1) if yes] == [RETRY_EVERY, 2 * RETRY_EVERY, 3 * RETRY_EVERY]


def test_a_bad_estimate_heals() -> None:
    """The store was slow and is fast again: only what is tried is measured, and that suffices."""
    cost = taught(per_byte=1e-5)
    tries = 0
    for asked in itertools.count(1):
        if cost.loads_faster(500, 500 * TOKEN_BYTES):
            tries += 1
            cost.observe_load(500 * TOKEN_BYTES, 0.0105)
        if cost.loads_faster(500, 500 * TOKEN_BYTES) and cost.loads_faster(500, 500 * TOKEN_BYTES):
            break
        assert asked < 40 * RETRY_EVERY
    assert tries <= 20


@pytest.mark.parametrize(("units", "seconds"), [(0, 1.0), (-1, 1.0), (1, -1.0), (1, float("nan")), (1, float("inf"))])
def test_impossible_observations_are_refused(units: int, seconds: float) -> None:
    cost = LoadCost()
    with pytest.raises(InvalidInput):
        cost.observe_compute(units, seconds)
    with pytest.raises(InvalidInput):
        cost.observe_load(units, seconds)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e6)), max_size=40))
def test_estimates_are_never_negative_and_grow_with_size(points: list[tuple[int, float]]) -> None:
    cost = LoadCost()
    for units, seconds in points:
        cost.observe_compute(units, seconds)
    small, large = cost.compute_seconds(1), cost.compute_seconds(10**6)
    if len(points) < ENOUGH:
        assert small is None
        return
    assert small is not None
    assert large is not None
    assert 0 <= small <= large
