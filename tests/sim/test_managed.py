"""Replays under kvist's policies, with and without kvist's tiers: all requests end, and nothing is left held."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.blocks.policy import POLICIES
from kvist.sim.below import TiersBelow
from kvist.sim.cluster import Arrivals, RoundRobin, run
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.managed import ManagedPool
from kvist.sim.records import Records
from kvist.sim.replay import replay
from kvist.sim.scheduler import Scheduler
from kvist.sim.timing import Fixed
from kvist.sim.workload import Arrivals as Coming
from kvist.sim.workload import Lengths, sessions
from kvist.tiers.config import TierConfig, TiersConfig

from .test_scheduler import Rows, clock_of, columns, contents_of, workloads

BYTES = 1_000_000  # of a token: a block of four takes 4 ms at 1 GB/s
SMALL = EngineConfig(
    num_blocks=24,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    timing=Fixed(5.0, 2.0),
    kv_bytes_per_token=BYTES,
)


def tiers_of(mode: Literal["watermark", "blocking"], speed: float, host: int, disk: int | None) -> TiersConfig:
    at = {"down_gb_per_s": speed, "up_gb_per_s": speed}
    below = None if disk is None else TierConfig(capacity=disk, **at)
    return TiersConfig(block_bytes=4 * BYTES, host=TierConfig(capacity=host, **at), disk=below, mode=mode)


configs = st.builds(
    tiers_of,
    st.sampled_from(["watermark", "blocking"]),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.integers(1, 40),
    st.none() | st.integers(1, 40),
)


@given(workloads(), st.sampled_from(sorted(POLICIES)), st.none() | configs, st.sampled_from(["lifo", "fifo"]))
def test_every_request_ends_and_nothing_stays_held(
    rows: Rows, policy: str, tiers: TiersConfig | None, preemption: Literal["lifo", "fifo"]
) -> None:
    engine = replace(SMALL, policy=policy, tiers=tiers, preemption=preemption)
    requests, pool = columns(rows, engine), ManagedPool(engine)
    below = None if tiers is None else TiersBelow(pool.manager, tiers)
    worker = Scheduler(engine, requests, pool, clock_of(engine), below=below)
    run(requests, [worker], RoundRobin(1), Arrivals([row[0] for row in rows], [-1] * len(rows), [0] * len(rows), None))
    assert requests.generated == [output for _, _, output, _, _ in rows]
    spans = [last - first for first, last in zip(requests.first_token, requests.last_token, strict=True)]
    assert sum(int(times.sum()) * batch for times, batch in worker.gaps) == sum(spans)
    if below is not None:
        while (due := below.deadline()) is not None:
            below.advance(due)
        below.tiers.check_integrity()
    assert pool.num_used == 0
    pool.manager.check_integrity()
    assert pool.manager.num_inactive_blocks <= len({each for chain in contents_of(rows, 4) for each in chain}) * 2


def chats(engine: EngineConfig, router: Literal["round_robin", "kv"] = "round_robin") -> Records:
    said = Lengths(40)
    trace = sessions(
        count=30,
        turns=3,
        system_tokens=64,
        message=said,
        output=said,
        mean_delay_ms=200.0,
        arrivals=Coming(2.0),
        block_size=16,
        seed=3,
    )
    return replay(trace, engine, ClusterConfig(workers=2, router=router))


ENGINE = EngineConfig(num_blocks=120, block_size=8, kv_bytes_per_token=1000, max_num_seqs=16)


def test_lru_is_the_engines_own_pool() -> None:
    own, lru = chats(ENGINE), chats(replace(ENGINE, policy="lru"))
    for column in ("first_token_ms", "last_token_ms", "reused_input_tokens", "admission_count"):
        np.testing.assert_array_equal(getattr(own, column), getattr(lru, column))
    assert own.evicted_blocks == lru.evicted_blocks > 0


@pytest.mark.parametrize("router", ["round_robin", "kv"])
def test_host_memory_brings_blocks_back(router: Literal["round_robin", "kv"]) -> None:
    plain = chats(replace(ENGINE, policy="lru"), router)
    tiers = TiersConfig(block_bytes=8 * 1000, host=TierConfig(capacity=5000))
    helped = chats(replace(ENGINE, tiers=tiers), router)
    assert helped.reused_input_tokens.sum() > plain.reused_input_tokens.sum()
    assert (helped.status == 0).all()
    again = chats(replace(ENGINE, tiers=tiers), router)
    np.testing.assert_array_equal(helped.last_token_ms, again.last_token_ms)
