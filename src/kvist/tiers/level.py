"""`Level`: one tier below the device as its workers see it; and `TierStats`, what one worker counts there."""

from __future__ import annotations

from msgspec import Struct

from kvist.blocks.events import Tier
from kvist.tiers.config import TierConfig
from kvist.tiers.links import Link, Network
from kvist.tiers.pool import LowerPool


class Level(Struct, frozen=True):
    """A tier below the device, and its links. Workers that share a level share its room and its bandwidth.

    Attributes:
        pool: what lies there.
        down: the link into it, from the tier above.
        up: the link out of it, to the tier above.
    """

    pool: LowerPool
    down: Link
    up: Link

    @classmethod
    def make(cls, network: Network, tier: Tier, config: TierConfig) -> Level:
        """An empty one with links of its own."""
        return cls(
            LowerPool(tier, config.capacity, config.policy),
            network.link(config.down_gb_per_s, latency_ms=config.latency_ms),
            network.link(config.up_gb_per_s, latency_ms=config.latency_ms),
        )


class TierStats(Struct):
    """What one worker did in one tier so far. Blocks, unless it says bytes.

    Attributes:
        hits: found here and sent up.
        stored: arrived, and told to routers.
        evicted: went to make room for this worker's.
        bytes_in: sent down into it.
        bytes_out: sent up out of it.
        present: not copied, because it was here.
        refused: not copied, because admission did not find it worth it.
        too_busy: not copied, because the link was the bottleneck.
        no_room: not copied, because all that is here is read or arriving, or it would come after itself.
        orphaned: copied, and lost, because the block before it was nowhere any more.
    """

    hits: int = 0
    stored: int = 0
    evicted: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    present: int = 0
    refused: int = 0
    too_busy: int = 0
    no_room: int = 0
    orphaned: int = 0
