"""Cases for the block hashes, the golden figures, and the engines that made them."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "data" / "hash_golden.json"
IDENTIFIERS = [f"{value:064x}" for value in (0xABCDEF, 1 << 200, (1 << 256) - 1)]


def dynamo_cases(seed: int, count: int) -> list[dict[str, Any]]:
    """Seeded cases in the words of `local_block_hashes`."""
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        block_size = rng.choice([1, 2, 4, 16, 32])
        ids = [rng.choice([0, 1, 7, 0xFFFFFFFF, rng.getrandbits(32)]) for _ in range(rng.randrange(4 * block_size))]
        case: dict[str, Any] = {"token_ids": ids, "block_size": block_size}
        if rng.random() < 0.3:
            case["lora_name"] = rng.choice(["adapter-a", "ü-adapter", "x" * 300])
        if rng.random() < 0.3:
            case["cache_namespace"] = rng.choice(["tenant", "租户"])
        if rng.random() < 0.3:
            case["eagle"] = True
        elif rng.random() < 0.5:
            blocks = len(ids) // block_size
            case["multimodal"] = [[rng.getrandbits(64) for _ in range(rng.randrange(4))] for _ in range(blocks)]
        cases.append(case)
    return cases


def vllm_cases(seed: int, count: int) -> list[dict[str, Any]]:
    """Seeded cases: algorithm, ``PYTHONHASHSEED``, tokens, adapter, salt, multimodal items."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        block_size = rng.choice([1, 4, 16])
        ids = [rng.choice([0, 255, 256, 65535, 65536, rng.getrandbits(31)]) for _ in range(rng.randrange(48))]
        algorithm = ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"][number % 4]
        needs_seed = algorithm.startswith("xxhash") or rng.random() < 0.5
        case: dict[str, Any] = {
            "algorithm": algorithm,
            "seed": rng.choice(["0", "42"]) if needs_seed else None,
            "token_ids": ids,
            "block_size": block_size,
        }
        if rng.random() < 0.3:
            case["lora"] = ["adapter-a", "/models/adapter-a"]
        if rng.random() < 0.3:
            case["salt"] = "tenant-7"
        if rng.random() < 0.5:
            case["multimodal"] = _items(rng)
        cases.append(case)
    return cases


def _items(rng: random.Random) -> list[list[Any]]:
    items, end = [], 0
    for identifier in IDENTIFIERS[: rng.randrange(1, 4)]:
        offset = end + rng.randrange(8)
        end = offset + rng.randrange(1, 12)
        items.append([identifier, offset, end - offset])
    return items


def dynamo_python() -> str:
    """The interpreter beside Dynamo."""
    return os.environ.get("KVIST_DYNAMO_PYTHON") or sys.executable


def vllm_python() -> str:
    """The interpreter beside vLLM."""
    return os.environ.get("KVIST_VLLM_PYTHON") or sys.executable


@functools.cache
def missing(python: str, module: str) -> str:
    """Why a test cannot run, or nothing: ``module`` is looked for, not imported."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0
    except OSError:
        found = False
    return "" if found else f"{module} is not installed beside {python}"


def ask_dynamo(cases: list[dict[str, Any]]) -> list[list[int]]:
    """What Dynamo itself makes of the cases."""
    answer = subprocess.run(
        [dynamo_python(), str(HERE / "dynamo_peer.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def ask_vllm(cases: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """What vLLM itself makes of the cases."""
    out = scratch / "vllm.json"
    asked = [vllm_python(), str(HERE / "vllm_peer.py"), str(out)]
    subprocess.run(asked, input=json.dumps(cases), capture_output=True, text=True, check=True)
    return json.loads(out.read_text())


def make_golden(scratch: Path) -> dict[str, Any]:
    """The golden figures, made anew by the real Dynamo 1.6.1 and vLLM 0.32."""
    dynamo, vllm = dynamo_cases(1, 20), vllm_cases(1, 20)
    return {
        "dynamo": [{**case, "hashes": hashes} for case, hashes in zip(dynamo, ask_dynamo(dynamo), strict=True)],
        "vllm": [{**case, **result} for case, result in zip(vllm, ask_vllm(vllm, scratch)["results"], strict=True)],
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make_golden(Path(sys.argv[1])), separators=(",", ":")) + "\n")
