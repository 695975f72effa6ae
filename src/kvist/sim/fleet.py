"""The engines of a configuration, and what is between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.sim.below import TiersBelow
from kvist.sim.cluster import RoundRobin, Router, Worker
from kvist.sim.config import ENGINE_POLICY, ClusterConfig, EngineConfig
from kvist.sim.disaggregation import DecodeScheduler, Handover, PrefillScheduler
from kvist.sim.host import SourcePool
from kvist.sim.managed import ManagedPool
from kvist.sim.offloading import OffloadingScheduler
from kvist.sim.pool import SlotPool
from kvist.sim.radix import RadixCache
from kvist.sim.ranks import Ranks
from kvist.sim.requests import Requests
from kvist.sim.routing import KvRouter, Stage
from kvist.sim.scheduler import Scheduler
from kvist.sim.sglang import RadixScheduler
from kvist.sim.timing import Clock


@dataclass(frozen=True, slots=True)
class Fleet:
    """What serves requests.

    Attributes:
        schedulers: all of them; with disaggregation those that decode come first.
        workers: what steps: schedulers, or groups of those that are ranks of one engine.
        router: between them.
    """

    schedulers: Sequence[Scheduler | RadixScheduler]
    workers: Sequence[Worker]
    router: Router


def fleet_of(
    engine: EngineConfig,
    cluster: ClusterConfig,
    requests: Requests,
    contents: int,
    clock: Clock,
    *,
    order: Sequence[int] | None = None,
    timeline: bool = False,
) -> Fleet:
    """Idle engines.

    Args:
        engine: each of them.
        cluster: how many, and who gets what.
        requests: of the replay.
        contents: numbers of contents are below this.
        clock: how long passes take.
        order: of contents that came to a host at once, see `kvist.sim.host.HostMemory`.
        timeline: whether segments are kept.
    """
    size, is_kv = cluster.dp_size, cluster.router == "kv"

    def router_of(among: Sequence[Scheduler | RadixScheduler], stage: Stage = "both") -> Router:
        if not is_kv:
            return RoundRobin(len(among) // size, size)
        lag, seed, blocks = round(cluster.event_lag_ms * 1e6), cluster.seed, engine.block_size
        return KvRouter(requests, among, contents, blocks, cluster.score, stage=stage, lag=lag, seed=seed)

    if cluster.prefill_workers:
        decodes = [
            DecodeScheduler(engine, requests, _pool_of(engine, contents), clock, worker=number, timeline=timeline)
            for number in range(cluster.workers)
        ]
        prefills = [
            PrefillScheduler(
                engine,
                requests,
                _pool_of(engine, contents, tell=is_kv),
                clock,
                worker=cluster.workers + index,
                timeline=timeline,
                index=index,
            )
            for index in range(cluster.prefill_workers)
        ]
        routers = router_of(prefills, "prompts"), router_of(decodes, "answers")
        handover = Handover(requests, decodes, prefills, *routers, cluster, engine.kv_bytes_per_token)
        return Fleet([*decodes, *prefills], [*decodes, *prefills], handover)
    ranks = [
        _scheduler_of(engine, requests, contents, clock, worker=number, order=order, timeline=timeline, tell=is_kv)
        for number in range(cluster.workers * size)
    ]
    if size == 1:
        return Fleet(ranks, ranks, router_of(ranks))
    plain = [rank for rank in ranks if isinstance(rank, Scheduler)]
    groups = [Ranks(requests, plain[first : first + size]) for first in range(0, len(plain), size)]
    return Fleet(ranks, groups, router_of(ranks))


def _scheduler_of(
    engine: EngineConfig,
    requests: Requests,
    contents: int,
    clock: Clock,
    *,
    worker: int,
    order: Sequence[int] | None,
    tell: bool,
    timeline: bool,
) -> Scheduler | RadixScheduler:
    if engine.scheduling == "sglang":
        tree = RadixCache(engine.num_blocks, tell=tell)
        return RadixScheduler(engine, requests, tree, clock, worker=worker, timeline=timeline)
    if engine.host_offload is not None:
        slots = SourcePool(engine.num_blocks, contents, tell=tell)
        return OffloadingScheduler(engine, requests, slots, clock, order=order, worker=worker, timeline=timeline)
    pool = _pool_of(engine, contents, tell=tell)
    below = TiersBelow(pool.manager, engine.tiers) if isinstance(pool, ManagedPool) and engine.tiers else None
    return Scheduler(engine, requests, pool, clock, below=below, worker=worker, timeline=timeline)


def _pool_of(engine: EngineConfig, contents: int, *, tell: bool = False) -> SlotPool | ManagedPool:
    if engine.policy == ENGINE_POLICY and engine.tiers is None:
        return SlotPool(engine.num_blocks, contents, tell=tell)
    return ManagedPool(engine, tell=tell)
