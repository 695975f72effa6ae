"""vLLM: cartridges, placed before requests and injected into the paged KV cache of an unmodified `vllm serve`.

The API process and the engine core place them (`frontend`, through `kvist.engines.vllm.intake`); the connector loads
them: `scheduler` decides, beside vLLM's, which blocks of a request are a cartridge's; `worker` keeps cartridges in
host memory, in the layout of this engine's pages (`packing`), and copies them into blocks.

Importing this package imports no vLLM. ``--kv-transfer-config`` names ``kvist.engines.vllm.cartridges`` as module and
``CartridgeConnector`` as connector.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CartridgeConnector"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvist.engines.vllm.cartridges.connector import CartridgeConnector

    return CartridgeConnector
