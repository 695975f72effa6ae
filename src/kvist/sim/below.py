"""What lies below a device in a replay, as the scheduler sees it: blocks that must be waited for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol

from kvist.blocks import BlockManager, Tier
from kvist.sim.pool import Contents
from kvist.tiers.config import TiersConfig
from kvist.tiers.engine import Tiers
from kvist.tiers.level import Level
from kvist.tiers.links import Network
from kvist.tiers.load import Load, LoadState


class Fetch(Enum):
    """What came of asking for blocks."""

    NOTHING = auto()
    """Nothing lies below that the device lacks: compute."""
    WAIT = auto()
    """The device has no room yet: ask again."""
    COMING = auto()
    """They are on their way; the request is in `Below.arrived` when they are there."""


class Below(Protocol):
    """Memory below one device. Times are nanoseconds."""

    def advance(self, now: int) -> None:
        """Let time pass."""

    def deadline(self) -> int | None:
        """When something next happens by itself."""

    def fetch(self, request: int, chain: Contents, now: int) -> Fetch:
        """Bring up what continues the device's part of a request's blocks."""

    def arrived(self) -> list[int]:
        """Requests whose blocks have come since this was last asked, in order."""


class TiersBelow:
    """kvist's tiers below a `BlockManager` whose blocks are contents.

    Args:
        manager: of the device.
        config: what they are.
        network: the clock, which workers that share a level share.
        shared: levels of other workers, too.
    """

    def __init__(
        self,
        manager: BlockManager,
        config: TiersConfig,
        network: Network | None = None,
        shared: Mapping[Tier, Level] | None = None,
    ) -> None:
        self.tiers = Tiers(manager, config, network=network, shared=shared)
        self._arrived: list[int] = []

    def advance(self, now: int) -> None:
        """See `Below`."""
        self.tiers.advance(now / 1e6)

    def deadline(self) -> int | None:
        """See `Below`; rounded up, so that what is due has happened then."""
        due = self.tiers.deadline()
        return None if due is None else math.ceil(due * 1e6) + 1

    def fetch(self, request: int, chain: Contents, now: int) -> Fetch:
        """See `Below`."""
        load = self.tiers.load(chain.tolist())
        if load.state is LoadState.BLOCKED:
            return Fetch.WAIT
        if load.state is not LoadState.RUNNING:
            return Fetch.NOTHING

        def come(_: Load) -> None:
            self._arrived.append(request)

        load.then(come)
        return Fetch.COMING

    def arrived(self) -> list[int]:
        """See `Below`."""
        arrived, self._arrived = self._arrived, []
        return arrived
