"""The router's index beside Dynamo's RadixTree: events applied and prompts found per second, on one generated stream.

    python bench/index.py [--reps 3] [--json FILE]

Needs KVIST_DYNAMO_PYTHON, an interpreter with ai-dynamo; without it only kvist is measured. Each contestant runs in a
process of its own, they take turns, and the medians are shown. What each is given is made ready before the clock
starts. JSON bytes are Dynamo's only way in from Python, and rows "of JSON" time for both what reads them and what
applies the event. Two more ways into kvist have no counterpart: events that are values already, and vLLM's messages,
where the hashing of the tokens is timed, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BLOCKS = 16  # of an event
TOKENS = 16  # of a block, in vLLM's messages
LONG = 16_000  # blocks: a prompt of 256k tokens
Step = tuple[int, list[int], int | None]  # a worker, blocks, and for stored ones the parent: -1 says they are removed
MASK = 0x9E3779B97F4A7C15  # a block's local hash is its hash XOR this


def chains(count: int, depth: int, shared: int, rng: random.Random) -> list[list[int]]:
    """Paths, each a tenth of which begin with the same ``shared`` blocks."""
    heads = [[rng.getrandbits(64) for _ in range(shared)] for _ in range(10)]
    return [heads[i % 10] + [rng.getrandbits(64) for _ in range(depth - shared)] for i in range(count)]


def stores(worker: int, chain: list[int], told: int = 0) -> Iterator[Step]:
    """As an engine tells of it, which has told of the first ``told`` blocks before."""
    for start in range(told, len(chain), BLOCKS):
        yield worker, chain[start : start + BLOCKS], chain[start - 1] if start else None


def all_stores(worker: int, paths: list[list[int]], shared: int) -> Iterator[Step]:
    heads: set[int] = set()
    for path in paths:
        yield from stores(worker, path, shared if path[0] in heads else 0)
        heads.add(path[0])


def churn(workers: int, rng: random.Random) -> Iterator[Step]:
    """Caches that are full: each chain that comes makes another go, its own blocks first, the tail before the root."""
    kept: list[list[list[int]]] = [[] for _ in range(workers)]
    heads: list[set[int]] = [set() for _ in range(workers)]
    for chain in chains(2000, 128, 32, rng):
        worker = rng.randrange(workers)
        if len(kept[worker]) == 40:
            gone = kept[worker].pop(0)[32:][::-1]
            yield worker, gone[: len(gone) // 2], -1
            yield worker, gone[len(gone) // 2 :], -1
        kept[worker].append(chain)
        yield from stores(worker, chain, 32 if chain[0] in heads[worker] else 0)
        heads[worker].add(chain[0])


class Values:
    """kvist, from events."""

    def __init__(self) -> None:
        from kvist.blocks.events import Event, Removed, Stored
        from kvist.router.index import Index

        self.event, self.removed, self.stored, self.make = Event, Removed, Stored, Index

    def ready(self, step: Step) -> Any:
        _, blocks, parent = step
        if parent == -1:
            return self.event(0, self.removed(blocks))
        return self.event(0, self.stored(blocks, parent, [block ^ MASK for block in blocks]))

    def index(self) -> Any:
        return self.make()

    def apply(self, index: Any) -> Callable[[int, Any], None]:
        return index.apply

    def find(self, index: Any) -> Callable[[list[int]], Any]:
        return index.find


class Json(Values):
    """kvist, from the bytes that Dynamo gets."""

    def ready(self, step: Step) -> Any:
        return as_json(step)

    def apply(self, index: Any) -> Callable[[int, Any], None]:
        from kvist.router.wire.dynamo import decode_event

        return lambda worker, told: index.apply(worker, decode_event(told))


class Messages(Values):
    """kvist, from vLLM's messages of one event each."""

    def ready(self, step: Step) -> Any:
        from kvist.router.wire import Batch, BlockEvent, vllm

        _, blocks, parent = step
        stored = self.stored(blocks, parent, token_ids=[[block & 0xFFFF] * TOKENS for block in blocks])
        return vllm.encode(Batch(0.0, [BlockEvent(stored, block_size=TOKENS)]))

    def apply(self, index: Any) -> Callable[[int, Any], None]:
        from kvist.router.wire import to_event, vllm

        def apply(worker: int, message: bytes) -> None:
            for told in vllm.decode(message).events:
                index.apply(worker, to_event(told, 0))

        return apply


class Dynamo:
    """Its RadixTree."""

    def __init__(self) -> None:
        from dynamo._core import RadixTree

        self.make = RadixTree

    def ready(self, step: Step) -> Any:
        return as_json(step)

    def index(self) -> Any:
        return self.make()

    def apply(self, index: Any) -> Callable[[int, Any], None]:
        return index.apply_event

    def find(self, index: Any) -> Callable[[list[int]], Any]:
        return lambda prompt: index.find_matches(prompt).scores


Contestant = Values | Dynamo


