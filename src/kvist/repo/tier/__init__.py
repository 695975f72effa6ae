"""Page tiers: copies of pages nearer than the store. A tier is not believed: every page is checked by its digest."""

from __future__ import annotations

from kvist.repo.tier.base import PageTier, TierStats
from kvist.repo.tier.stack import Tiers
from kvist.repo.tier.url import open_tier

__all__ = ["PageTier", "TierStats", "Tiers", "open_tier"]
