"""What the page knows of an engine: figures, and how to check a snapshot out. Must not know which engine it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvist.server.recent import Recent
from kvist.server.tiers import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSide:
    """An engine, as the page sees it.

    Attributes:
        name: of its model, for people.
        recent: its last requests.
        pool_blocks: pages that its pool has, each one block.
        block_bytes: bytes of each.
        tiers: what its pool and its cartridges hold now; may wait for a step of the engine.
        check_out: puts a snapshot into it; returns the tokens that can be had there, and how long it took, in seconds.
    """

    name: str
    recent: Recent
    pool_blocks: int
    block_bytes: int
    tiers: Callable[[], Iterable[Tier]]
    check_out: Callable[[str], tuple[int, float]]
