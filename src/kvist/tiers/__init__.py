"""Tiers below the device, and the links to them. Pure: bandwidth is a parameter, and so is time.

`links` is time and bytes, `pool` what lies in a tier, `descent` and `ascent` the way of bytes into one and out of it,
`admission` what is worth it, `offload` and `load` what goes down and up, and `engine` all of it for one worker.
"""

from __future__ import annotations

from kvist.tiers.config import TierConfig, TiersConfig
from kvist.tiers.engine import Tiers
from kvist.tiers.level import Level, TierStats
from kvist.tiers.links import Link, Network
from kvist.tiers.load import Load, LoadState
from kvist.tiers.pool import LowerPool

__all__ = [
    "Level",
    "Link",
    "Load",
    "LoadState",
    "LowerPool",
    "Network",
    "TierConfig",
    "TierStats",
    "Tiers",
    "TiersConfig",
]
