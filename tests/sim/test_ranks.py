"""Ranks that pass together; `test_golden` has the figures of the real NVIDIA Dynamo."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.sim.cluster import Arrivals, RoundRobin, run
from kvist.sim.config import EngineConfig
from kvist.sim.pool import SlotPool
from kvist.sim.ranks import Ranks
from kvist.sim.requests import NEVER, Requests
from kvist.sim.scheduler import Scheduler
from kvist.sim.timing import Fixed

from .test_scheduler import MS, Rows, clock_of, columns, contents_of, engines, served, workloads


def together(rows: Rows, engine: EngineConfig, size: int, jump: int = 4096) -> tuple[Requests, list[Scheduler], int]:
    requests = columns(rows, engine)
    contents = 2 * sum(len(blocks) for blocks in contents_of(rows, engine.block_size))
    ranks = [
        Scheduler(
            engine, requests, SlotPool(engine.num_blocks, contents), clock_of(engine), worker=rank, longest_jump=jump
        )
        for rank in range(size)
    ]
    arrivals = Arrivals([row[0] for row in rows], [-1] * len(rows), [0] * len(rows), None)
    end = run(requests, [Ranks(requests, ranks)], RoundRobin(1, size), arrivals, ranks=size)
    return requests, ranks, end


@settings(max_examples=60)
@given(engines(), workloads())
def test_one_rank_is_an_engine(engine: EngineConfig, rows: Rows) -> None:
    alone, _, end = served(rows, engine)
    requests, _, other = together(rows, engine, 1)
    requests.blocks = alone.blocks
    assert (requests, other) == (alone, end)


@settings(max_examples=100)
@given(engines(), workloads(), st.integers(2, 3), st.integers(1, 9))
def test_how_long_a_jump_may_be_shows_nowhere(engine: EngineConfig, rows: Rows, size: int, jump: int) -> None:
    requests, ranks, end = together(rows, engine, size)
    again, short, other = together(rows, engine, size, jump)
    again.blocks = requests.blocks
    assert (again, other) == (requests, end)
    assert all(rank.is_idle and not rank.pool.num_used for rank in ranks)
    assert [rank.passes for rank in short] == [rank.passes for rank in ranks]
    assert all(at != NEVER for row, at in enumerate(again.last_token) if again.generated[row])


def test_a_pass_lasts_as_long_as_the_slowest_ranks() -> None:
    engine = EngineConfig(num_blocks=100, block_size=4, timing=Fixed(10.0, 1.0))
    requests, ranks, _ = together([(0, 4, 20, 0, 0), (12 * MS + 1, 4, 2, 1, 0)], engine, 2)
    assert requests.worker == [0, 1]
    # The prompt of the second rank begins with the next pass, at 13 ms, and slows the first one's token.
    assert requests.admitted[1] == 13 * MS
    assert requests.first_token[1] == 23 * MS
    assert requests.second_token[1] == 24 * MS
    assert requests.last_token[0] == (10 + 3 + 10 + 15) * MS
    assert [rank.busy for rank in ranks] == [38 * MS, 11 * MS]
