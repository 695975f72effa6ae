"""Configurations that can not be: the error names the field, what was expected, and what came."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.errors import InvalidInput
from kvist.sim.config import ClusterConfig, EngineConfig, HostOffload, SglangOptions
from kvist.tiers.config import TiersConfig

HOST = HostOffload(num_blocks=9)
TIERS = TiersConfig(block_bytes=64 * 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be a whole number, 1 to 16777216; got 0"),
        ({"block_size": -1}, "block_size must be a whole number, 1 to 1048576; got -1"),
        ({"max_model_len": 0}, "max_model_len must be a whole number, 1 to 2147483647; got 0"),
        ({"speedup": float("nan")}, "speedup must be a number, 1e-06 to 1e.06; got nan"),
        ({"decode_speedup": float("inf")}, "decode_speedup must be a number, 1e-06 to 1e.06; got inf"),
        ({"startup_ms": -0.5}, "startup_ms must be a number, 0 or more; got -0.5"),
        ({"num_blocks": 4.5}, "num_blocks must be a whole number, 1 to 16777216; got 4.5"),
        ({"num_blocks": "4"}, "num_blocks must be a whole number, 1 to 16777216; got '4'"),
        ({"num_blocks": 2**24 + 1}, "num_blocks must be a whole number"),
        ({"block_size": 2.5}, "block_size must be a whole number"),
        ({"block_size": True}, "block_size must be a whole number"),
        ({"max_num_seqs": 1.5}, "max_num_seqs must be a whole number"),
        ({"max_num_batched_tokens": 10**20}, "max_num_batched_tokens must be a whole number"),
        ({"speedup": 1e-308}, "speedup must be a number, 1e-06 to 1e.06; got 1e-308"),
        ({"speedup": "2"}, "speedup must be a number, 1e-06 to 1e.06; got '2'"),
        ({"startup_ms": 1e308}, "startup_ms must be a number, 0 or more, and at most 1e.12; got 1e.308"),
        ({"startup_ms": 10**400}, "startup_ms must be a number, 0 or more, and at most 1e.12; got 1000"),
        ({"kv_bytes_per_token": 10**30}, "kv_bytes_per_token must be a whole number"),
        ({"timing": None}, "timing must be of the type Timing; got None"),
        ({"sglang": None}, "sglang must be of the type SglangOptions; got None"),
        ({"tiers": 5}, r"tiers must be of the type kvist.tiers.config.TiersConfig \| None; got 5"),
        (
            {"scheduling": "sglang", "policy": "lru"},
            "policy is not simulated for .* sglang: it must be 'vllm'; got 'lru'",
        ),
        ({"scheduling": "sglang", "preemption": "fifo"}, "preemption is not simulated for the scheduling of sglang"),
        ({"scheduling": "sglang", "chunked_prefill": False}, "chunked_prefill is not simulated for .* sglang"),
        (
            {"scheduling": "sglang", "max_num_batched_tokens": 512},
            "max_num_batched_tokens is not simulated for .* sglang",
        ),
        ({"scheduling": "sglang", "kv_bytes_per_token": 8, "host_offload": HOST}, "host_offload is not simulated"),
        ({"scheduling": "sglang", "kv_bytes_per_token": 8, "tiers": TIERS}, "tiers is not simulated"),
        ({"scheduling": "trtllm", "kv_bytes_per_token": 8, "host_offload": HOST}, "scheduling is not .* host_offload"),
        ({"policy": "lfu", "kv_bytes_per_token": 8, "host_offload": HOST}, "policy is not simulated for host_offload"),
        ({"scheduling": "fcfs"}, "scheduling must be one of vllm, trtllm, sglang; got 'fcfs'"),
        ({"preemption": "random"}, "preemption must be one of lifo, fifo; got 'random'"),
        ({"policy": "clock"}, "policy must be one of vllm, .*; got 'clock'"),
        (
            {"max_num_seqs": 9, "max_num_batched_tokens": 8},
            r"max_num_batched_tokens must be at least max_num_seqs \(9\).*; got 8",
        ),
        ({"host_offload": HostOffload(num_blocks=9)}, "kv_bytes_per_token must say how large they are; got 0"),
        (
            {"host_offload": HostOffload(num_blocks=9), "kv_bytes_per_token": 8, "prefix_caching": False},
            "it needs prefix_caching",
        ),
    ],
)
def test_engines_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be a whole number, 1 to 4096; got 0"),
        ({"dp_size": 0}, "dp_size must be a whole number, 1 to 4096; got 0"),
        ({"prefill_workers": -1}, "prefill_workers must be a whole number, 0 to 4096; got -1"),
        ({"transfer_gbps": 0.0}, "transfer_gbps must be a number, 1e-06 to 1e.09; got 0.0"),
        ({"arrival_speedup": 0.0}, "arrival_speedup must be a number, 1e-06 to 1e.06; got 0.0"),
        ({"concurrency": 0}, "concurrency must be a whole number, 1 to 2147483647; got 0"),
        ({"workers": 1.5}, "workers must be a whole number, 1 to 4096; got 1.5"),
        ({"workers": 10**11}, "workers must be a whole number, 1 to 4096; got 100000000000"),
        ({"workers": 64, "prefill_workers": 1, "dp_size": 64}, "at most 4096 ranks together; got 4160"),
        ({"concurrency": 0.5}, "concurrency must be a whole number"),
        ({"seed": "x"}, "seed must be a whole number, 0 to .*; got 'x'"),
        ({"score": None}, "score must be of the type ScoreConfig; got None"),
        ({"arrival_speedup": 1e-308}, "arrival_speedup must be a number, 1e-06 to 1e.06"),
        ({"event_lag_ms": 1e308}, "event_lag_ms must be a number, 0 or more, and at most 1e.12"),
        ({"event_lag_ms": -1.0}, "event_lag_ms must be a number, 0 or more; got -1.0"),
        ({"router": "random"}, "router must be one of round_robin, kv; got 'random'"),
    ],
)
def test_clusters_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ClusterConfig(**options)


def test_parts_are_checked_too() -> None:
    with pytest.raises(InvalidInput, match=r"store_gbps must be a number, 1e-06 to 1e.09; got 0"):
        HostOffload(num_blocks=1, store_gbps=0)
    with pytest.raises(InvalidInput, match="schedule_policy must be one of fifo, lpm; got 'lifo'"):
        SglangOptions(schedule_policy="lifo")  # type: ignore[arg-type]


def test_what_a_pool_holds() -> None:
    assert EngineConfig(num_blocks=10, block_size=16).capacity_tokens == 160
