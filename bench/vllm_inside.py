"""What bench/vllm.py runs in processes of their own, with the engine inside: `vllm.LLM` does not share a process well.

    python bench/vllm_inside.py arm|lmcache|thaw '{"model": …}'

An arm is told what to do by lines of JSON and answers each by one. The others answer once, and end.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWERS = os.dup(1)
os.dup2(2, 1)  # engines print to stdout
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]


def answer(**fields: Any) -> None:
    os.write(ANSWERS, (json.dumps(fields) + "\n").encode())


def ids(count: int, seed: object) -> list[int]:
    generator = random.Random(f"{count}/{seed}")
    return [generator.randrange(7, 300) for _ in range(count)]


def engine(asked: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        asked["model"],
        dtype=asked["dtype"],
        enforce_eager=True,
        block_size=asked["block_size"],
        kv_cache_memory_bytes=1 << 30,
        max_num_batched_tokens=8192,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        **({"kv_transfer_config": asked["transfer"]} if asked.get("transfer") else {}),
    )


def arm(asked: dict[str, Any]) -> None:
    """Throughput of a fixed workload, once for each line; the line says which prompts."""
    from vllm import SamplingParams

    spent = Spent()
    if asked.get("transfer"):
        spent.watch()
    llm = engine(asked)
    params = SamplingParams(temperature=0, max_tokens=asked["output"], ignore_eos=True, detokenize=False)
    answer(ready=True)
    for line in sys.stdin:
        seed = json.loads(line)
        prompts = [{"prompt_token_ids": ids(asked["prompt"], f"{seed}/{n}")} for n in range(asked["prompts"])]
        spent.seconds = 0.0
        cpu, started = time.process_time(), time.perf_counter()
        done = llm.generate(prompts, params, use_tqdm=False)
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        in_connector_s = spent.seconds
        assert not any(one.num_cached_tokens for one in done), "the prompts were to be new"
        tokens = sum(len(one.prompt_token_ids) + len(one.outputs[0].token_ids) for one in done)
        measured = {"seconds": seconds, "cpu_s": cpu_s, "in_connector_s": in_connector_s, "tokens": tokens}
        answer(**measured, settle_s=settled(asked.get("transfer")), **stats(asked))


class Spent:
    """The time that the engine's own thread spends in calls of our connector."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def watch(self) -> None:
        """Before an engine is made."""
        from kvist.engines.vllm.connector import KvistConnector

        for name, member in list(vars(KvistConnector).items()):
            if callable(member) and not name.startswith("__"):
                setattr(KvistConnector, name, self._timed(member))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - started

        return timed


def stats(asked: dict[str, Any]) -> dict[str, int]:
    """What the worker side of our connector has counted."""
    if not asked.get("transfer"):
        return {}
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return dict(get_kv_transfer_group().worker.stats())


def settled(transfer: object) -> float:
    """Wait until nothing more is written in the background, so that no other arm pays for it; seconds it took."""
    started = last = time.perf_counter()
    counted = stats({"transfer": transfer})
    while "blocks_saved" in counted and time.perf_counter() - last < 1.5:
        time.sleep(0.05)
        if (now := stats({"transfer": transfer})) != counted:
            counted, last = now, time.perf_counter()
    return last - started


def lmcache(asked: dict[str, Any]) -> None:
    """First token through LMCache: computed, then loaded after the engine's own prefix cache was emptied."""
    os.environ |= {"LMCACHE_CHUNK_SIZE": "256", "LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "1"}
    from vllm import SamplingParams

    llm = engine(asked | {"transfer": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}})
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    rows = []
    for tokens in asked["tokens"]:
        times = []
        for _ in range(2):
            started = time.perf_counter()
            (done,) = llm.generate([{"prompt_token_ids": ids(tokens, "lmcache")}], params, use_tqdm=False)
            times.append((time.perf_counter() - started) * 1e3)
            llm.reset_prefix_cache()
        rows.append({"tokens": tokens, "save ms": times[0], "load ms": times[1], "cached": done.num_cached_tokens})
        if not done.num_cached_tokens:
            rows = []
            break
    answer(rows=rows)


def thaw(asked: dict[str, Any]) -> None:
    """thaw's freeze of the prefix cache; in Python where its native extension, which needs CUDA, is not there."""
    os.environ["THAW_ALLOW_PYTHON_FALLBACK"] = "1"
    import thaw_vllm

    from vllm import SamplingParams

    llm = engine(asked)
    llm.generate([{"prompt_token_ids": ids(500, "thaw")}], SamplingParams(max_tokens=1), use_tqdm=False)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        frozen = thaw_vllm.freeze_kv_cache(llm, f"{directory}/cache.thaw")
        answer(rows=[{"freeze ms": (time.perf_counter() - started) * 1e3, **frozen}])


if __name__ == "__main__":
    {"arm": arm, "lmcache": lmcache, "thaw": thaw}[sys.argv[1]](json.loads(sys.argv[2]))
