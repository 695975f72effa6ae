"""The index beside Dynamo's own RadixTree, fed with the same events."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored
from kvist.errors import NotFound
from kvist.hashing import local_block_hashes, sequence_hashes
from kvist.router.index import Index

PYTHON = os.environ.get("KVIST_DYNAMO_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="KVIST_DYNAMO_PYTHON names no interpreter with ai-dynamo")


class Both:
    """One stream of events, into both."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.index = Index()
        self.ask(do="reset")

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def apply(self, worker: int, rank: int, data: EventData) -> str | None:
        """Returns what Dynamo complains of."""
        told: Any = "cleared"
        if isinstance(data, Stored):
            blocks = [
                {"block_hash": name, "tokens_hash": local}
                for name, local in zip(data.hashes, data.local_hashes, strict=True)
            ]
            told = {"stored": {"parent_hash": data.parent, "blocks": blocks}}
        elif isinstance(data, Removed):
            told = {"removed": {"block_hashes": list(data.hashes)}}
        error = self.ask(do="apply", worker=worker, event={"event_id": 0, "data": told, "dp_rank": rank})
        try:
            self.index.apply(worker, Event(0, data, dp_rank=rank))
        except NotFound:
            assert error is not None
            assert "parent" in error
        else:
            assert error is None or not isinstance(data, Stored)
        return error

    def remove_worker(self, worker: int) -> None:
        self.ask(do="remove_worker", worker=worker)
        self.index.remove_worker(worker)

    def find(self, prompt: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        ours = sorted(
            [int(worker), rank, overlap.device] for (worker, rank), overlap in self.index.find(prompt).items()
        )
        return ours, self.ask(do="find", prompt=prompt)


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    assert PYTHON is not None
    with subprocess.Popen(
        [PYTHON, str(Path(__file__).with_name("dynamo_radix.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"DYN_LOG": "error"},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def paths(rng: random.Random) -> list[list[int]]:
    """Token blocks that share beginnings, as local hashes."""
    result = []
    for _ in range(12):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9)) for _ in range(4)]
        tokens = [tokens[i - i % 4] for i in range(len(tokens))]
        result.append(local_block_hashes(tokens, 4))
    return result


@pytest.mark.parametrize("seed", range(20))
def test_both_find_the_same(process: subprocess.Popen[str], seed: int) -> None:
    """Runs, evictions in any order, clears, lost workers. A block whose parent has gone is removed, too, before the
    parent comes back: see the next test."""
    rng = random.Random(seed)
    both = Both(process)
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


def test_a_block_that_comes_back_leads_to_those_that_stayed(process: subprocess.Popen[str]) -> None:
    """Dynamo forgets with a block all that follow it, though the worker has them; the index does not."""
    both = Both(process)
    both.apply(1, 0, Stored([1, 2, 3], None, [11, 12, 13]))
    both.apply(1, 0, Removed([2]))
    assert both.find([11, 12, 13]) == ([[1, 0, 1]], [[1, 0, 1]])
    both.apply(1, 0, Stored([2], 1, [12]))
    assert both.find([11, 12, 13]) == ([[1, 0, 3]], [[1, 0, 2]])


def test_a_block_with_two_names_stays_until_both_are_gone(process: subprocess.Popen[str]) -> None:
    """Equal tokens under two names, as of two cache salts. Dynamo takes the block away with the first."""
    both = Both(process)
    both.apply(1, 0, Stored([1], None, [11]))
    both.apply(1, 0, Stored([2], None, [11]))
    both.apply(1, 0, Removed([1]))
    assert both.find([11]) == ([[1, 0, 1]], [])
