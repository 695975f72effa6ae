"""What workers tell of cartridges to vLLM's own log and ``/metrics``. Knows numbers; must not know cartridges."""

from __future__ import annotations

from typing import Final

from kvist.engines.vllm.metrics import Catalogue, ConnectorStats

COUNTERS: Final = {
    "injections": "Requests that a cartridge was copied into blocks for.",
    "injections_failed": "Requests whose cartridge could not be had.",
    "pages_injected": "Pages copied into blocks.",
    "bytes_injected": "Bytes copied into blocks.",
    "injection_seconds": "Seconds that these copies took; copies beside each other count each.",
    "hits": "Cartridges that were in host memory when they were wanted.",
    "misses": "Cartridges that were not, and had to be loaded.",
    "waits": "Requests that waited for another one's load of their cartridge.",
    "loads": "Cartridges loaded into host memory.",
    "failures": "Loads into host memory that failed.",
    "evictions": "Cartridges that went out of host memory.",
    "bytes_loaded": "Bytes loaded into host memory.",
}
"""Sums of all ranks, by their names in a worker's statistics."""
GAUGES: Final = {
    "resident": "Cartridges in host memory, of the rank with the most.",
    "resident_bytes": "Bytes of cartridges in host memory, of the rank with the most.",
}

CATALOGUE: Final = Catalogue("vllm:kvist_cartridge_", "cartridge", COUNTERS, GAUGES)


class InjectionStats(ConnectorStats):
    """What happened to cartridges between two steps."""

    catalogue = CATALOGUE
