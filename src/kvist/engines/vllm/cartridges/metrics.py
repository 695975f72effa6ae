"""What workers tell of cartridges to vLLM's own log and ``/metrics``. Knows numbers; must not know cartridges."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

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


class InjectionStats(KVConnectorStats):
    """What happened between two steps: how far each counter went on, and the gauges."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Begin anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> InjectionStats:
        """Of two ranks, or of two steps."""
        for name, value in other.data.items():
            here = self.data.get(name, 0)
            self.data[name] = max(here, value) if name in GAUGES else here + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For a line of the log."""
        return {f"cartridge {name}": value for name, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.get(name) for name in COUNTERS)


class Meter:
    """Tells what a worker's statistics went on by since the last time."""

    def __init__(self) -> None:
        self._last: Mapping[str, int | float] = {}

    def read(self, stats: Mapping[str, int | float]) -> InjectionStats | None:
        """What happened since; ``None``: nothing."""
        steps: dict[str, int | float] = {name: stats[name] - self._last.get(name, 0) for name in COUNTERS}
        self._last = stats
        found = InjectionStats(data=steps | {name: stats[name] for name in GAUGES})
        return None if found.is_empty() else found


class InjectionMetrics(KVConnectorPromMetrics):
    """``vllm:kvist_cartridge_*`` of an API process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        # of several API processes the one that heard last knows, as with vLLM's own gauges
        gauge = functools.partial(self._gauge_cls, multiprocess_mode="mostrecent")
        kinds: dict[str, Any] = {**dict.fromkeys(COUNTERS, self._counter_cls), **dict.fromkeys(GAUGES, gauge)}
        self._by_engine: dict[str, dict[int, Any]] = {}
        for name, text in (COUNTERS | GAUGES).items():
            metric = kinds[name](name=f"vllm:kvist_cartridge_{name}", documentation=text, labelnames=labelnames)
            self._by_engine[name] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take up what one engine's workers told."""
        for name, value in transfer_stats_data.items():
            metric = self._by_engine[name][engine_idx]
            if name in GAUGES:
                metric.set(value)
            else:
                metric.inc(value)
