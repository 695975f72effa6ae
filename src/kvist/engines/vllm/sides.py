"""A connector of two sides: what vLLM asks goes to the one beside the scheduler, or to the one in the worker.

vLLM builds a connector twice, as scheduler's and as worker's, and gives both one interface. Knows that interface, in
all versions that kvist runs on; must not know what the sides do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvist.engines.vllm import internals
from kvist.engines.vllm.metrics import ConnectorMetrics, ConnectorStats, Meter, Number

_CONNECTORS: Final = {
    "KvistConnector": "kvist.engines.vllm.connector",
    "CartridgeConnector": "kvist.engines.vllm.cartridges",
}


def register_connectors() -> None:
    """Let vLLM find our connectors by name alone, as `MultiConnector` does for its children's metrics. Idempotent.

    A connector of such a name that vLLM has itself stays what it is: ours is loaded by its module's path all the same.
    """
    for name, module in _CONNECTORS.items():
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, module, name)


class Deciding(Protocol):
    """Beside the scheduler, in the engine core's thread. Requests, pools and managers are vLLM's."""

    def bind_pool(self, pool: Any) -> None:
        """The block pool, once it exists."""

    def bind(self, manager: Any) -> None:
        """The cache manager, once it is known; 0.28 does not tell."""

    def arrive(self, request: Any) -> None:
        """A request has come."""

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """Tokens to load beyond ``local`` ones, and whether beside the steps; ``None``: ask again. Has no effect."""

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], external: int) -> None:
        """There is room for ``external`` tokens that were promised."""

    def plan(self, output: Any) -> KVConnectorMetadata:
        """What the workers shall do in the step that ``output`` schedules."""

    def stepped(self, finished: Iterable[str], report: Any) -> None:
        """Requests whose loads ended, and what all workers reported; ``None``: nothing."""

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> dict[str, Any] | None:
        """A request has ended; what its answer shall say of it."""

    def forget(self) -> None:
        """vLLM clears its caches: the weights may be others."""

    def close(self) -> None:
        """Stop threads."""


class Moving(Protocol):
    """In a worker: moves pages."""

    def register(self, caches: dict[str, torch.Tensor], groups: Sequence[Sequence[str]], blocks: int) -> None:
        """The cache of each layer, the layers of each group, and how many blocks the scheduler counts."""

    def before_step(self, plan: Any) -> None:
        """After requests entered the batch, before anything is computed."""

    def start_loads(self, plan: Any) -> None:
        """Begin to bring in what requests wait for."""

    def take_arrived(self) -> tuple[set[str], set[str], set[int]]:
        """Requests whose loads ended since the last call: those that have their pages, the others, and their blocks."""

    def take_report(self) -> KVConnectorWorkerMetadata | None:
        """What happened since the last call."""

    def stats(self) -> Mapping[str, Number]:
        """Sums since the start, by their names in the connector's catalogue."""

    def close(self) -> None:
        """Stop threads."""


class SidedConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. A subclass's constructor sets one of the sides.

    Loads are asynchronous ones; nothing is saved by way of vLLM's hooks, and no block is ever kept back.

    Attributes:
        STATS: what its workers tell to vLLM's log and ``/metrics``.
        scheduler: ``None`` in a worker.
        worker: ``None`` beside the scheduler.
    """

    STATS: ClassVar[type[ConnectorStats]]
    scheduler: Deciding | None = None
    worker: Moving | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        register_connectors()  # the plugin does it too, if vLLM was let load it

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        internals.check(vllm_config, kv_cache_config)
        self._bad_blocks: set[int] = set()
        self._meter = Meter(self.STATS)

    def shutdown(self) -> None:
        """Stop threads and close what is open."""
        for side in (self.worker, self.scheduler):
            if side is not None:
                side.close()

    # -- metrics -------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """See the base class."""
        return self._meter.read(self.worker.stats()) if self.worker is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """See the base class."""
        return cls.STATS(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """See the base class."""
        return ConnectorMetrics(cls.STATS.catalogue, vllm_config, metric_types, labelnames, per_engine_labelvalues)

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
        self.scheduler.stepped(connector_output.finished_recving or (), connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See the base class."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See the base class."""
        assert self.scheduler is not None
        return False, self.scheduler.finished(request, block_ids)

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
        assert self.worker is not None
        self.worker.before_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See the base class."""
        assert self.worker is not None
        self.worker.start_loads(self._get_connector_metadata())

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

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """See the base class."""
        assert self.worker is not None
        return self.worker.take_report()
