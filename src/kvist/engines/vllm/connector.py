"""`KvistConnector`, as vLLM loads it by name: snapshots, and the durable prefix cache.

``--kv-transfer-config '{"kv_connector": "KvistConnector", "kv_connector_module_path": "kvist.engines.vllm.connector",
"kv_role": "kv_both", "kv_connector_extra_config": {"store": "file:///srv/kv"}}'``. Options: docs/guides/vllm.md.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvist.engines.paged.index import PrefixIndex
from kvist.engines.vllm import internals
from kvist.engines.vllm.metrics import SnapshotStats
from kvist.engines.vllm.scheduler import SchedulerSide
from kvist.engines.vllm.sides import SidedConnector
from kvist.engines.vllm.worker import WorkerSide
from kvist.errors import InvalidInput
from kvist.repo.tier import open_tier

_TEXTS: Final = {"store", "model", "revision", "tokens", "trusted_keys"}
_OPTIONS: Final = {*_TEXTS, "mode", "host_bytes", "cache_bytes", "tiers"}
_MODES: Final = ("snapshots", "write_through")
_HOST_BYTES: Final = 1 << 30


class KvistConnector(SidedConnector):
    """One per process and role: vLLM asks it what a request can take, and has it bring that in."""

    STATS = SnapshotStats
    scheduler: SchedulerSide | None = None
    worker: WorkerSide | None = None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.extra = _options(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self.mode = self.extra.get("mode", _MODES[0])
        if role == KVConnectorRole.SCHEDULER:
            layouts = internals.layouts(vllm_config, kv_cache_config, 0)
            index = None
            if self.mode == "write_through":
                if internals.hashes_are_random(vllm_config):
                    raise InvalidInput(
                        "write_through: block hashes are random in every process here",
                        hint="set PYTHONHASHSEED to one value for all servers, and use sha256 or sha256_cbor",
                    )
                ranks = range(vllm_config.parallel_config.tensor_parallel_size)
                each = [internals.layouts(vllm_config, kv_cache_config, rank) for rank in ranks]
                index = PrefixIndex(self.extra["store"], each)
            self.scheduler = SchedulerSide(layouts, index)
        else:
            from vllm.distributed import get_tensor_model_parallel_rank

            layouts = internals.layouts(vllm_config, kv_cache_config, get_tensor_model_parallel_rank())
            numerics = functools.partial(internals.numerics, vllm_config, kv_cache_config)
            host_bytes = int(self.extra.get("host_bytes", _HOST_BYTES))
            cache_bytes = int(self.extra.get("cache_bytes", 0)) if self.mode == "write_through" else None
            self.worker = WorkerSide(
                layouts, self.extra["store"], host_bytes, numerics, cache_bytes, self.extra.get("tiers", ())
            )


def _options(extra: dict[str, Any]) -> dict[str, Any]:
    unknown = extra.keys() - _OPTIONS
    if "store" not in extra or unknown:
        raise InvalidInput(
            f"kv_connector_extra_config: expected store and of {', '.join(sorted(_OPTIONS))}, got {sorted(extra)}"
        )
    for name in _TEXTS & extra.keys():  # taken for nothing, a list of token files would let everybody in
        if not isinstance(extra[name], str) or not extra[name]:
            raise InvalidInput(f"kv_connector_extra_config: {name} is text, got {extra[name]!r:.80}")
    if extra.get("mode", _MODES[0]) not in _MODES:
        raise InvalidInput(f"kv_connector_extra_config: mode is one of {', '.join(_MODES)}, got {extra['mode']!r:.80}")
    tiers = extra.get("tiers", [])
    if not isinstance(tiers, list) or not all(isinstance(tier, str) for tier in tiers):
        raise InvalidInput("kv_connector_extra_config: tiers is a list of urls of page tiers, the nearest first")
    for tier in tiers:
        open_tier(tier).close()  # a wrong url ends the start, not the first load
    return extra
