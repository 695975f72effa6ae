"""A trace through a cluster in virtual time. Equal arguments give equal records, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from kvist.errors import InvalidInput
from kvist.sim.chains import chains
from kvist.sim.cluster import Arrivals, run
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.fleet import fleet_of
from kvist.sim.host import eviction_order
from kvist.sim.records import COMPLETED, REJECTED, Records
from kvist.sim.requests import Requests
from kvist.sim.scheduler import Scheduler
from kvist.sim.sglang import RadixScheduler, tokens_needed
from kvist.sim.timing import Clock
from kvist.sim.trace import Trace


def replay(
    trace: Trace,
    engine: EngineConfig | None = None,
    cluster: ClusterConfig | None = None,
    *,
    timeline: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Records:
    """Serve all requests of a trace.

    Args:
        trace: what comes.
        engine: each worker.
        cluster: how many, and who gets what.
        timeline: whether `Records.segments` are kept.
        progress: called with the number of requests that ended since the last call.

    Raises:
        InvalidInput: the configuration can not serve the trace; nothing was simulated.
    """
    engine, cluster = engine or EngineConfig(), cluster or ClusterConfig()
    _require_servable(trace, engine, cluster)
    requests, contents = requests_of(trace, engine)
    clock = Clock(engine.timing, engine.capacity_tokens, speedup=engine.speedup, decode_speedup=engine.decode_speedup)
    order = None
    if engine.host_offload is not None and contents > engine.host_offload.num_blocks:
        order = eviction_order(trace, engine.block_size)
    fleet = fleet_of(engine, cluster, requests, contents, clock, order=order, timeline=timeline)
    end = run(requests, fleet.workers, fleet.router, _arrivals(trace, cluster), progress, ranks=cluster.dp_size)
    return _records(requests, fleet.schedulers, end)


def requests_of(trace: Trace, engine: EngineConfig) -> tuple[Requests, int]:
    """The rows of a trace, and the number of contents of all their blocks."""
    size = engine.block_size
    found = chains(trace, size)
    inputs, outputs = trace.input_tokens.tolist(), trace.output_tokens.tolist()
    starts = found.offsets.tolist()
    blocks = [found.ids[a:b] for a, b in pairwise(starts)]
    own = [(i + o) // size - i // size + 1 for i, o in zip(inputs, outputs, strict=True)]
    first = np.concatenate(([found.count], found.count + np.cumsum(own, dtype=np.int64))).tolist()
    n = len(trace)
    return (
        Requests(
            input_tokens=inputs,
            output_tokens=outputs,
            blocks=blocks,
            own=first[:-1],
            arrival=[-1] * n,
            admitted=[-1] * n,
            first_token=[-1] * n,
            second_token=[-1] * n,
            last_token=[-1] * n,
            generated=[0] * n,
            reused=[0] * n,
            first_reused=[0] * n,
            admissions=[0] * n,
            rejected=[False] * n,
            worker=[-1] * n,
            prefill_worker=[-1] * n,
        ),
        first[-1],
    )


def _require_servable(trace: Trace, engine: EngineConfig, cluster: ClusterConfig) -> None:
    if engine.scheduling == "sglang" and (cluster.dp_size > 1 or cluster.prefill_workers):
        name = "prefill_workers" if cluster.prefill_workers else "dp_size"
        raise InvalidInput(f"{name} is not simulated for the scheduling of sglang; it is for vllm's and trtllm's")
    if cluster.prefill_workers and cluster.dp_size > 1:
        raise InvalidInput(f"prefill_workers needs a dp_size of 1; got {cluster.dp_size}")
    if cluster.prefill_workers and (engine.tiers or engine.host_offload):
        name = "tiers" if engine.tiers else "host_offload"
        raise InvalidInput(f"{name} are not simulated together with prefill_workers")
    if cluster.concurrency is None and not trace.has_arrivals:
        raise InvalidInput("the trace does not say when requests come (timestamp): give a concurrency")
    prompts, totals = trace.input_tokens, trace.input_tokens + trace.output_tokens
    if engine.max_model_len is not None:
        prompts = np.where(prompts < engine.max_model_len, prompts, 0)  # the others are turned away
        totals = np.where(prompts, np.minimum(totals, engine.max_model_len), 0)
    if engine.scheduling == "sglang":
        _require_admissible(engine, prompts, totals)
        return
    if not engine.chunked_prefill and len(trace) and prompts.max() > engine.max_num_batched_tokens:
        row = int(prompts.argmax())
        raise InvalidInput(
            f"chunked_prefill is off, so max_num_batched_tokens must hold the longest prompt ({prompts[row]} tokens, "
            f"row {row}); got {engine.max_num_batched_tokens}"
        )
    needed = -(-np.maximum(prompts, totals - 1) // engine.block_size)  # the last token is never computed
    if not engine.reject_oversized and len(trace) and needed.max() > engine.num_blocks:
        row = int(needed.argmax())
        raise InvalidInput(
            f"num_blocks must hold the longest request, {needed[row]} blocks of {engine.block_size} tokens (row "
            f"{row}), unless max_model_len bounds it or reject_oversized turns it away; got {engine.num_blocks}"
        )


def _require_admissible(engine: EngineConfig, prompts: np.ndarray, totals: np.ndarray) -> None:
    """SGLang keeps room for the answer, too, and admits parts of prompts in whole blocks."""
    size, options = engine.block_size, engine.sglang
    needed = tokens_needed(engine, prompts, totals)
    if not engine.reject_oversized and needed.max(initial=0) >= engine.capacity_tokens:
        row = int(needed.argmax())
        raise InvalidInput(
            f"num_blocks must hold more than the longest prompt with what is kept free for its answer, {needed[row]} "
            f"tokens in blocks of {size} (row {row}), unless max_model_len bounds it or reject_oversized turns it "
            f"away; got {engine.num_blocks}"
        )
    longest = np.maximum(prompts, totals - 1)[needed < engine.capacity_tokens].max(initial=0)
    whole = options.chunked_prefill_size // size * size
    if longest > whole < options.chunked_prefill_size:
        raise InvalidInput(
            f"sglang.chunked_prefill_size must be a whole number of blocks of {size} tokens, as prompts have up to "
            f"{longest}; got {options.chunked_prefill_size}"
        )
    part = min(-(-longest // size) * size, whole)
    if options.max_prefill_tokens < part:
        raise InvalidInput(
            f"sglang.max_prefill_tokens must hold {part} tokens, the largest part of a prompt that is computed at "
            f"once; got {options.max_prefill_tokens}"
        )


def _arrivals(trace: Trace, cluster: ClusterConfig) -> Arrivals:
    speedup = cluster.arrival_speedup
    times = np.rint(np.nan_to_num(trace.arrival_ms) * 1e6 / speedup).astype(np.int64).tolist()
    delays = np.rint(np.nan_to_num(trace.delay_ms) * 1e6 / speedup).astype(np.int64).tolist()
    return Arrivals(times, trace.previous.tolist(), delays, cluster.concurrency)


def _records(requests: Requests, workers: Sequence[Scheduler | RadixScheduler], end: int) -> Records:
    gaps = [gap for worker in workers for gap in worker.gaps]
    values, counts = _weighted(gaps)
    return Records(
        arrival_ms=_ms(requests.arrival),
        input_length=np.array(requests.input_tokens, dtype=np.int64),
        requested_output_length=np.array(requests.output_tokens, dtype=np.int64),
        output_length=np.array(requests.generated, dtype=np.int64),
        first_admit_ms=_ms(requests.admitted),
        first_token_ms=_ms(requests.first_token),
        second_token_ms=_ms(requests.second_token),
        last_token_ms=_ms(requests.last_token),
        reused_input_tokens=np.array(requests.reused, dtype=np.int64),
        first_reused_input_tokens=np.array(requests.first_reused, dtype=np.int64),
        admission_count=np.array(requests.admissions, dtype=np.int64),
        status=np.where(requests.rejected, REJECTED, COMPLETED).astype(np.int8),
        worker=np.array(requests.worker, dtype=np.int32),
        prefill_worker=np.array(requests.prefill_worker, dtype=np.int32),
        token_gaps_ms=values / 1e6,
        token_gap_counts=counts,
        prefill_tokens=sum(worker.prefilled for worker in workers),
        passes=sum(worker.passes for worker in workers),
        evicted_blocks=sum(worker.pool.num_evicted for worker in workers),
        busy_ms=np.array([worker.busy for worker in workers]) / 1e6,
        duration_ms=end / 1e6,
        segments=tuple(segment for worker in workers for segment in worker.segments or ()),
    )


def _ms(times: list[int]) -> np.ndarray:
    at = np.array(times, dtype=np.int64)
    return np.where(at < 0, np.nan, at / 1e6)


def _weighted(gaps: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    if not gaps:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    # A time and its weight share a number, as numbers are sorted faster than an index of them.
    bits = max(batch for _, batch in gaps).bit_length()
    keys = np.concatenate([times for times, _ in gaps]) << bits
    keys |= np.repeat([batch for _, batch in gaps], [len(times) for times, _ in gaps])
    keys.sort()
    values = keys >> bits
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return values[starts], np.add.reduceat(keys & ((1 << bits) - 1), starts)
