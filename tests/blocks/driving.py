"""A pool of single keys, driven by a list of requests."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.blocks.policy import Policy


def misses(policy: Policy[int], capacity: int, requests: Sequence[int]) -> list[bool]:
    """Which of these requests found their key missing; each that did inserted it, after an eviction if it was full."""
    missed = []
    for key in requests:
        missed.append(key not in policy)
        if key in policy:
            policy.touch([key])
            continue
        policy.expect([key])
        if len(policy) == capacity:
            policy.evict(1)
        policy.insert([key])
    return missed
