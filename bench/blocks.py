"""Decisions of a block pool: kvist's manager beside vLLM's, on the same stream of requests, in one run.

    $KVIST_VLLM_PYTHON bench/blocks.py [--requests 1500] [--blocks 8192] [--running 24] [--rounds 7] [--json F]

Runs on the interpreter of an environment that has vLLM and kvist. The stream: sessions whose turns repeat all that was
said before, behind shared system prompts; each request takes its blocks, and gives them back when ``--running`` later
ones have come. Both see the same block hashes, in the same order, with as many blocks, and no events.

What each is charged with, once for each request: vLLM for `KVCacheManager.get_computed_blocks`, `allocate_slots` for
the whole prompt, and `free`; kvist for `BlockManager.process` of a Use and of a Deref. Requests, block hashes and moves
are made before the clock runs. vLLM recomputes the last block of a prompt that is cached wholly, so prompts end with a
block of their own. The contestants take turns within a round; figures are medians.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from kvist.blocks import BlockManager, Deref, FullBlock, Use

HERE = Path(__file__).resolve().parent
BLOCK_SIZE = 16
Stream = list[list[int]]
"""The sequence hashes of each request's blocks, the root first."""


def stream(requests: int, seed: int) -> Stream:
    """Turns of sessions: a shared system prompt, then what was said before, then 2 to 24 new blocks."""
    rng = random.Random(seed)
    names = iter(lambda: rng.getrandbits(64), None)
    prompts = [[next(names) for _ in range(rng.randint(8, 64))] for _ in range(8)]
    sessions: list[list[int]] = []
    made: Stream = []
    for _ in range(requests):
        if not sessions or rng.random() < 0.15:
            sessions.append(list(rng.choice(prompts)))
            if len(sessions) > 64:
                sessions.pop(rng.randrange(len(sessions)))
        said = rng.choice(sessions)
        said += [next(names) for _ in range(rng.randint(2, 24))]
        made.append(list(said))
        if len(said) > 512:
            sessions.remove(said)
    return made


Contestant = Callable[[Stream, int, int], float]
"""From a stream, a number of blocks and a number of running requests to seconds."""


def turns(count: int, running: int) -> Iterator[tuple[int, int | None]]:
    """Which request comes, and which is done before it."""
    waiting: deque[int] = deque()
    for index in range(count):
        yield index, waiting.popleft() if len(waiting) >= running else None
        waiting.append(index)


def kvist(policy: str) -> Contestant:
    def run(requests: Stream, blocks: int, running: int) -> float:
        manager = BlockManager(blocks, BLOCK_SIZE, policy)
        uses = [Use([FullBlock(name) for name in names]) for names in requests]
        derefs = [Deref(use.blocks[::-1]) for use in uses]
        order = list(turns(len(requests), running))
        process = manager.process
        gc.collect()
        started = time.thread_time()
        for index, done in order:
            if done is not None:
                process(derefs[done])
            if process(uses[index]) != len(requests[index]):
                raise RuntimeError("the pool is too small for the running requests")
        seconds = time.thread_time() - started
        manager.check_integrity()
        return seconds

    return run


def vllm() -> Contestant:
    sys.path[:] = [path for path in sys.path if Path(path) != HERE]  # where vllm.py is another of these programs
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)

    def run(requests: Stream, blocks: int, running: int) -> float:
        config = KVCacheConfig(
            num_blocks=blocks + 1,  # one is vLLM's null block
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        manager = KVCacheManager(
            config, max_model_len=1 << 20, scheduler_block_size=BLOCK_SIZE, hash_block_size=BLOCK_SIZE
        )
        known: dict[int, BlockHash] = {}
        asked = []
        for number, names in enumerate(requests):
            hashes = [known.setdefault(name, BlockHash(hashlib.sha256(b"%d" % name).digest())) for name in names]
            asked.append(
                Request(
                    request_id=str(number),
                    prompt_token_ids=[0] * (len(names) * BLOCK_SIZE),
                    sampling_params=SamplingParams(max_tokens=1),
                    pooling_params=None,
                    block_hasher=lambda _, hashes=hashes: hashes,
                )
            )
            if len(asked[-1].block_hashes) != len(names):
                raise RuntimeError("vLLM did not take the block hashes")
        order = list(turns(len(requests), running))
        gc.collect()
        started = time.thread_time()
        for index, done in order:
            if done is not None:
                manager.free(asked[done])
            request = asked[index]
            computed, cached, _ = manager.get_computed_blocks(request)
            if manager.allocate_slots(request, request.num_tokens - cached, cached, computed) is None:
                raise RuntimeError("the pool is too small for the running requests")
        return time.thread_time() - started

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--blocks", type=int, default=8192)
    parser.add_argument("--running", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    requests = stream(arguments.requests, arguments.seed)
    contestants = {"vLLM": vllm(), "kvist, lineage": kvist("lineage"), "kvist, lru": kvist("lru")}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, contestant in contestants.items():
            seconds[name].append(contestant(requests, arguments.blocks, arguments.running))
    blocks = sum(map(len, requests))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    table = Table(title=f"{len(requests)} requests, {blocks} blocks, a pool of {arguments.blocks}")
    for column in ("", "requests/s", "blocks/s", "us a block", "x vLLM", "x, round by round"):
        table.add_column(column, justify="left" if not column else "right")
    for name, median in medians.items():
        ratios = sorted(vllm / ours for vllm, ours in zip(seconds["vLLM"], seconds[name], strict=True))
        table.add_row(
            name,
            f"{len(requests) / median:,.0f}",
            f"{blocks / median:,.0f}",
            f"{median / blocks * 1e6:.3f}",
            f"{medians['vLLM'] / median:.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"blocks": blocks, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
