"""Configurations that can not be: the error names the field, what was expected, and what came."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.errors import InvalidInput
from kvist.sim.config import ClusterConfig, EngineConfig, HostOffload, SglangOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be a number above 0; got 0"),
        ({"block_size": -1}, "block_size must be a number above 0; got -1"),
        ({"max_model_len": 0}, "max_model_len must be a number above 0; got 0"),
        ({"speedup": float("nan")}, "speedup must be a number above 0; got nan"),
        ({"decode_speedup": float("inf")}, "decode_speedup must be a number above 0; got inf"),
        ({"startup_ms": -0.5}, "startup_ms must be a number, 0 or more; got -0.5"),
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
        ({"workers": 0}, "workers must be a number above 0; got 0"),
        ({"dp_size": 0}, "dp_size must be a number above 0; got 0"),
        ({"prefill_workers": -1}, "prefill_workers must be a number, 0 or more; got -1"),
        ({"transfer_gbps": 0.0}, "transfer_gbps must be a number above 0; got 0.0"),
        ({"arrival_speedup": 0.0}, "arrival_speedup must be a number above 0; got 0.0"),
        ({"concurrency": 0}, "concurrency must be a number above 0; got 0"),
        ({"event_lag_ms": -1.0}, "event_lag_ms must be a number, 0 or more; got -1.0"),
        ({"router": "random"}, "router must be one of round_robin, kv; got 'random'"),
    ],
)
def test_clusters_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ClusterConfig(**options)


def test_parts_are_checked_too() -> None:
    with pytest.raises(InvalidInput, match="store_gbps must be a number above 0; got 0"):
        HostOffload(num_blocks=1, store_gbps=0)
    with pytest.raises(InvalidInput, match="schedule_policy must be one of fifo, lpm; got 'lifo'"):
        SglangOptions(schedule_policy="lifo")  # type: ignore[arg-type]


def test_what_a_pool_holds() -> None:
    assert EngineConfig(num_blocks=10, block_size=16).capacity_tokens == 160
