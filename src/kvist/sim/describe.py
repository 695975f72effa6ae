"""What a trace holds: its times, lengths, and how much of its prompts a cache without limit would have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvist.sim.chains import chains
from kvist.sim.trace import Ints, Trace


@dataclass(frozen=True, slots=True)
class Spread:
    """Statistics of one number of each request; all 0 where there is no request."""

    total: int
    mean: float
    min: int
    p50: float
    p90: float
    p99: float
    max: int

    @classmethod
    def of(cls, values: Ints) -> Spread:
        """Statistics of `values`. Percentiles are interpolated, as numpy does it."""
        if not len(values):
            return cls(0, 0.0, 0, 0.0, 0.0, 0.0, 0)
        p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
        low, high = int(values.min()), int(values.max())
        return cls(int(values.sum()), float(values.mean()), low, p50, p90, p99, high)


@dataclass(frozen=True, slots=True)
class Description:
    """What `describe` found.

    Attributes:
        name, requests, trace_block_size: of the trace.
        span_ms: from the first arrival to the last; what comes after another request has none.
        requests_per_s: of those with an arrival, over the span; 0 where there is no span.
        turns: how many come after another request.
        forks: how many of these come after one that another, earlier in the trace, comes after as well.
        input_tokens, output_tokens: statistics.
        blocks, unique_blocks: trace blocks in all prompts; how many differ.
        block_hit_ratio: of the trace blocks, those that came before: ``1 - unique_blocks / blocks``.
        block_size: of the engine, for what follows.
        engine_blocks, unique_engine_blocks: full blocks in all prompts; how many differ by their prefix.
        reused_ratio: of the prompt tokens, those that an engine with such blocks finds in a cache without limit, if
            each request has ended before the next comes. It computes 1 token of each prompt or more.
    """

    name: str
    requests: int
    trace_block_size: int
    span_ms: float
    requests_per_s: float
    turns: int
    forks: int
    input_tokens: Spread
    output_tokens: Spread
    blocks: int
    unique_blocks: int
    block_hit_ratio: float
    block_size: int
    engine_blocks: int
    unique_engine_blocks: int
    reused_ratio: float

    def to_json(self) -> dict[str, Any]:
        """As a document."""
        return asdict(self)


def describe(trace: Trace, block_size: int = 64) -> Description:
    """Count what a trace holds.

    Args:
        trace: the requests; generated tokens are in no cache here.
        block_size: tokens of an engine's block.

    Raises:
        InvalidInput: the block size is less than 1.
    """
    made = chains(trace, block_size)
    arrivals = trace.arrival_ms[~np.isnan(trace.arrival_ms)]
    span_ms = float(arrivals.max() - arrivals.min()) if len(arrivals) else 0.0
    parents = trace.previous[trace.previous >= 0]
    unique_blocks = len(np.unique(trace.block_ids))
    blocks = len(trace.block_ids)

    full = np.diff(made.offsets)
    owner = np.repeat(np.arange(len(trace)), full)
    first_owner = np.zeros(made.count, np.int64)
    first_owner[made.ids[::-1]] = owner[::-1]  # of several, the last that is written stays: the first request
    known = np.bincount(owner[first_owner[made.ids] < owner], minlength=len(trace))
    reused = np.minimum(known, (trace.input_tokens - 1) // block_size) * block_size
    total = int(trace.input_tokens.sum())
    return Description(
        name=trace.name,
        requests=len(trace),
        trace_block_size=trace.block_size,
        span_ms=span_ms,
        requests_per_s=len(arrivals) / span_ms * 1000 if span_ms else 0.0,
        turns=len(parents),
        forks=len(parents) - len(np.unique(parents)),
        input_tokens=Spread.of(trace.input_tokens),
        output_tokens=Spread.of(trace.output_tokens),
        blocks=blocks,
        unique_blocks=unique_blocks,
        block_hit_ratio=1 - unique_blocks / blocks if blocks else 0.0,
        block_size=block_size,
        engine_blocks=len(made.ids),
        unique_engine_blocks=made.count,
        reused_ratio=int(reused.sum()) / total if total else 0.0,
    )
