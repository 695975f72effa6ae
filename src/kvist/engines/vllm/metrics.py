"""What workers tell to vLLM's log and ``/metrics``, for any connector of ours. Knows numbers; must not know of what.

A connector has a `Catalogue` of numbers; its workers' sums go on for ever, and a `Meter` makes of them what happened
between two steps, which vLLM carries to its API process.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

Number = int | float


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The numbers of one connector.

    Attributes:
        prefix: what the names of its metrics begin with.
        spoken: what they begin with in a line of the log.
        counters: sums of all ranks, by their names in a worker's statistics; with a text each.
        gauges: levels, of the rank with the most.
    """

    prefix: str
    spoken: str
    counters: Mapping[str, str]
    gauges: Mapping[str, str]


SNAPSHOTS: Final = Catalogue(
    "vllm:kvist_",
    "kvist",
    {
        "loads": "Requests whose pages were loaded.",
        "loads_failed": "Requests whose pages could not be had.",
        "pages_loaded": "Pages written into blocks.",
        "bytes_loaded": "Bytes written into blocks.",
        "load_seconds": "Seconds that these loads took; loads beside each other count each.",
        "pages_read": "Pages read from the repository for loads, or ahead of them.",
        "bytes_from_store": "Bytes of pages that its store gave.",
        "bytes_from_tiers": "Bytes of pages that page tiers gave.",
        "tier_hits": "Page halves that a tier gave.",
        "tier_misses": "Page halves that a tier was asked for and did not give.",
        "tier_bad": "Page halves that a tier gave and that were not the ones asked for.",
        "tier_errors": "Calls that a tier could not carry out.",
        "pages_captured": "Pages copied out for snapshots.",
        "bytes_captured": "Bytes of snapshots that the repository did not have.",
        "blocks_saved": "Blocks stored by the durable prefix cache.",
        "bytes_saved": "Bytes of these blocks.",
        "saves_dropped": "Blocks that it did not store: no room in host memory, or a store that failed.",
    },
    {},
)
"""Of the connector for snapshots; its names are those of `WorkerSide.stats`."""


class ConnectorStats(KVConnectorStats):
    """What happened between two steps: how far each counter went on, and the gauges.

    A subclass sets `catalogue`: vLLM makes these objects of a dictionary, and tells nothing else.
    """

    data: dict[str, Any]
    catalogue: ClassVar[Catalogue]

    def reset(self) -> None:
        """Begin anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Of two ranks, or of two steps."""
        for name, value in other.data.items():
            here = self.data.get(name, 0)
            self.data[name] = max(here, value) if name in self.catalogue.gauges else here + value
        return self

    def reduce(self) -> dict[str, Number]:
        """For a line of the log."""
        return {f"{self.catalogue.spoken} {name}": value for name, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.get(name) for name in self.catalogue.counters)


class SnapshotStats(ConnectorStats):
    """What happened to snapshots, and to the durable prefix cache, between two steps."""

    catalogue = SNAPSHOTS


class Meter:
    """Tells what a worker's statistics went on by since the last time."""

    def __init__(self, kind: type[ConnectorStats]) -> None:
        self._kind = kind
        self._last: Mapping[str, Number] = {}

    def read(self, stats: Mapping[str, Number]) -> ConnectorStats | None:
        """What happened since; ``None``: nothing."""
        catalogue = self._kind.catalogue
        steps: dict[str, Number] = {name: stats[name] - self._last.get(name, 0) for name in catalogue.counters}
        self._last = stats
        found = self._kind(data=steps | {name: stats[name] for name in catalogue.gauges})
        return None if found.is_empty() else found


class ConnectorMetrics(KVConnectorPromMetrics):
    """The metrics of a catalogue, in an API process."""

    def __init__(
        self,
        catalogue: Catalogue,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        # of several API processes the one that heard last knows, as with vLLM's own gauges
        gauge = functools.partial(self._gauge_cls, multiprocess_mode="mostrecent")
        counters, gauges = catalogue.counters, catalogue.gauges
        kinds: dict[str, Any] = {**dict.fromkeys(counters, self._counter_cls), **dict.fromkeys(gauges, gauge)}
        self._gauges = gauges
        self._by_engine: dict[str, dict[int, Any]] = {}
        for name, text in {**counters, **gauges}.items():
            metric = kinds[name](name=f"{catalogue.prefix}{name}", documentation=text, labelnames=labelnames)
            self._by_engine[name] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take up what one engine's workers told."""
        for name, value in transfer_stats_data.items():
            metric = self._by_engine[name][engine_idx]
            if name in self._gauges:
                metric.set(value)
            else:
                metric.inc(value)
