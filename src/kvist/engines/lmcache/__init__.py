"""kvist under LMCache: a storage plugin that keeps its chunks in a repository, and serves cartridges as chunks.

`KvistStorage` is what an LMCache configuration names. Everything here can be imported without LMCache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvist.engines.lmcache.plugin import KvistStorage

__all__ = ["KvistStorage"]


def __getattr__(name: str) -> Any:
    """The class, once it is asked for: importing this package imports neither torch nor LMCache."""
    if name == "KvistStorage":
        from kvist.engines.lmcache.plugin import KvistStorage

        return KvistStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
