"""Policies: in which order the blocks of a pool are evicted. One file each.

`base` is the contract, `checked` what all have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvist.blocks.policy.arc import Arc
from kvist.blocks.policy.base import K, Policy
from kvist.blocks.policy.belady import Belady
from kvist.blocks.policy.fifo import Fifo
from kvist.blocks.policy.lfu import Lfu
from kvist.blocks.policy.lineage import Lineage
from kvist.blocks.policy.lru import Lru
from kvist.blocks.policy.multi_lru import MultiLru
from kvist.blocks.policy.s3fifo import S3Fifo
from kvist.blocks.policy.sieve import Sieve
from kvist.errors import InvalidInput

__all__ = [
    "POLICIES",
    "Arc",
    "Belady",
    "Fifo",
    "Lfu",
    "Lineage",
    "Lru",
    "MultiLru",
    "Policy",
    "S3Fifo",
    "Sieve",
    "make_policy",
]

POLICIES: Mapping[str, Callable[[int, Mapping[Any, Any]], Policy[Any]]] = {
    "arc": lambda capacity, parents: Arc(capacity),
    "fifo": lambda capacity, parents: Fifo(),
    "lfu": lambda capacity, parents: Lfu(),
    "lineage": lambda capacity, parents: Lineage(parents),
    "lru": lambda capacity, parents: Lru(),
    "multi_lru": lambda capacity, parents: MultiLru(capacity),
    "s3fifo": lambda capacity, parents: S3Fifo(capacity),
    "sieve": lambda capacity, parents: Sieve(),
}
"""The policies for which a name is enough (`Belady` needs the future, too): from the pool's capacity in blocks and the
parents of its keys to an empty policy."""


def make_policy(name: str, *, capacity: int, parents: Mapping[K, K | None]) -> Policy[K]:
    """The empty policy of this name.

    Args:
        name: one of `POLICIES`.
        capacity: how many blocks the pool holds, 1 or more. Policies that keep no balance ignore it.
        parents: the parent of each key, as `Lineage` reads it. Policies that know no lineage ignore it.

    Raises:
        InvalidInput: there is no policy of this name, or ``capacity`` is not positive.
    """
    if name not in POLICIES:
        raise InvalidInput(f"policy must be one of {', '.join(POLICIES)}, not {name!r:.80}")
    if capacity < 1:
        raise InvalidInput(f"capacity must be 1 block or more, not {capacity}")
    return POLICIES[name](capacity, parents)
