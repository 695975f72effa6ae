"""Cartridges made by plain transformers, and the part that all scripts of the injection tests begin with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity
from kvist.hashing.weights import revision

SAME = 1e-3
"""Most that log probabilities of two engines differ by, in float32; measured: 5e-5. Without one token's keys and values
in the tiny model's cache: 0.3 to 7."""


def document(tokens: int, seed: int = 0) -> list[int]:
    """Ids of a document."""
    draw = random.Random(f"{tokens} {seed}")
    return [draw.randrange(10, 500) for _ in range(tokens)]


def prefilled(
    model: Path, ids: list[int], directory: Path, name: str, *, has_ids: bool = True, told: list[int] | None = None
) -> Path:
    """A saved cartridge: what transformers computes for ``ids``, said to be of ``told`` if that is given."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    cache = DynamicCache()  # keeps what a sliding layer would drop
    with torch.no_grad():
        network(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    layers = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
    identity = ModelIdentity.of_directory(model, dtype="float32", revision=revision(model))
    made = Cartridge.create(layers, identity, cartridge_id=name, token_ids=(told or ids) if has_ids else None)
    return made.save_pretrained(directory)


def config(paths: dict[str, Path], **more: Any) -> dict[str, Any]:
    """A ``--kv-transfer-config`` with these cartridges; ``transfer`` is beside ``kv_connector_extra_config``."""
    transfer = more.pop("transfer", {})
    listed = [{"cartridge_id": name, "path": str(path)} for name, path in paths.items()]
    return {
        "kv_connector": "CartridgeConnector",
        "kv_connector_module_path": "kvist.engines.vllm.cartridges",
        "kv_role": "kv_both",
        **transfer,
        "kv_connector_extra_config": {"cartridges": listed, "router": {"type": "explicit"}, **more},
    }


BEGIN = """
from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

def sampling(cartridge=None, tokens=24, **named):
    transfer = {"kv_transfer_params": {"cartridge_id": cartridge, **named}} if cartridge else None
    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True, extra_args=transfer)

def shown(answer):
    out = answer.outputs[0]
    told = (answer.kv_transfer_params or {}).get("cartridge")
    return {"ids": list(out.token_ids), "finish": out.finish_reason, "cached": answer.num_cached_tokens,
            "logprobs": [top[i].logprob for top, i in zip(out.logprobs or (), out.token_ids)], "cartridge": told,
            "loaded": told["loaded_tokens"] if told else None}

def ask_all(llm, asked):
    # asked: [prompt, cartridge, further arguments of sampling, salt]
    prompts, params = [], []
    for ids, cartridge, named, salt in asked:
        prompts.append({"prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})})
        params.append(sampling(cartridge, **named))
    return [shown(answer) for answer in llm.generate(prompts, params, use_tqdm=False)]

def ask(llm, ids, cartridge=None, salt=None, **named):
    return ask_all(llm, [(ids, cartridge, named, salt)])[0]

def core(llm):
    return llm.llm_engine.engine_core.engine_core

def connector(llm, kind="CartridgeConnector"):
    found = core(llm).scheduler.connector
    return next(one for one in [found, *getattr(found, "_connectors", ())] if type(one).__name__ == kind)

def worker(kind="CartridgeConnector"):
    found = get_kv_transfer_group()
    return next(one for one in [found, *getattr(found, "_connectors", ())] if type(one).__name__ == kind).worker

def left(llm):
    # what is held once no request is there: nothing, if nothing leaks
    side, pool = connector(llm).scheduler, core(llm).scheduler.kv_cache_manager.block_pool
    return [side.in_use, len(side._loading), pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()]
"""


def differ(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How much two answers' log probabilities differ; infinite if their tokens do. What differs too much is printed."""
    if one["ids"] != other["ids"]:
        return float("inf")
    most = max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))
    if most >= SAME:
        print("log probabilities:", one["logprobs"], other["logprobs"], sep="\n")
    return most
