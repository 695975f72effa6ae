"""Blocks: decisions on which block lives where. Pure: knows no bytes, no store, no engine and no clock."""

from __future__ import annotations

from kvist.blocks.events import Cleared, Event, EventLog, Removed, Stored, Tier
from kvist.blocks.manager import BlockManager, Prefillable, PrefillCost
from kvist.blocks.moves import Deref, FullBlock, LineageEntry, Move, PartialBlock, Promote, UniqueBlock, Use
from kvist.blocks.pool import BlockPool
from kvist.blocks.resident import Evictions, Resident

__all__ = [
    "BlockManager",
    "BlockPool",
    "Cleared",
    "Deref",
    "Event",
    "EventLog",
    "Evictions",
    "FullBlock",
    "LineageEntry",
    "Move",
    "PartialBlock",
    "PrefillCost",
    "Prefillable",
    "Promote",
    "Removed",
    "Resident",
    "Stored",
    "Tier",
    "UniqueBlock",
    "Use",
]
