"""kvist's metrics in vLLM's own ``/metrics``: of the workers, and of the API process or processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvist.testing.scenario.requests import GREEDY, prompt
from kvist.testing.vllm import VllmServer

_WRITE_THROUGH = {"mode": "write_through"}


_WITHOUT_AN_ENGINE = """
import os
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from types import SimpleNamespace
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from kvist.engines.vllm.cartridges.connector import CartridgeConnector
from kvist.engines.vllm.connector import KvistConnector
from kvist.engines.vllm.metrics import SNAPSHOTS, Meter, SnapshotStats
from kvist.engines.vllm.worker import WorkerSide
from kvist.server.vllm import endpoint_plugin
(store,) = arguments

worker = WorkerSide([], store, 1 << 20, dict, None)
meter, begun = Meter(SnapshotStats), dict(worker.stats())
out = {"names": [sorted(begun), sorted(SNAPSHOTS.counters)], "idle": meter.read(begun) is None}
first = meter.read(begun | {"loads": 2, "bytes_loaded": 100, "load_seconds": 0.5})
second = meter.read(begun | {"loads": 3, "bytes_loaded": 150, "load_seconds": 0.75})
worker.close()

config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="x"))
kinds = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
for connector in (KvistConnector, CartridgeConnector):
    shown = connector.build_prom_metrics(config, kinds, ["engine"], {0: ["0"], 1: ["1"]})
    if connector is KvistConnector:
        for engine, stats in ((0, first), (1, second)):
            shown.observe(KvistConnector.build_kv_connector_stats(stats.to_dict()).to_dict(), engine)
out["together"] = first.aggregate(second).reduce()
children = {"KvistConnector": second.data, "CartridgeConnector": {"loads": 1}}
shown = MultiConnector.build_kv_connector_stats(children).data
out["children"] = {name: type(stats).__name__ for name, stats in shown.items()}

app = FastAPI()
endpoint_plugin().attach_router(app)
app.state.args = SimpleNamespace(api_key=None)
attach_router(app)
client = TestClient(app, base_url="http://127.0.0.1")
out["statuses"] = [client.get(f"/v1/processfork/{path}").status_code for path in ("stats", "snapshots/x", "nothing")]
out["metrics"] = client.get("/metrics").text
emit(out)
"""


def sums(text: str) -> dict[str, float]:
    """Sums over all labels but those that tell operations and routes apart."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            told = [sample.labels[name] for name in ("operation", "route", "status") if name in sample.labels]
            name = " ".join([sample.name, *told])
            found[name] = found.get(name, 0.0) + sample.value
    return found


def test_both_sides_meet_in_vllm_s_registry(store: str, run_offline: Callable[..., Any]) -> None:
    """The workers' sums by vLLM's own way, and the API process's counters, without an engine."""
    out = run_offline(_WITHOUT_AN_ENGINE, store)
    assert out["names"][0] == out["names"][1]
    assert out["idle"] is True
    assert out["together"] == {"kvist loads": 3, "kvist bytes_loaded": 150, "kvist load_seconds": 0.75}
    assert out["children"] == {"KvistConnector": "SnapshotStats", "CartridgeConnector": "InjectionStats"}
    found = sums(out["metrics"])
    assert found["vllm:kvist_loads_total"] == 3
    assert found["vllm:kvist_bytes_loaded_total"] == 150
    assert found["vllm:kvist_loads_failed_total"] == found["vllm:kvist_cartridge_hits_total"] == 0
    for path, status in zip(("stats", "snapshots/{rev:path}"), out["statuses"], strict=False):
        assert found[f"kvist_http_requests_total /v1/processfork/{path} {status}"] == 1
    assert found["kvist_http_requests_total (other) 404"] == 1
    assert found["kvist_http_requests_in_flight"] == 0


def read(server: VllmServer) -> dict[str, float]:
    """What vLLM's ``/metrics`` says."""
    return sums(server.http.get("/metrics").text)


def step_until(server: VllmServer, *names: str) -> dict[str, float]:
    """Steps of the engine until these sums of its workers have come."""
    for seed in range(10_000):
        server.complete(prompt(40, seed=seed), max_tokens=2, **GREEDY)
        found = read(server)
        if all(found.get(name, 0.0) > 0 for name in names):
            return found
        time.sleep(0.2)
    raise AssertionError(f"{names} never came: {found}")


@pytest.mark.parametrize("processes", [1, 2])
def test_what_kvist_did_is_in_vllm_s_metrics(
    processes: int, store: str, model: Callable[..., Path], start: Callable[..., VllmServer]
) -> None:
    server = start(model(), store, "--api-server-count", str(processes), settings=_WRITE_THROUGH)
    tokens = prompt(600, seed=1)
    stream = server.stream(tokens, max_tokens=1000, **GREEDY)
    stream.wait(2)
    answer = server.http.post("/v1/processfork/snapshot", json={"branch": "main"})  # its last page is nowhere else
    assert answer.status_code == 200, answer.text
    stream.close()
    assert server.http.post("/v1/processfork/checkout", json={"cid": "nothing"}).status_code == 404
    found = step_until(
        server, *(f"vllm:kvist_{name}_total" for name in ("pages_captured", "blocks_saved", "bytes_saved"))
    )
    assert found["vllm:kvist_loads_failed_total"] == 0
    assert found["kvist_operation_seconds_count snapshot"] == 1
    assert found["kvist_operation_failures_total checkout"] == 1
    assert found["kvist_operation_bytes_total snapshot"] == answer.json()["new_bytes"]
    assert found["kvist_http_requests_total /v1/processfork/snapshot 200"] == 1
    assert found["kvist_http_requests_total /v1/processfork/checkout 404"] == 1
    server.kill()

    server = start(model(), store, "--api-server-count", str(processes), settings=_WRITE_THROUGH)
    assert server.complete(tokens, max_tokens=4, **GREEDY).cached_tokens > 0
    step_until(server, *(f"vllm:kvist_{name}_total" for name in ("loads", "bytes_loaded", "load_seconds")))
    server.kill()
