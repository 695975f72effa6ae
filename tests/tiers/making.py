"""Small workers whose blocks take a millisecond on a link of 1 GB/s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvist.blocks import BlockManager, Deref, Event, EventLog, FullBlock, Stored, Tier, Use
from kvist.tiers import Level, Network, TierConfig, Tiers, TiersConfig

SLOW = {"down_gb_per_s": 1.0, "up_gb_per_s": 1.0}


def tier(capacity: int = 100, **fields: Any) -> TierConfig:
    return TierConfig(capacity=capacity, **{**SLOW, **fields})


class Worker:
    """A device of a few blocks, with tiers. Block ``n`` has local hash ``n + 1000`` and two tokens ``n``."""

    def __init__(
        self,
        capacity: int,
        host: TierConfig | None = None,
        *,
        network: Network | None = None,
        shared: dict[Tier, Level] | None = None,
        policy: str = "lineage",
        **fields: Any,
    ) -> None:
        self.events: list[Event] = []
        log = EventLog(self.events.append)
        self.manager = BlockManager(capacity, 2, policy, events=log)
        fields = {"free_low": 0.0, "free_high": 0.0, **fields}
        config = TiersConfig(block_bytes=1_000_000, host=host or tier(), **fields)
        self.tiers = Tiers(self.manager, config, network=network, shared=shared)

    def use(self, *blocks: int) -> int:
        """Refer to a chain from its root."""
        return self.manager.process(
            Use(
                [FullBlock(block) for block in blocks],
                local_hashes=[block + 1000 for block in blocks],
                token_ids=[[block] * 2 for block in blocks],
            )
        )

    def release(self, *blocks: int) -> None:
        """Give a chain back, its tail first."""
        self.manager.process(Deref([FullBlock(block) for block in reversed(blocks)]))

    def run(self, *blocks: int) -> None:
        """Use a chain for a moment."""
        assert self.use(*blocks) == len(blocks)
        self.release(*blocks)

    def drain(self) -> None:
        """Let everything that is under way end."""
        while (deadline := self.tiers.deadline()) is not None:
            self.tiers.advance(deadline)

    def told(self, tier: Tier | None = None) -> list[Any]:
        """What was told since the last call; of one tier, or of all."""
        events, self.events[:] = list(self.events), []
        return [event.data for event in events if tier in (None, event.tier)]

    def below(self, number: int = 0) -> set[int]:
        """What lies in a level."""
        return {block.sequence_hash for block in self.tiers.levels[number].pool}

    def check(self) -> None:
        self.manager.check_integrity()
        self.tiers.check_integrity()


def hashes(blocks: Sequence[int]) -> list[int]:
    return [block + 1000 for block in blocks]


def tokens(blocks: Sequence[int]) -> list[list[int]]:
    return [[block] * 2 for block in blocks]


def stored(blocks: list[int], parent: int | None) -> Stored:
    return Stored(blocks, parent, hashes(blocks), tokens(blocks))
