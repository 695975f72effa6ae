"""Runs in an environment with NVIDIA Dynamo: hashes the cases on its input with Dynamo's own function."""

import json
import sys

from dynamo._core import compute_block_hash_for_seq


def hashes_of(case: dict) -> list[int]:
    multimodal = case.get("multimodal")
    infos = multimodal and [
        {"mm_objects": [{"mm_hash": value, "offsets": [[0, 1]]} for value in block]} if block else None
        for block in multimodal
    ]
    return compute_block_hash_for_seq(
        case["token_ids"],
        case["block_size"],
        block_mm_infos=infos or None,
        lora_name=case.get("lora_name") or None,
        is_eagle=case.get("eagle", False),
        cache_namespace=case.get("cache_namespace") or None,
    )


if __name__ == "__main__":
    json.dump([hashes_of(case) for case in json.load(sys.stdin)], sys.stdout)
