"""`KvistConnector`, as vLLM loads it by name. Hands every call to the scheduler's side or to the worker's.

``--kv-transfer-config '{"kv_connector": "KvistConnector", "kv_connector_module_path": "kvist.engines.vllm.connector",
"kv_role": "kv_both", "kv_connector_extra_config": {"store": "file:///srv/kv"}}'``. Options: docs/guides/vllm.md.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvist.engines.vllm import internals
from kvist.engines.vllm.index import PrefixIndex
from kvist.engines.vllm.messages import StepPlan, StepReport
from kvist.engines.vllm.scheduler import SchedulerSide
from kvist.engines.vllm.worker import WorkerSide
from kvist.errors import InvalidInput

_OPTIONS: Final = {"store", "model", "revision", "mode", "host_bytes", "cache_bytes"}
_MODES: Final = ("snapshots", "write_through")
_HOST_BYTES: Final = 1 << 30


class KvistConnector(KVConnectorBase_V1, SupportsHMA):
    """One per process and role: vLLM asks it what a request can take, and has it bring that in.

    Attributes:
        scheduler: beside the scheduler; ``None`` in a worker.
        worker: in a worker; ``None`` beside the scheduler.
    """

    scheduler: SchedulerSide | None = None
    worker: WorkerSide | None = None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        internals.check(vllm_config, kv_cache_config)
        self.extra = _options(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self.mode = self.extra.get("mode", _MODES[0])
        self._bad_blocks: set[int] = set()
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
            self.worker = WorkerSide(layouts, self.extra["store"], host_bytes, numerics, cache_bytes)

    def shutdown(self) -> None:
        """Stop threads and close the store."""
        if self.worker is not None:
            self.worker.close()
        if self.scheduler is not None:
            self.scheduler.close()

    # -- scheduler -----------------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """See the base class; 0.28 knows only this."""
        assert self.scheduler is not None
        self.scheduler.bind_pool(gpu_block_pool)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """See the base class."""
        assert self.scheduler is not None
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        """See the base class."""
        assert self.scheduler is not None
        self.scheduler.arrive(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See the base class."""
        assert self.scheduler is not None
        return self.scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See the base class."""
        assert self.scheduler is not None
        self.scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """See the base class."""
        assert self.scheduler is not None
        return self.scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """See the base class."""
        assert self.scheduler is not None
        report = connector_output.kv_connector_worker_meta
        self.scheduler.stepped(
            connector_output.finished_recving or (), report if isinstance(report, StepReport) else None
        )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See the base class."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See the base class. Blocks are never kept back: what a snapshot holds does not wait for a request's end."""
        assert self.scheduler is not None
        self.scheduler.finished(request, block_ids)
        return False, None

    def reset_cache(self) -> bool | None:
        """See the base class; called when weights are replaced."""
        assert self.scheduler is not None
        self.scheduler.forget()
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed off when a request ends."""
        return False

    # -- worker --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See the base class."""
        assert self.worker is not None
        config = self._kv_cache_config
        self.worker.register(kv_caches, [group.layer_names for group in config.kv_cache_groups], config.num_blocks)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """See the base class. Of all calls in a step the one that surely comes before anything is computed."""
        super().bind_connector_metadata(connector_metadata)
        assert self.worker is not None and isinstance(connector_metadata, StepPlan)
        self.worker.before_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See the base class."""
        plan = self._get_connector_metadata()
        assert self.worker is not None and isinstance(plan, StepPlan)
        self.worker.start_loads(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: no request runs before its pages are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: pages are copied when they are wanted."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See the base class; how 0.28 asks. Failed loads are told by their blocks."""
        assert self.worker is not None
        arrived, failed, self._bad_blocks = self.worker.take_arrived()
        return None, arrived | failed

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See the base class."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """See the base class; how 0.30 and later ask."""
        assert self.worker is not None
        arrived, failed, _ = self.worker.take_arrived()
        return internals.transfer_results(arrived, failed)

    def build_connector_worker_meta(self) -> StepReport | None:
        """See the base class."""
        assert self.worker is not None
        return self.worker.take_report()


def _options(extra: dict[str, Any]) -> dict[str, Any]:
    unknown = extra.keys() - _OPTIONS
    if "store" not in extra or unknown:
        raise InvalidInput(
            f"kv_connector_extra_config: expected store and of {', '.join(sorted(_OPTIONS))}, got {sorted(extra)}"
        )
    if extra.get("mode", _MODES[0]) not in _MODES:
        raise InvalidInput(f"kv_connector_extra_config: mode is one of {', '.join(_MODES)}, got {extra['mode']!r:.80}")
    return extra
