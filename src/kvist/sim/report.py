"""`Report`: what a replay came to, in the figures and under the names of NVIDIA Dynamo's replay report.

The definitions are those of Dynamo 1.6.1, found from its per-request results and checked against its summaries:

* Latencies and lengths are those of completed requests. ``ttft``: arrival to first token. ``ttst``: first token to
  second. ``tpot``: mean time between a request's tokens. ``e2e_latency``: arrival to last token.
* ``itl``: the time between two tokens of a request; every pair of tokens is a sample.
  ``output_token_throughput_per_user``: 1000 over each of these.
* ``committed_prefill_tokens``: prompt tokens that passes computed. Dynamo leaves out what a request computes that comes
  back from a preemption with all its prompt in the cache.
* A percentile is a sample, that of nearest rank. Dynamo gives those of ``itl`` and of throughput from a sketch, to
  within 0.1%; here they are exact.
* A figure without samples is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvist.sim.config import ClusterConfig, EngineConfig, require_positive
from kvist.sim.files import write_whole
from kvist.sim.records import COMPLETED, STATUS, Records

PERCENTILES: Final = {"median": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sla:
    """What a request may take at most; ``None``: anything.

    Attributes:
        ttft_ms: from arrival to the first token.
        itl_ms: between its tokens, on the mean.
        e2e_ms: from arrival to the last token.
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None
    e2e_ms: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, *self.limits)

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Latencies:
    """A row for each request, in ms; NaN where it has none."""

    ttft_ms: Floats
    ttst_ms: Floats
    itl_ms: Floats
    e2e_ms: Floats

    @classmethod
    def of(cls, records: Records) -> Latencies:
        """Those of the completed requests."""
        first = np.where(records.status == COMPLETED, records.first_token_ms, np.nan)
        gaps = np.where(records.output_length > 1, records.output_length - 1.0, np.nan)
        return cls(
            ttft_ms=first - records.arrival_ms,
            ttst_ms=records.second_token_ms - first,
            itl_ms=(records.last_token_ms - first) / gaps,
            e2e_ms=np.where(np.isnan(first), np.nan, records.last_token_ms - records.arrival_ms),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A replay, with what was replayed.

    Attributes:
        trace_name: of the trace.
        engine: every worker's.
        cluster: the workers.
        records: what came of it.
        wall_s: seconds that the replay itself took.
        sla: what requests should take at most.
    """

    trace_name: str
    engine: EngineConfig
    cluster: ClusterConfig
    records: Records
    wall_s: float
    sla: Sla | None = None

    def summary(self) -> dict[str, Any]:
        """Every figure; with an SLA also ``goodput_*``: of the requests that keep to it."""
        return self.figures() | self._speed()

    def figures(self) -> dict[str, Any]:
        """Those of `summary` that do not depend on how fast this machine is."""
        records, latencies = self.records, Latencies.of(self.records)
        itl = np.flatnonzero(records.token_gaps_ms > 0)
        gaps, counts = records.token_gaps_ms[itl], records.token_gap_counts[itl]
        return {
            **self._counts(latencies),
            **self._goodput(latencies),
            **spread("ttft_ms", latencies.ttft_ms),
            **spread("ttst_ms", latencies.ttst_ms),
            **spread("tpot_ms", latencies.itl_ms),
            **spread("itl_ms", records.token_gaps_ms, records.token_gap_counts),
            **spread("e2e_latency_ms", latencies.e2e_ms),
            **spread("output_token_throughput_per_user", 1000.0 / gaps, counts),
        }

    @property
    def worker_names(self) -> list[str]:
        """What people call the rows of `Records.busy_ms`."""
        size = self.cluster.dp_size
        names = [
            f"worker {i // size}" + (f", rank {i % size}" if size > 1 else "")
            for i in range(self.cluster.workers * size)
        ]
        return names + [f"prefill worker {i}" for i in range(self.cluster.prefill_workers)]

    def write_requests(self, path: Path) -> None:
        """Write a line of JSON for each request, in the order of the trace. The file is there whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        write_whole(path, self._request_lines())

    def _counts(self, latencies: Latencies) -> dict[str, Any]:
        records = self.records
        done = records.status == COMPLETED
        inputs, outputs = int(records.input_length[done].sum()), int(records.output_length[done].sum())
        seconds = records.duration_ms / 1e3
        prefilling, decoding = (seconds * count for count in (self.cluster.prefill_workers, self.cluster.workers))
        return {
            "num_requests": len(records),
            "completed_requests": int(done.sum()),
            "rejected_requests": len(records) - int(done.sum()),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "committed_prefill_tokens": records.prefill_tokens,
            "processed_tokens": inputs + outputs,
            "duration_ms": records.duration_ms,
            "request_throughput_rps": _ratio(int(done.sum()), seconds),
            "input_throughput_tok_s": _ratio(inputs, seconds),
            "output_throughput_tok_s": _ratio(outputs, seconds),
            "total_throughput_tok_s": _ratio(inputs + outputs, seconds),
            "prefill_worker_seconds": prefilling,
            "decode_worker_seconds": decoding,
            "gpu_hours": (prefilling + decoding) / 3600,
            "mean_busy_ratio": _ratio(math.fsum(records.busy_ms.tolist()), records.duration_ms * len(records.busy_ms)),
            "passes": records.passes,
            "preemptions": records.preemptions,
            "evicted_blocks": records.evicted_blocks,
            "kv_eviction_policy": self.engine.policy,
            "prefix_cache_reused_ratio": _ratio(int(records.reused_input_tokens[done].sum()), inputs),
            "first_admission_prefix_cache_reused_ratio": _ratio(
                int(records.first_reused_input_tokens[done].sum()), inputs
            ),
            "num_ttft_samples": int(np.isfinite(latencies.ttft_ms).sum()),
            "num_tpot_samples": int(np.isfinite(latencies.itl_ms).sum()),
            "num_e2e_latency_samples": int(np.isfinite(latencies.e2e_ms).sum()),
        }

    def _goodput(self, latencies: Latencies) -> dict[str, Any]:
        if self.sla is None:
            return {}
        good = np.isfinite(latencies.ttft_ms)  # who got no token had nothing of what was promised
        for name, limit in self.sla.limits.items():
            took = getattr(latencies, name)
            good &= (took <= limit) | np.isnan(took)  # one token alone has no time between tokens
        seconds = self.records.duration_ms / 1e3
        return {
            "goodput_completed_requests": int(good.sum()),
            "goodput_request_throughput_rps": _ratio(int(good.sum()), seconds),
            "goodput_output_throughput_tok_s": _ratio(int(self.records.output_length[good].sum()), seconds),
        }

    def _speed(self) -> dict[str, Any]:
        done = self.records.status == COMPLETED
        inputs, outputs = int(self.records.input_length[done].sum()), int(self.records.output_length[done].sum())
        return {
            "wall_time_ms": self.wall_s * 1e3,
            "processed_tokens_per_s": _ratio(inputs + outputs, self.wall_s),
            "processed_output_tokens_per_s": _ratio(outputs, self.wall_s),
        }

    def _request_lines(self) -> Iterator[bytes]:
        records = self.records
        columns: dict[str, list[Any]] = {
            "arrival_time_ms": records.arrival_ms.tolist(),
            "input_length": records.input_length.tolist(),
            "requested_output_length": records.requested_output_length.tolist(),
            "output_length": records.output_length.tolist(),
            "first_admit_ms": records.first_admit_ms.tolist(),
            "first_token_ms": records.first_token_ms.tolist(),
            "last_token_ms": records.last_token_ms.tolist(),
            "reused_input_tokens": records.reused_input_tokens.tolist(),
            "admission_count": records.admission_count.tolist(),
            "readmission_count": records.readmission_count.tolist(),
            "terminal_status": [STATUS[status] for status in records.status.tolist()],
        }
        encode = msgspec.json.Encoder().encode  # writes NaN as null
        for row in zip(*columns.values(), strict=True):
            yield encode(dict(zip(columns, row, strict=True))) + b"\n"


def spread(name: str, values: Floats, counts: Ints | None = None) -> dict[str, float]:
    """``mean_<name>`` and so on: of values that are no NaN, each so many times. Without any, all are 0."""
    kept = np.isfinite(values)
    weights = kept.astype(np.int64) if counts is None else np.where(kept, counts, 0)
    order = np.argsort(values, kind="stable")
    order = order[weights[order] > 0]
    values, weights = values[order], weights[order]
    names = ("mean", "min", "max", *PERCENTILES, "std")
    if not len(values):
        return dict.fromkeys((f"{one}_{name}" for one in names), 0.0)
    total = int(weights.sum())
    # summed without rounding: a sum by numpy depends on the processor, and on where the array lies
    mean = math.fsum((values * weights).tolist()) / total
    std = math.sqrt(math.fsum(((values - mean) ** 2 * weights).tolist()) / total)
    figures = (mean, values[0], values[-1], *percentiles(values, weights), std)
    return {f"{one}_{name}": float(figure) for one, figure in zip(names, figures, strict=True)}


def percentiles(values: Floats, counts: Ints) -> list[float]:
    """The `PERCENTILES` of ascending values, each so many times, once or more."""
    ends = np.cumsum(counts)
    return [
        float(values[np.searchsorted(ends, nearest_rank(part, int(ends[-1])), "right")])
        for part in PERCENTILES.values()
    ]


def nearest_rank(part: float, count: int) -> int:
    """Which of so many samples, from 0 on, is the percentile: the nearest one, and of two the later."""
    return int(part * (count - 1) + 0.5)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
