"""A pool too small for what runs: requests are preempted, start again, and end as if they had been alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cartridging import connector, identity_of, random_cartridge

from kvist.testing.vllm import DETERMINISTIC

SIZES = {"a": 173, "b": 96}
REQUESTS = 12
MORE = 120
"""Tokens that each request samples: three blocks and more."""
BLOCKS = 30
"""Of 32 tokens: room for four of the requests to their end."""

_SCRIPT = """
import random
from vllm import SamplingParams
model, config, sizes, count, more, blocks = arguments
llm = make_llm(model, config=config, num_gpu_blocks_override=blocks, disable_log_stats=False,
               max_model_len=512)
generator = random.Random(1)
kinds = [*sizes, None]
asked = [([generator.randrange(10, 300) for _ in range(1 + 5 * at)], kinds[at % len(kinds)]) for at in range(count)]

def params(kind):
    extra = {"kv_transfer_params": {"cartridge_id": kind}} if kind else None
    return SamplingParams(temperature=0, max_tokens=more, ignore_eos=True, logprobs=0, extra_args=extra)

def run(some):
    return llm.generate([{"prompt_token_ids": ids} for ids, _ in some], [params(kind) for _, kind in some],
                        use_tqdm=False)

def shown(out):
    answer = out.outputs[0]
    return {"ids": list(answer.token_ids), "finish": answer.finish_reason, "prompt": len(out.prompt_token_ids),
            "logprobs": [next(iter(step.values())).logprob for step in answer.logprobs],
            "cached": out.num_cached_tokens, "cartridge": (out.kv_transfer_params or {}).get("cartridge")}

def preempted():
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")

alone = [shown(run([one])[0]) for one in asked]
before = preempted()
together = [shown(out) for out in run(asked)]
times = preempted() - before
llm.reset_prefix_cache()
again = [shown(out) for out in run(asked)]
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
emit({"alone": alone, "together": together, "again": again, "preempted": times, "free": free,
      "asked": [[len(ids), kind] for ids, kind in asked]})
"""


@pytest.fixture(scope="module")
def seen(
    model: Callable[..., Path], run_offline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    path, root = model(), tmp_path_factory.mktemp("cartridges")
    identity = identity_of(path, "bfloat16")
    listed = [
        {"cartridge_id": name, "path": str(random_cartridge(root, identity, name, tokens))}
        for name, tokens in SIZES.items()
    ]
    config = connector({"cartridges": listed, "router": {"type": "explicit"}})
    result: dict[str, Any] = run_offline(_SCRIPT, str(path), config, SIZES, REQUESTS, MORE, BLOCKS, env=DETERMINISTIC)
    return result


def test_requests_were_preempted(seen: dict[str, Any], note: Callable[[str], None]) -> None:
    assert seen["preempted"] > 0
    note(f"cartridges: {seen['preempted']:.0f} preemptions of {REQUESTS} requests in {BLOCKS} blocks, all as alone")


@pytest.mark.parametrize("run", ["together", "again"])
def test_and_ended_as_if_alone(seen: dict[str, Any], run: str) -> None:
    """In every token and log probability; ``again`` with nothing left in the prefix cache."""
    for at, (got, alone) in enumerate(zip(seen[run], seen["alone"], strict=True)):
        assert got["ids"] == alone["ids"], at
        assert got["logprobs"] == alone["logprobs"], at
        assert got["finish"] == "length"


def test_only_prompts_are_counted(seen: dict[str, Any]) -> None:
    for (tokens, kind), got in zip(seen["asked"], seen["together"], strict=True):
        assert got["prompt"] == tokens
        assert 0 <= got["cached"] <= tokens
        assert (got["cartridge"] or {}).get("id") == kind


def test_nothing_stays_behind(seen: dict[str, Any]) -> None:
    """All blocks are free but the null block."""
    assert seen["free"] == BLOCKS - 1
