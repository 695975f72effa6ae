"""Configurations that cannot be right name their field."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from kvist.errors import InvalidInput
from kvist.tiers import TierConfig, TiersConfig


def test_defaults() -> None:
    config = TiersConfig(block_bytes=1)
    assert (config.mode, config.admission, config.batch_blocks) == ("watermark", "always", 32)
    assert (config.host.capacity, config.host.down_gb_per_s, config.host.up_gb_per_s) == (100_000, 14.0, 14.0)
    assert config.disk is None and config.external is None


def test_zero_bytes_and_no_limit_are_sizes() -> None:
    assert TiersConfig(block_bytes=0, host=TierConfig(down_gb_per_s=math.inf)).block_bytes == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity", 0),
        ("capacity", 1.5),
        ("capacity", "x"),
        ("capacity", True),
        ("down_gb_per_s", "fast"),
        ("latency_ms", None),
        ("policy", ["lru"]),
        ("down_gb_per_s", 0.0),
        ("down_gb_per_s", math.nan),
        ("up_gb_per_s", -1.0),
        ("latency_ms", -1.0),
        ("latency_ms", math.inf),
        ("policy", "newest"),
    ],
)
def test_a_tier(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"TierConfig\.{field} must be .*{re.escape(repr(value))}"):
        TierConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_bytes", -1),
        ("block_bytes", 1.5),
        ("host", None),
        ("disk", 7),
        ("mode", []),
        ("admission_count", "2"),
        ("batch_blocks", 1.0),
        ("free_low", "0"),
        ("free_high", None),
        ("external", TierConfig()),
        ("mode", "eager"),
        ("admission", "never"),
        ("admission_count", 0),
        ("admission_count", 16),
        ("batch_blocks", 0),
        ("transfers", 0),
        ("queue_blocks", 0),
        ("spill_blocks", 0),
        ("free_low", -0.1),
        ("free_low", math.nan),
        ("free_high", 0.001),
        ("free_high", 1.5),
    ],
)
def test_tiers(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"TiersConfig\.{field} must be "):
        TiersConfig(**{"block_bytes": 1, field: value})
