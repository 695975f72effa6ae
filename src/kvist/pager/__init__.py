"""Pager: moves pages between an engine's memory and a repository, through the `CachePager` contract."""

from __future__ import annotations

from kvist.pager.base import CachePager, PageBytes
from kvist.repo.manifest import LogicalSeq

__all__ = ["CachePager", "LogicalSeq", "PageBytes"]
