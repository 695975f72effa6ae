"""What the real Dynamo 1.6.1 made of real traces, where the data is."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from kvist.sim.config import EngineConfig, HostOffload

from .conftest import SHARED

GOLDEN = SHARED / "golden" / "dynamo_replay.json"
TRACES = SHARED / "traces"

needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no {GOLDEN}")


@cache
def golden_cases() -> dict[str, Any]:
    """By name; none where the data is not."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


_NAMES = {
    "num_gpu_blocks": "num_blocks",
    "enable_prefix_caching": "prefix_caching",
    "enable_chunked_prefill": "chunked_prefill",
    "speedup_ratio": "speedup",
    "backend": "scheduling",
    "kv_cache_bytes_per_token": "kv_bytes_per_token",
}


def engine_of(case: dict[str, Any]) -> EngineConfig:
    """The engine of a case, under our names."""
    engine = dict(case["engine"])
    host = engine.pop("native_host_offload", None)
    offload = {"host_offload": HostOffload(num_blocks=host["num_host_blocks"])} if host else {}
    named = {_NAMES.get(name, name): value for name, value in engine.items()}
    return EngineConfig(reject_oversized=True, **named, **offload)
