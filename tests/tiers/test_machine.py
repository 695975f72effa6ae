"""Random moves of two workers: no slot, byte or event is lost."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings

from kvist.blocks import Tier
from kvist.testing.tiers import TiersMachine, drive


class TestTiers(TiersMachine.TestCase):
    settings = settings(max_examples=30, stateful_step_count=50, deadline=None)


def test_a_while() -> None:
    counted: Counter[str] = Counter()
    for seed in range(40):
        stats = drive(seed, 150)[Tier.HOST]
        counted.update({field: getattr(stats, field) for field in stats.__struct_fields__})
    assert all(counted.values()), counted  # each thing that can happen did


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_at_length(seed: int) -> None:
    drive(1000 + seed, 2000)
