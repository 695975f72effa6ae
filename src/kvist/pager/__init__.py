"""Pager: moves pages between an engine's memory and a repository, through the `CachePager` contract."""

from __future__ import annotations

from kvist.pager.arena import Arena
from kvist.pager.base import CachePager, PageBytes
from kvist.pager.capture import Captured, capture
from kvist.pager.restore import Restored, restore
from kvist.pager.synthetic import SyntheticCachePager
from kvist.repo.manifest import LogicalSeq

__all__ = [
    "Arena",
    "CachePager",
    "Captured",
    "LogicalSeq",
    "PageBytes",
    "Restored",
    "SyntheticCachePager",
    "capture",
    "restore",
]
