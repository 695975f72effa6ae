"""Hit ratio against capacity: what a trace's prompts find in a cache of each size, under each policy.

Cache only, no time: requests come one after the other, in the order of the trace. Each asks for the full blocks of its
prompt. Those that are there and lead the chain are its hits. All that are there are pinned, the missing ones are
inserted, for which others are evicted, and then all are released: the calls that `kvist.blocks.BlockManager` makes on
its policy for one `Use` and one `Deref`, on the same policy objects. A chain that is longer than the capacity
keeps as much of its head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvist.blocks.policy import POLICIES, Belady, Policy, make_policy
from kvist.errors import InvalidInput
from kvist.sim.chains import Chains, chains
from kvist.sim.processes import Progress, told, workers
from kvist.sim.stack import lru_hits, most_hits
from kvist.sim.trace import Trace

CEILING: Final = "ceiling"
"""Name of the curve that no policy can be above: see `kvist.sim.stack.most_hits`."""

BELADY: Final = "belady"
"""The policy that knows the trace. Not among the defaults: what it reaches lies between them and the ceiling."""

_AS_LRU: Final = frozenset({"lru", "lineage"})
"""Policies that one pass finds the hits of. Where whole chains are used, one after the other, every block was used
later than all blocks behind it: the oldest of all is a leaf, and `lineage` evicts what `lru` evicts."""

_LITTLE: Final = 2_000_000
"""Uses of blocks that are replayed sooner than processes for them start."""

_LEAST_PART: Final = 1000
"""The smallest default capacity is this part of the largest."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Hits by capacity.

    Attributes:
        name: of the trace.
        block_size: tokens of a block.
        requests, prompt_tokens: of the trace.
        blocks, unique_blocks: full blocks in all prompts; how many differ. A cache of as many has all hits there are.
        capacities: in blocks, ascending.
        hits: blocks that were hits, at each capacity, by policy; the ceiling is the last.
    """

    name: str
    block_size: int
    requests: int
    prompt_tokens: int
    blocks: int
    unique_blocks: int
    capacities: tuple[int, ...]
    hits: dict[str, tuple[int, ...]]

    def ratios(self, policy: str) -> list[float]:
        """Of all prompt tokens, the part in blocks that were hits, at each capacity; 0 without a request."""
        return [hits * self.block_size / max(1, self.prompt_tokens) for hits in self.hits[policy]]

    def to_json(self) -> dict[str, Any]:
        """For JSON: everything, by policy."""
        return {
            "trace": self.name,
            "block_size": self.block_size,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "blocks": self.blocks,
            "unique_blocks": self.unique_blocks,
            "capacities": list(self.capacities),
            "curves": {
                policy: {"hit_blocks": list(hits), "hit_ratio": self.ratios(policy)}
                for policy, hits in self.hits.items()
            },
        }


def default_capacities(unique_blocks: int, points: int) -> list[int]:
    """So many capacities, each the same factor larger; the last holds all blocks, the first a thousandth of them.

    Fewer where there are not as many blocks.
    """
    if points < 1:
        raise InvalidInput(f"points must be 1 or more; got {points}")
    most = max(1, unique_blocks)
    spaced = np.geomspace(most, max(1.0, most / _LEAST_PART), points)
    return sorted({round(capacity) for capacity in spaced.tolist()})


def curves(
    trace: Trace,
    *,
    policies: Sequence[str] = tuple(POLICIES),
    capacities: Iterable[int] | None = None,
    points: int = 12,
    block_size: int | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Curves:
    """Hits of each policy at each capacity, and the ceiling.

    Args:
        trace: the requests; their times do not matter.
        policies: of `kvist.blocks.policy.POLICIES`, or `BELADY`; all different.
        capacities: in blocks. ``None``: `default_capacities`.
        points: how many of these.
        block_size: tokens of a block. ``None``: the trace's.
        jobs: processes of this machine, where there is enough to do for them; 1: this one. The result is the same.
        progress: told how many replays are done.

    Raises:
        InvalidInput: one of these cannot be right.
        EngineError: a process ended by itself.
    """
    known = (*POLICIES, BELADY)
    for policy in policies:
        if policy not in known:
            raise InvalidInput(f"policy must be one of {', '.join(known)}, not {policy!r:.80}")
    if len(set(policies)) < len(policies):
        raise InvalidInput(f"policies must all be different; got {', '.join(policies)}")
    if jobs < 1:
        raise InvalidInput(f"jobs must be 1 or more; got {jobs}")
    found = chains(trace, trace.block_size if block_size is None else block_size)
    sizes = sorted(set(default_capacities(found.count, points) if capacities is None else capacities))
    if not sizes or sizes[0] < 1:
        raise InvalidInput(f"capacities must be 1 block or more; got {sizes[0] if sizes else 'none'}")
    by_lru = tuple(lru_hits(found, sizes))
    hits: dict[str, tuple[int, ...]] = {policy: by_lru for policy in policies if policy in _AS_LRU}
    replayed = [policy for policy in (*policies, CEILING) if policy not in _AS_LRU]
    # whatever the policy, a cache that never evicts has the same hits
    small = [size for size in sizes if size < found.count]
    everything = [len(found.ids) - found.count] * (len(sizes) - len(small))
    tasks = list(itertools.product(replayed, small))
    counts = iter(_run(found, tasks, jobs, progress))
    for policy in replayed:
        hits[policy] = (*itertools.islice(counts, len(small)), *everything)
    for policy in policies:
        assert all(map(int.__le__, hits[policy], hits[CEILING])), f"{policy} has more hits than there can be"
    return Curves(
        name=trace.name,
        block_size=trace.block_size if block_size is None else block_size,
        requests=len(trace),
        prompt_tokens=int(trace.input_tokens.sum()),
        blocks=len(found.ids),
        unique_blocks=found.count,
        capacities=tuple(sizes),
        hits={policy: hits[policy] for policy in (*policies, CEILING)},
    )


class Requests:
    """The chains of a trace, as policies take them: lists of keys that are the same objects wherever they are equal."""

    def __init__(self, found: Chains) -> None:
        self.chains = found
        keys = list(range(found.count))
        flat = [keys[content] for content in found.ids.tolist()]
        ends = found.offsets.tolist()
        self._lists = [flat[start:end] for start, end in itertools.pairwise(ends)]
        self._parents: dict[int, int | None] = {}
        for chain in self._lists:
            self._parents.update(zip(chain, (None, *chain), strict=False))

    def hits(self, name: str, capacity: int) -> int:
        """Blocks that are hits under a policy, or `CEILING`."""
        if name == CEILING:
            return most_hits(self.chains, capacity)
        policy: Policy[int]
        if name == BELADY:
            policy = Belady([key for chain in self._lists for key in chain[:capacity]])
        else:
            policy = make_policy(name, capacity=capacity, parents=self._parents)
        return sum(policy.serve(chain, capacity) for chain in self._lists)


# -- processes ---------------------------------------------------------------------------------------------------


def _run(found: Chains, tasks: Sequence[tuple[str, int]], jobs: int, progress: Progress | None) -> list[int]:
    if jobs == 1 or len(tasks) * len(found.ids) < _LITTLE:
        requests = Requests(found)
        return told((requests.hits(*task) for task in tasks), len(tasks), progress)
    with workers(jobs, _keep, (found,), progress) as do:
        return do(_hits_of_kept, tasks)


_kept: Requests


def _keep(found: Chains) -> None:
    """In a process of the pool: the chains come once, not with every task."""
    global _kept
    _kept = Requests(found)


def _hits_of_kept(task: tuple[str, int]) -> int:
    return _kept.hits(*task)