def as_json(step: Step) -> bytes:
    _, blocks, parent = step
    if parent == -1:
        data: Any = {"removed": {"block_hashes": blocks}}
    else:
        told = [{"block_hash": block, "tokens_hash": block ^ MASK} for block in blocks]
        data = {"stored": {"parent_hash": parent, "blocks": told}}
    return json.dumps({"event_id": 0, "data": data, "dp_rank": 0}).encode()


def applied(contestant: Contestant, steps: list[Step], before: list[Step] | None = None) -> tuple[float, Any]:
    """Events per second, and the index that they made; those that come ``before`` are not timed."""
    ready = [(step[0], contestant.ready(step)) for step in steps]
    index = contestant.index()
    apply = contestant.apply(index)
    for step in before or ():
        apply(step[0], contestant.ready(step))
    gc.collect()
    gc.freeze()  # what was made ready is the harness's, and would not be there
    started = time.perf_counter()
    for worker, event in ready:
        apply(worker, event)
    return len(ready) / (time.perf_counter() - started), index


def found(contestant: Contestant, index: Any, prompts: list[list[int]]) -> float:
    """Prompts per second."""
    find = contestant.find(index)
    rounds = max(1, 200_000 // sum(map(len, prompts)))
    started = time.perf_counter()
    for _ in range(rounds):
        for prompt in prompts:
            find(prompt)
    return rounds * len(prompts) / (time.perf_counter() - started)


def measure(contestants: dict[str, Contestant]) -> dict[str, float]:
    """All figures; finds are those of the last contestant, since an index is the same however it was told."""
    result = {}
    contestant = list(contestants.values())[-1]
    for workers in (1, 8, 64):
        rng = random.Random(workers)
        paths = chains(2000 // workers, 256, 64, rng)
        steps = [step for worker in range(workers) for step in all_stores(worker, paths, 64)]
        for way, each in contestants.items():
            result[f"events/s {way}, {workers} workers"], index = applied(each, steps)
        for depth in (16, 256):
            prompts = [[block ^ MASK for block in path[:depth]] for path in paths[:100]]
            result[f"finds/s of {depth}, {workers} workers"] = found(contestant, index, prompts)
    rng = random.Random(0)
    paths = chains(50, 4096, 64, rng)
    _, index = applied(contestant, [step for worker in range(8) for step in all_stores(worker, paths, 64)])
    result["finds/s of 4096, 8 workers"] = found(contestant, index, [[b ^ MASK for b in path] for path in paths])
    full = {way: each for way, each in contestants.items() if not isinstance(each, Messages)}
    for way, each in full.items():
        result[f"events/s {way}, full caches, 8 workers"], index = applied(each, list(churn(8, random.Random(1))))
    prompts = [[block ^ MASK for block in path] for path in chains(2000, 128, 32, random.Random(1))[-300:]]
    result["finds/s of 128, full caches"] = found(contestant, index, prompts)
    (long,) = chains(1, LONG, 0, random.Random(2))
    removals: list[Step] = [(0, [block], -1) for block in long]
    for way, each in full.items():
        if isinstance(each, Dynamo):
            continue  # its tree forgets all with the head, and refuses the other removals
        what = f"removals/s {way}, head first, {LONG} blocks told at once"
        result[what], _ = applied(each, removals, [(0, long, None)])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contestant", choices=["kvist", "dynamo"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestants: dict[str, Contestant] = {}
        if arguments.contestant == "dynamo":
            contestants["of JSON"] = Dynamo()
        else:
            contestants = {"of vLLM's messages": Messages(), "of JSON": Json(), "of values": Values()}
        print(json.dumps(measure(contestants)))
        return
    pythons = {"kvist": sys.executable}
    if "KVIST_DYNAMO_PYTHON" in os.environ:
        pythons["dynamo"] = os.environ["KVIST_DYNAMO_PYTHON"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for _ in range(arguments.reps):
        for name, python in pythons.items():
            command = [python, __file__, "--contestant", name]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"DYN_LOG": "error"})
            runs[name].append(json.loads(child.stdout))
    medians = {
        name: {what: statistics.median(run[what] for run in measured) for what in measured[0]}
        for name, measured in runs.items()
    }
    show(medians)
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=2))


def show(medians: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = (
        f"Events of {BLOCKS} blocks. Of JSON: both read and apply the same bytes. Of vLLM's messages: read, hash blocks"
        f" of {TOKENS} tokens, apply. Of values: apply alone. Finds: lists of integers in, Python values out."
    )
    table = Table("", *medians, "kvist / dynamo", caption=caption)
    for what, ours in medians["kvist"].items():
        figures = [f"{measured[what]:,.0f}" if what in measured else "" for measured in medians.values()]
        theirs = medians.get("dynamo", {}).get(what)
        table.add_row(what, *figures, f"{ours / theirs:.2f}" if theirs else "")
    Console().print(table)


if __name__ == "__main__":
    main()
