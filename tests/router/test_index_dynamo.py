"""The index beside Dynamo's own RadixTree, fed with the same events."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored
from kvist.errors import NotFound
from kvist.hashing import local_block_hashes, sequence_hashes
from kvist.router.index import Index
from kvist.router.wire.dynamo import encode_event

from .dynamo_child import Dynamo


class Both:
    """One stream of events, into both."""

    def __init__(self, dynamo: Dynamo) -> None:
        self.dynamo = dynamo
        self.index = Index()
        dynamo("tree_reset")

    def apply(self, worker: int, rank: int, data: EventData) -> None:
        event = Event(0, data, dp_rank=rank)
        errors = self.dynamo("tree_apply", worker, [encode_event(event).decode()])
        try:
            self.index.apply(worker, event)
        except NotFound:
            assert "parent" in errors[0]
        else:
            assert not errors or not isinstance(data, Stored)

    def remove_worker(self, worker: int) -> None:
        self.dynamo("tree_remove_worker", worker)
        self.index.remove_worker(worker)

    def find(self, prompt: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        ours = sorted(
            [int(worker), rank, overlap.device] for (worker, rank), overlap in self.index.find(prompt).items()
        )
        return ours, sorted(self.dynamo("tree_find", [prompt])[0])


@pytest.fixture(scope="module")
def dynamo() -> Iterator[Dynamo]:
    with Dynamo() as dynamo:
        yield dynamo


def paths(rng: random.Random) -> list[list[int]]:
    """Token blocks that share beginnings, as local hashes."""
    result = []
    for _ in range(12):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9)) for _ in range(4)]
        tokens = [tokens[i - i % 4] for i in range(len(tokens))]
        result.append(local_block_hashes(tokens, 4))
    return result


@pytest.mark.parametrize("seed", range(20))
def test_both_find_the_same(dynamo: Dynamo, seed: int) -> None:
    """Runs, evictions in any order, clears, lost workers. A block whose parent has gone is removed, too, before the
    parent comes back: see the next test."""
    rng = random.Random(seed)
    both = Both(dynamo)
    prompts = paths(rng)
    workers = [(1, 0), (1, 1), (2, 0), (3, 7)]
    held: dict[tuple[int, int], dict[int, int | None]] = {pool: {} for pool in workers}  # name to parent
    found = 0
    for _ in range(150):
        pool = rng.choice(workers)
        worker = pool[0]
        mine = held[pool]
        action = rng.random()
        if action < 0.55:
            path = rng.choice(prompts)
            names = sequence_hashes(path)
            start = rng.randrange(len(path))
            parent = names[start - 1] if start else None
            upto = rng.randrange(start + 1, len(path) + 1)
            orphans = {name for name, above in mine.items() if above is not None and above not in mine}
            if orphans:
                both.apply(*pool, Removed(sorted(below(mine, orphans))))
                for name in below(mine, orphans):
                    del mine[name]
            both.apply(*pool, Stored(names[start:upto], parent, path[start:upto]))
            if parent is None or parent in mine:
                mine |= dict(zip(names[start:upto], [parent, *names[start:]], strict=False))
        elif action < 0.95 and mine:
            order = list(mine)
            rng.shuffle(order)
            for name in order[: rng.randrange(1, 4)]:
                both.apply(*pool, Removed([name]))
                del mine[name]
        elif action < 0.97:
            both.apply(*pool, Cleared())
            mine.clear()
        elif action > 0.99 and any(known == worker for known, _ in both.index.pools):
            both.remove_worker(worker)
            for other in workers:
                if other[0] == worker:
                    held[other].clear()
        prompt = rng.choice(prompts)
        ours, theirs = both.find(prompt)
        assert ours == theirs
        found += len(ours)
    assert found


def below(held: dict[int, int | None], names: set[int]) -> set[int]:
    """These blocks and all that follow them."""
    result = set(names)
    while more := {name for name, above in held.items() if above in result} - result:
        result |= more
    return result


def test_a_block_that_comes_back_leads_to_those_that_stayed(dynamo: Dynamo) -> None:
    """Dynamo forgets with a block all that follow it, though the worker has them; the index does not."""
    both = Both(dynamo)
    both.apply(1, 0, Stored([1, 2, 3], None, [11, 12, 13]))
    both.apply(1, 0, Removed([2]))
    assert both.find([11, 12, 13]) == ([[1, 0, 1]], [[1, 0, 1]])
    both.apply(1, 0, Stored([2], 1, [12]))
    assert both.find([11, 12, 13]) == ([[1, 0, 3]], [[1, 0, 2]])


def test_a_block_with_two_names_stays_until_both_are_gone(dynamo: Dynamo) -> None:
    """Equal tokens under two names, as of two cache salts. Dynamo takes the block away with the first."""
    both = Both(dynamo)
    both.apply(1, 0, Stored([1], None, [11]))
    both.apply(1, 0, Stored([2], None, [11]))
    both.apply(1, 0, Removed([1]))
    assert both.find([11]) == ([[1, 0, 1]], [])
