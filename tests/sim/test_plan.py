"""Plans: the cheapest that meets the SLA is found with few replays, whatever the candidates can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput, KvistError
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.plan import Prices, Target, memory_gb, plan
from kvist.sim.report import Sla
from kvist.sim.sweep import Row, Setup, local
from kvist.sim.trace import read_trace
from kvist.tiers.config import TierConfig, TiersConfig

TARGET = Target(sla=Sla(ttft_ms=100))
GB = 10**9
SERVED = {"num_requests": 10, "rejected_requests": 0, "num_ttft_samples": 10, "num_tpot_samples": 10}


def worker(host_gb: int = 0, policy: str = "lru", router: Any = "kv") -> Setup:
    tiers = TiersConfig(block_bytes=GB, host=TierConfig(capacity=host_gb)) if host_gb else None
    engine = EngineConfig(policy=policy, kv_bytes_per_token=GB // 64, tiers=tiers)
    return Setup(engine=engine, cluster=ClusterConfig(router=router))


class Fake:
    """Replays in no time: a candidate takes its work, divided among the workers."""

    def __init__(self, work: dict[Setup, float]) -> None:
        self.work = work
        self.asked: list[tuple[Setup, int]] = []

    def __call__(self, setups: Sequence[Setup]) -> list[Row]:
        rows = []
        for setup in setups:
            engine, router, workers = setup.engine, setup.cluster.router, setup.cluster.workers
            (one,) = (kind for kind in self.work if (kind.engine, kind.cluster.router) == (engine, router))
            self.asked.append((one, workers))
            rows.append(Row(setup, SERVED | {"p95_ttft_ms": self.time(one, workers)}))
        return rows

    def time(self, one: Setup, workers: int) -> float:
        return self.work[one] / workers


class Uneven(Fake):
    """One kind meets the SLA with two workers, and from five on; all others from five on."""

    def time(self, one: Setup, workers: int) -> float:
        return 50.0 if workers >= 5 or (workers == 2 and one.cluster.router == "kv") else 200.0


class Unsteady(Fake):
    """No replay is as the one before."""

    def time(self, one: Setup, workers: int) -> float:
        return super().time(one, workers) * (1 + 1e-6 * len(self.asked))


def test_the_least_size_is_found_and_confirmed() -> None:
    fake = Fake({worker(): 1250.0})
    found = plan(list(fake.work), TARGET, Prices(gpu_hour=2.0), fake)
    assert found.answer is not None
    assert found.below is not None
    assert (found.answer.workers, found.answer.cost, found.below.workers) == (13, 26.0, 12)
    assert [size for _, size in fake.asked] == [1, 2, 4, 8, 16, 12, 14, 13, 13, 12]
    assert (found.trials[-2].figures, found.trials[-1].meets) == (found.answer.figures, False)


def test_one_worker_has_none_below() -> None:
    fake = Fake({worker(): 10.0})
    found = plan(list(fake.work), TARGET, Prices(), fake)
    assert found.answer is not None
    assert (found.answer.workers, found.below, [size for _, size in fake.asked]) == (1, None, [1, 1])


def test_where_none_meets_the_closest_is_told() -> None:
    fake = Fake({worker(): 1e6, worker(policy="lfu"): 9e5})
    found = plan(list(fake.work), TARGET, Prices(), fake, max_workers=5)
    assert (found.answer, found.below) == (None, None)
    assert (found.closest.workers, found.closest.setup.engine.policy) == (5, "lfu")
    assert [size for _, size in fake.asked] == [1, 2, 4, 5, 5]


def test_memory_wins_where_it_is_cheaper_than_gpus() -> None:
    fake = Fake({worker(): 1000.0, worker(host_gb=100): 500.0})
    cheap = plan(list(fake.work), TARGET, Prices(gpu_hour=2.0, host_gb_hour=0.01), fake).answer
    assert cheap is not None
    assert (cheap.workers, memory_gb(cheap.setup), cheap.cost) == (5, (100.0, 0.0), 15.0)
    dear = plan(list(fake.work), TARGET, Prices(gpu_hour=2.0, host_gb_hour=0.03), fake).answer
    assert dear is not None
    assert (dear.workers, memory_gb(dear.setup)) == (10, (0.0, 0.0))


def test_of_equal_price_the_one_with_most_to_spare_is_taken() -> None:
    fake = Fake({worker(policy="lru"): 780.0, worker(policy="lfu"): 750.0, worker(policy="fifo"): 790.0})
    found = plan(list(fake.work), TARGET, Prices(), fake).answer
    assert found is not None
    assert (found.workers, found.setup.engine.policy) == (8, "lfu")


@given(
    st.lists(st.floats(1, 10_000), min_size=1, max_size=6),
    st.lists(st.integers(0, 500), min_size=6, max_size=6),
    st.integers(1, 70),
)
def test_the_answer_is_that_of_trying_everything(work: list[float], hosts: list[int], max_workers: int) -> None:
    policies = ("lru", "lfu", "fifo", "arc", "sieve", "s3fifo")
    kinds = {worker(host, policies[i]): need for i, (need, host) in enumerate(zip(work, hosts, strict=False))}
    prices = Prices(gpu_hour=1.0, host_gb_hour=0.01)
    fake = Fake(kinds)
    found = plan(list(kinds), TARGET, prices, fake, max_workers=max_workers)
    possible = {
        kind: size
        for kind, need in kinds.items()
        if (size := next((n for n in range(1, 71) if need / n <= 100), 71)) <= max_workers
    }
    if not possible:
        assert found.answer is None
        return
    costs = [size * (1 + 0.01 * memory_gb(kind)[0]) for kind, size in possible.items()]
    assert found.answer is not None
    assert found.answer.cost == pytest.approx(min(costs))
    assert found.below is None or found.below.workers == found.answer.workers - 1
    assert len(set(fake.asked)) + min(2, found.answer.workers) == len(fake.asked)  # none twice but to confirm


def test_percentiles_and_rejections_decide() -> None:
    figures = SERVED | {"num_requests": 100, "p99_ttft_ms": 50.0, "p99_tpot_ms": 30.0}
    target = Target(sla=Sla(ttft_ms=100, itl_ms=20), percentile="p99", rejected=0.01)
    assert target.excess(figures) == 1.5
    assert target.excess(figures | {"rejected_requests": 1}) == 1.5
    assert target.excess(figures | {"rejected_requests": 2}) == math.inf


def test_a_limit_that_no_request_is_held_against_is_missed() -> None:
    figures = SERVED | {"p95_ttft_ms": 0.0, "p95_tpot_ms": 0.0}
    for name, limit in (("ttft", {"ttft_ms": 100.0}), ("tpot", {"itl_ms": 100.0})):
        target = Target(sla=Sla(**limit))
        assert target.excess(figures) == 0
        assert target.excess(figures | {f"num_{name}_samples": 0}) == math.inf
        assert [*target.figures(figures | {f"num_{name}_samples": 0}).values()] == [None]


def test_what_can_not_be_planned_is_refused_by_name() -> None:
    fake = Fake({worker(): 1.0})
    for wrong in (
        lambda: Target(sla=Sla()),
        lambda: Target(sla=Sla(ttft_ms=1), percentile="p42"),
        lambda: Target(sla=Sla(ttft_ms=1), rejected=-1),
        lambda: Target(sla=Sla(ttft_ms=1), rejected=1),
        lambda: Target(sla=Sla(ttft_ms=1), rejected=math.nan),
        lambda: Prices(gpu_hour=-1),
        lambda: Prices(gpus=0),
        lambda: plan([], TARGET, Prices(), fake),
        lambda: plan(list(fake.work), TARGET, Prices(), fake, max_workers=0),
        lambda: plan(list(fake.work), TARGET, Prices(), fake, max_workers=10**9),
    ):
        with pytest.raises(InvalidInput, match=r"sla|percentile|rejected|gpu_hour|gpus|candidate|max_workers"):
            wrong()


def test_prefill_workers_are_paid_for() -> None:
    setup = Setup(cluster=ClusterConfig(workers=3, prefill_workers=2))
    assert Prices(gpu_hour=2.0, gpus=4).of(setup) == 40.0


def test_every_rank_is_paid_for() -> None:
    setup = Setup(engine=worker(host_gb=100).engine, cluster=ClusterConfig(workers=3, dp_size=2))
    assert memory_gb(setup) == (100.0, 0.0)
    assert Prices(gpu_hour=2.0, gpus=4, host_gb_hour=0.01).of(setup) == 6 * (8.0 + 1.0)


def test_where_nothing_costs_anything_the_fewest_workers_are_taken() -> None:
    fake = Fake({worker(): 1250.0, worker(policy="lfu"): 900.0, worker(policy="fifo"): 1300.0})
    found = plan(list(fake.work), TARGET, Prices(gpu_hour=0.0), fake)
    assert found.answer is not None
    assert found.below is not None
    assert (found.answer.workers, found.answer.setup.engine.policy, found.below.workers) == (9, "lfu", 8)


def test_where_more_workers_can_be_worse_the_answer_and_the_miss_below_it_stay_true() -> None:
    fake = Uneven(dict.fromkeys([worker(router="round_robin"), worker()], 0.0))
    found = plan(list(fake.work), TARGET, Prices(), fake)
    assert found.answer is not None
    assert found.below is not None
    assert (found.answer.workers, found.below.workers, found.below.meets) == (5, 4, False)  # two of "kv" stay unseen


def test_a_replay_that_differs_from_itself_is_an_error() -> None:
    fake = Unsteady({worker(): 1250.0})
    with pytest.raises(KvistError, match="not the same twice"):
        plan(list(fake.work), TARGET, Prices(), fake)


@pytest.mark.slow
def test_a_plan_for_the_conversation_trace_is_confirmed(public_traces: Path) -> None:
    trace = read_trace(public_traces / "conversation_trace.jsonl")
    target = Target(sla=Sla(ttft_ms=2000, itl_ms=25))
    candidates = [Setup(cluster=ClusterConfig(router=router)) for router in ("round_robin", "kv")]
    with local(trace) as replay_all:
        found = plan(candidates, target, Prices(), replay_all)
        assert found.answer is not None
        assert found.below is not None
        again = replay_all([found.answer.setup, found.below.setup])
    assert again[0].figures == found.answer.figures
    assert target.excess(again[0].figures) <= 1 < target.excess(again[1].figures)
    assert found.below.workers == found.answer.workers - 1
