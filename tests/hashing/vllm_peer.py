"""Runs in an environment with vLLM: hashes the cases on its input with vLLM's own functions."""

import json
import os
import sys
from types import SimpleNamespace

import vllm.v1.core.kv_cache_utils as utils
from vllm.utils.hashing import get_hash_fn_by_name

TAGGED = hasattr(utils, "to_event_extra_keys")


def request_of(case: dict) -> SimpleNamespace:
    lora = case.get("lora")
    return SimpleNamespace(
        all_token_ids=case["token_ids"],
        num_tokens=len(case["token_ids"]),
        block_hashes=[],
        cache_salt=case.get("salt") or None,
        prompt_embeds=None,
        lora_request=SimpleNamespace(lora_name=lora[0], lora_path=lora[1]) if lora else None,
        mm_features=[
            SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset, length=length))
            for name, offset, length in case.get("multimodal", ())
        ],
    )


def hashes_of(case: dict) -> dict:
    os.environ.pop("PYTHONHASHSEED", None)
    if case["seed"] is not None:
        os.environ["PYTHONHASHSEED"] = case["seed"]
    digest = get_hash_fn_by_name(case["algorithm"])
    utils.init_none_hash(digest)
    request = request_of(case)
    size = case["block_size"]
    hashes = utils.get_request_block_hasher(size, digest)(request)
    keys, place = [], 0
    for start in range(0, len(hashes) * size, size):
        of_block, place = utils.generate_block_hash_extra_keys(request, start, start + size, place)
        keys.append(of_block)
    told = utils.to_event_extra_keys(keys) if TAGGED else keys
    return {
        "root": utils.NONE_HASH.hex(),
        "hashes": [value.hex() for value in hashes],
        "events": [utils.maybe_convert_block_hash(value) for value in hashes],
        "event_keys": told or [],
    }


if __name__ == "__main__":
    found = {
        "tagged": TAGGED,
        "has_default_seed": hasattr(utils, "DEFAULT_NONE_HASH_SEED"),
        "results": [hashes_of(case) for case in json.load(sys.stdin)],
    }
    with open(sys.argv[1], "w") as out:  # noqa: PTH123 - vLLM logs to the standard output
        json.dump(found, out)
