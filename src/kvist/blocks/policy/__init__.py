"""Policies: in which order the blocks of a pool are evicted. One file each."""

from __future__ import annotations

from kvist.blocks.policy.base import Policy
from kvist.blocks.policy.lru import Lru

__all__ = ["Lru", "Policy"]
