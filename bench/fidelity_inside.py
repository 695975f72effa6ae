"""vLLM's own scheduler and block pool, without a model, in virtual time: what bench/fidelity.py asks in its passes.

    python bench/fidelity_inside.py MODEL < cases.json > answers.json

For the interpreter that has vLLM. Every pass takes `PASS_MS`. A request that comes while one is under way is queued
when it ends; a scheduler that has nothing to do begins when the next request comes. A case is that of
bench/fidelity_traces.py; its answer has of each request the cached tokens, the times of its first admission, first and
last token, and how often it gave way, and the number of contents that left the pool.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ANSWERS = os.dup(1)
os.dup2(2, 1)  # vLLM prints to stdout
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig  # noqa: E402
from vllm.config.kv_events import KVEventsConfig  # noqa: E402
from vllm.distributed.kv_events import BlockStored  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

from vllm import SamplingParams  # noqa: E402

PASS_MS = 10.0
Row = dict[str, Any]


def scheduler(model: str, engine: Row) -> Scheduler:
    size, longest = engine["block_size"], engine["max_model_len"]
    blocks = engine["num_blocks"] + 1  # block 0 is never used
    config = VllmConfig(
        model_config=ModelConfig(model=model, dtype="float32", max_model_len=longest, enforce_eager=True),
        cache_config=CacheConfig(block_size=size, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=engine["max_num_seqs"],
            max_num_batched_tokens=engine["max_num_batched_tokens"],
            max_model_len=longest,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    manager = StructuredOutputManager(config)
    return Scheduler(config, cache, manager, size, log_stats=True)


def requests_of(trace: Row, block_size: int) -> list[Request]:
    """Each trace block has tokens of its own."""
    hasher = get_request_block_hasher(block_size, sha256)
    held, offsets, size = trace["block_ids"], trace["offsets"], trace["block_size"]
    requests = []
    for row, (tokens, output) in enumerate(zip(trace["input_tokens"], trace["output_tokens"], strict=True)):
        prompt = [block * size + i for block in held[offsets[row] : offsets[row + 1]] for i in range(size)][:tokens]
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        requests.append(Request(str(row), prompt, params, None, block_hasher=hasher))
    return requests


def run(model: str, case: Row) -> Row:
    engine = scheduler(model, case["engine"])
    requests, arrivals = requests_of(case["trace"], case["engine"]["block_size"]), case["trace"]["arrival_ms"]
    rows: list[Row] = [{} for _ in requests]
    copies: Counter[Any] = Counter()
    evicted = queued = 0
    fresh = itertools.count(10**9)  # generated tokens are those of no prompt
    now = 0.0
    while queued < len(requests) or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            now = max(now, arrivals[queued])
        while queued < len(requests) and arrivals[queued] <= now:
            engine.add_request(requests[queued])
            queued += 1
        plan = engine.schedule()
        for event in engine.kv_cache_manager.take_events():
            for block in event.block_hashes:
                copies[block] += 1 if isinstance(event, BlockStored) else -1
                evicted += not copies[block]
        names = list(plan.num_scheduled_tokens)
        given: list[list[int]] = []
        for name in names:
            request, row = requests[int(name)], rows[int(name)]
            row.setdefault("first_admit_ms", now)
            # schedule() has counted this pass's tokens as computed: with all known ones, there is a next.
            given.append([next(fresh)] if request.num_computed_tokens >= request.num_tokens else [])
            if given[-1]:
                row.setdefault("first_token_ms", now + PASS_MS)
                row["last_token_ms"] = now + PASS_MS
                if request.prefill_stats is not None:
                    row["first_reused_input_tokens"] = request.prefill_stats.num_cached_tokens
        now += PASS_MS
        engine.update_from_output(plan, ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, given))
    for request, row in zip(requests, rows, strict=True):
        row["readmission_count"] = request.num_preemptions
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return columns | {"evicted_blocks": evicted}


def main() -> None:
    init_none_hash(sha256)
    cases = json.load(sys.stdin)
    answers = [run(sys.argv[1], case) for case in cases]
    with os.fdopen(ANSWERS, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
