"""Makes ``host.json``: what Dynamo 1.6.1's mocker makes of ``trace.jsonl`` with native offloading; see ``make.py``."""

from __future__ import annotations

import json
from typing import Any

from make import HERE, replay

BYTES = 131072
SMALL = {"num_blocks": 60, "block_size": 64}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ample": (SMALL, {"num_blocks": 4096}, {}),
    "small host": (SMALL, {"num_blocks": 80}, {}),
    "host smaller than a prompt": (SMALL, {"num_blocks": 12}, {}),
    "blocks of 16": ({"num_blocks": 200, "block_size": 16}, {"num_blocks": 500}, {}),
    "blocks of 32": ({"num_blocks": 110, "block_size": 32}, {"num_blocks": 250}, {}),
    "slow stores": (SMALL, {"num_blocks": 300, "store_gbps": 0.5}, {}),
    "slow loads": (SMALL, {"num_blocks": 300, "load_gbps": 0.5}, {}),
    "late first bytes": (SMALL, {"num_blocks": 300, "store_gbps": 4.0, "load_gbps": 2.0, "latency_ms": 3.0}, {}),
    "small chunks": (SMALL | {"max_num_batched_tokens": 256, "max_num_seqs": 6}, {"num_blocks": 300}, {}),
    "slots run out": (SMALL | {"num_blocks": 34}, {"num_blocks": 200, "store_gbps": 2.0}, {}),
    "2 workers": (SMALL | {"num_blocks": 40}, {"num_blocks": 80}, {"workers": 2}),
    "shortest model": (SMALL | {"max_model_len": 1100}, {"num_blocks": 100}, {}),
}
NAMES = {
    "num_blocks": "num_host_blocks",
    "store_gbps": "d2h_bandwidth_gbps",
    "load_gbps": "h2d_bandwidth_gbps",
    "latency_ms": "latency_to_first_byte_ms",
}


def case(engine: dict[str, Any], host: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    native = {NAMES[name]: value for name, value in host.items()}
    requests = replay(engine | {"kv_cache_bytes_per_token": BYTES, "native_host_offload": native}, cluster)
    engine = engine | {"kv_bytes_per_token": BYTES}
    return {"engine": engine, "host": host, "cluster": cluster, "requests": requests}


if __name__ == "__main__":
    made = {name: case(*each) for name, each in CASES.items()}
    lines = (f"{json.dumps(name)}:{json.dumps(each, separators=(',', ':'))}" for name, each in made.items())
    (HERE / "host.json").write_text("{" + ",\n".join(lines) + "}\n")
