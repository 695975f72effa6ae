"""`CartridgeConnector`, as vLLM loads it by name.

``--kv-transfer-config '{"kv_connector": "CartridgeConnector", "kv_connector_module_path":
"kvist.engines.vllm.cartridges", "kv_role": "kv_both", "kv_connector_extra_config": {"registry": "cartridges.db"}}'``.
Options: `kvist.cartridge.config` and docs/guides/cartridges.md.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvist.cartridge.config import CartridgeConfig, open_library
from kvist.cartridge.library import Entry, Library
from kvist.engines.vllm import arriving, intake, internals
from kvist.engines.vllm.cartridges.documents import Documents, Prefixes
from kvist.engines.vllm.cartridges.metrics import InjectionStats
from kvist.engines.vllm.cartridges.scheduler import CartridgeScheduler
from kvist.engines.vllm.cartridges.worker import CartridgeWorker
from kvist.engines.vllm.sides import SidedConnector
from kvist.errors import InvalidInput, UnsupportedModel


class CartridgeConnector(SidedConnector):
    """One per process and role: vLLM asks it which tokens of a request are a cartridge's, and has it inject them.

    Attributes:
        prefixes: beside the scheduler: what markers of requests stand for.
    """

    STATS = InjectionStats
    scheduler: CartridgeScheduler | None = None
    worker: CartridgeWorker | None = None
    prefixes: Prefixes
    _library: Library | None = None  # beside the scheduler

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.config = CartridgeConfig.from_extra(self._settings)
        if role == KVConnectorRole.SCHEDULER:
            layouts = internals.layouts(vllm_config, kv_cache_config, 0, is_pinned=False)
            if any(layout.attention == "mla" for layout in layouts):
                raise UnsupportedModel("a latent cache (MLA) has no keys and values that a cartridge could hold")
            self.scheduler = CartridgeScheduler(layouts)
            self.prefixes = self._open_prefixes()
        else:
            from vllm.distributed import get_tensor_model_parallel_rank

            rank = get_tensor_model_parallel_rank()
            layouts = internals.layouts(vllm_config, kv_cache_config, rank, is_pinned=False)
            attention = vllm_config.compilation_config.static_forward_context
            self.worker = CartridgeWorker(layouts, self.config, attention, self._configured)
            self._told = 0

    def shutdown(self) -> None:
        """See the base class."""
        super().shutdown()
        if self._library is not None:
            self._library.close()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """See the base class. Steps beside which no load ended cost nothing."""
        if self.worker is None or self.worker.arrivals.ended == self._told:
            return None
        self._told = self.worker.arrivals.ended
        return super().get_kv_connector_stats()

    def _open_prefixes(self) -> Prefixes:
        """What the engine core itself knows of cartridges.

        Raises:
            InvalidInput: one has no token ids, and nothing could be recomputed from it; or requests could not be seen.
        """
        if int(os.environ.get("VLLM_USE_RUST_FRONTEND", "0")):
            raise InvalidInput("cartridges need vLLM's Python front end", hint="unset VLLM_USE_RUST_FRONTEND")
        config = self._vllm_config
        recomputes = config.kv_transfer_config.kv_load_failure_policy == "recompute"
        library, _ = open_library(self.config, intake.model_identity(config, self._settings))
        self._library = library
        for entry in map(library.get, library.configured_ids) if recomputes else ():
            if not entry.manifest.has_token_ids:
                raise InvalidInput(
                    f"kv_load_failure_policy is recompute, and cartridge {entry.cartridge_id} has no token ids: if it "
                    "could not be loaded, something else would be computed in its place",
                    hint='set "kv_load_failure_policy": "fail"',
                )
        library.nudge()
        vocabulary = config.model_config.get_vocab_size()
        return Prefixes(
            library,
            Documents(vocabulary=vocabulary, verify=recomputes and self.config.verify),
            max_model_len=config.model_config.max_model_len,
            placeholder=arriving.placeholder_of(config),
        )

    def _configured(self) -> list[Entry]:
        """The cartridges that the configuration names."""
        library, _ = open_library(self.config, intake.model_identity(self._vllm_config, self._settings))
        try:
            ids = dict.fromkeys((*self.config.preload, *library.configured_ids))
            return [library.get(cartridge_id) for cartridge_id in ids]
        finally:
            library.close()
