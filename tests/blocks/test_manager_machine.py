"""Any moves, under each policy, beside a model and an index."""

from __future__ import annotations

import pytest
from hypothesis import settings

from kvist.blocks.policy import POLICIES
from kvist.testing.blocks import ManagerMachine, drive

_SHORT = settings(max_examples=20, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_any_moves(policy: str) -> None:
    machine = type("Machine", (ManagerMachine,), {"policy": policy}).TestCase
    machine.settings = _SHORT
    machine().runTest()


def test_a_while() -> None:
    for seed in range(40):
        drive(seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_at_length(seed: int) -> None:
    drive(1000 + seed, 2000)
