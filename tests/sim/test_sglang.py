"""The radix cache, and the scheduler over it: jumps change nothing, nothing leaks, who is retracted, who goes first."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import InvalidInput, PoolExhausted
from kvist.sim.cluster import Arrivals, RoundRobin, run
from kvist.sim.config import EngineConfig, SglangOptions
from kvist.sim.radix import RadixCache
from kvist.sim.requests import Requests
from kvist.sim.sglang import RadixScheduler
from kvist.sim.timing import Clock

# The radix cache.


def tree_of(*chains: list[int], pages: int = 100) -> RadixCache:
    """A cache that holds these chains, each used later than the one before it, and nobody uses now."""
    tree = RadixCache(pages, tell=True)
    for now, chain in enumerate(chains):
        held, node = tree.lock(chain, len(chain), 10 * now)
        assert tree.take(len(chain) - held)
        tree.hold(end := tree.insert(node, chain[held:], 10 * now + 1) if held < len(chain) else node)
        tree.drop(node)
        tree.drop(end)
    return tree


def test_a_prefix_is_matched_within_an_edge() -> None:
    tree = tree_of([1, 2, 3, 4, 5])
    assert tree.match([1, 2, 3, 9, 10], 5) == 3
    assert tree.match([1, 2, 3, 4, 5], 2) == 2
    assert tree.match([7], 1) == 0


def test_a_branch_shares_the_pages_before_it() -> None:
    tree = tree_of([1, 2, 3], [1, 2, 8, 9])
    assert (tree.num_blank, tree.num_evictable, tree.num_used) == (95, 5, 0)
    assert tree.match([1, 2, 8, 9], 4) == 4


def test_leaves_go_first_the_oldest_from_its_end() -> None:
    tree = tree_of([1, 2, 3], [1, 2, 8, 9], [5], pages=10)
    tree.moves.clear()
    assert tree.take(8)
    assert [list(contents) for stored, contents, _ in tree.moves if not stored] == [[3], [8, 9], [1, 2][1:]]
    assert tree.match([1], 1) == 1
    assert tree.match([5], 1) == 1


def test_what_is_locked_stays() -> None:
    tree = tree_of([1, 2, 3], [4, 5], pages=5)
    tree.lock([1, 2, 9], 3, 99)
    assert tree.num_used == 2
    assert not tree.take(4)
    assert tree.num_blank == 3, "what could be evicted is"
    assert tree.match([1, 2, 3], 3) == 2


def test_pages_computed_twice_are_blank_again() -> None:
    tree = RadixCache(10)
    assert tree.take(6)
    for now in (1, 2):
        _, root = tree.lock([], 0, now)
        tree.insert(root, [1, 2, 3], now)
    assert (tree.num_blank, tree.num_evictable) == (7, 3)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12))
def test_it_knows_all_that_it_was_given(words: list[list[int]]) -> None:
    numbers: dict[tuple[int, ...], int] = {}
    chains = [[numbers.setdefault(tuple(word[: i + 1]), len(numbers)) for i in range(len(word))] for word in words]
    tree = tree_of(*chains)
    for chain in chains:
        assert tree.match(chain, len(chain)) == len(chain)
    assert tree.num_blank == 100 - len(numbers)
    assert tree.num_evictable == len(numbers)
    assert tree.take(100)


# The scheduler.

SIZE = 4


@dataclass(frozen=True)
class Job:
    arrival: int  # ms
    prompt: int
    output: int
    family: int
    shared: int  # full pages that it has in common with its family


JOBS = st.lists(
    st.builds(Job, st.integers(0, 400), st.integers(1, 40), st.integers(1, 24), st.integers(0, 2), st.integers(0, 10)),
    min_size=1,
    max_size=12,
)
OPTIONS = st.builds(
    SglangOptions,
    schedule_policy=st.sampled_from(["fifo", "lpm"]),
    chunked_prefill_size=st.sampled_from([12, 32]),
    clip_max_new_tokens=st.just(24),
    schedule_conservativeness=st.sampled_from([0.1, 1.0]),
)


def engine_of(**others: Any) -> EngineConfig:
    return EngineConfig(**{"scheduling": "sglang", "block_size": SIZE, "num_blocks": 26, **others})


def served(jobs: list[Job], engine: EngineConfig, longest_jump: int = 4096) -> tuple[Requests, RadixScheduler]:
    requests = Requests()
    for number, job in enumerate(jobs):
        pages = job.prompt // SIZE
        shared = min(job.shared, pages)
        blocks = [100 * job.family + i for i in range(shared)] + [1000 * (number + 1) + i for i in range(shared, pages)]
        requests.add(job.prompt, job.output, np.array(blocks, dtype=np.int64), 1000 * (number + 1) + 500)
    clock = Clock(engine.timing, engine.capacity_tokens)
    worker = RadixScheduler(engine, requests, RadixCache(engine.num_blocks), clock, longest_jump=longest_jump)
    times = [job.arrival * 1_000_000 + number for number, job in enumerate(jobs)]
    run(requests, [worker], RoundRobin(1), Arrivals(times, [-1] * len(jobs), [0] * len(jobs), None))
    return requests, worker


@settings(max_examples=150, deadline=None)
@given(JOBS, OPTIONS, st.booleans(), st.sampled_from([2, 256]))
def test_jumps_change_nothing(jobs: list[Job], options: SglangOptions, caching: bool, seats: int) -> None:
    engine = engine_of(sglang=options, prefix_caching=caching, max_num_seqs=seats)
    try:
        stepped, one = served(jobs, engine, longest_jump=1)
    except PoolExhausted:
        with pytest.raises(PoolExhausted):
            served(jobs, engine)
        return
    jumped, other = served(jobs, engine)
    assert columns(jumped) == columns(stepped)
    assert (other.passes, other.busy, other.pool.num_evicted) == (one.passes, one.busy, one.pool.num_evicted)
    assert histogram(other) == histogram(one)
    assert jumped.generated == jumped.output_tokens
    assert other.is_idle
    assert other.pool.num_used == 0
    assert other.pool.num_free == engine.num_blocks
    assert bool(other.pool.num_evictable) <= caching
    spans = (last - first for first, last in zip(jumped.first_token, jumped.last_token, strict=True))
    assert sum(gap * count for gap, count in histogram(other).items()) == sum(spans)


def test_who_is_retracted_before_its_token_found_a_place_keeps_the_time_of_its_last() -> None:
    hopeful = SglangOptions(schedule_conservativeness=0.1)
    jobs = [Job(0, 2, 12, 0, 0), *(Job(0, 1, 1, 1, 0) for _ in range(3)), Job(48, 14, 12, 2, 0)]
    requests, worker = served(jobs, engine_of(num_blocks=10, max_num_seqs=2, sglang=hopeful))
    assert requests.admissions[0] > 1
    spans = (last - first for first, last in zip(requests.first_token, requests.last_token, strict=True))
    assert sum(gap * count for gap, count in histogram(worker).items()) == sum(spans)


def test_prompts_in_parts_give_way_to_what_runs_alone() -> None:
    hopeful = SglangOptions(schedule_conservativeness=0.01, chunked_prefill_size=12)
    jobs = [Job(0, 8, 40, 0, 0), Job(60, 40, 8, 1, 0)]
    requests, worker = served(jobs, engine_of(num_blocks=14, sglang=hopeful))
    assert requests.generated == [40, 8]
    assert requests.admissions == [1, 2]
    assert worker.pool.num_used == 0


def columns(requests: Requests) -> dict[str, list[Any]]:
    return {each.name: getattr(requests, each.name) for each in fields(requests) if each.name != "blocks"}


def histogram(worker: RadixScheduler) -> dict[int, int]:
    found: dict[int, int] = {}
    for gaps, count in worker.gaps:
        for gap in gaps.tolist():
            found[gap] = found.get(gap, 0) + count
    return found


def test_gaps_are_as_many_as_tokens_after_the_first() -> None:
    jobs = [Job(20 * i, 10 + 3 * i, 1 + 4 * i, 0, i) for i in range(6)]
    requests, worker = served(jobs, engine_of())
    assert sum(histogram(worker).values()) == sum(requests.generated) - len(jobs)
    spans = (last - first for first, last in zip(requests.first_token, requests.last_token, strict=True))
    assert sum(gap * count for gap, count in histogram(worker).items()) == sum(spans)


def test_running_sequences_stand_still_while_prompts_are_computed() -> None:
    requests, worker = served([Job(0, 4, 20, 0, 0), Job(30, 30, 1, 1, 0)], engine_of())
    assert requests.first_token[1] - requests.admitted[1] == worker._clock.prefill_ns(30)


def test_the_sequence_with_the_fewest_tokens_is_retracted() -> None:
    hopeful = SglangOptions(schedule_conservativeness=0.01)
    jobs = [Job(0, 20, 40, 0, 0), Job(60, 20, 40, 1, 0), Job(90, 20, 40, 2, 0)]
    requests, _ = served(jobs, engine_of(num_blocks=38, sglang=hopeful))
    assert requests.admissions == [1, 1, 2]
    assert requests.generated == [40, 40, 40]
    assert requests.reused[2] > requests.first_reused[2], "it finds what it had computed itself"


def test_the_longest_cached_prefix_goes_first() -> None:
    jobs = [Job(0, 32, 2, 0, 8), Job(100, 12, 20, 1, 0), Job(101, 20, 1, 2, 0), Job(102, 32, 1, 0, 8)]
    for policy, order in (("fifo", [2, 3]), ("lpm", [3, 2])):
        engine = engine_of(max_num_seqs=1, sglang=SglangOptions(schedule_policy=policy))
        requests, _ = served(jobs, engine)
        assert sorted((2, 3), key=lambda each: requests.admitted[each]) == order


def test_a_prompt_that_can_not_fit_says_so() -> None:
    with pytest.raises(PoolExhausted, match="request 0 needs more pages than the 26 of 26"):
        served([Job(0, 120, 4, 0, 0)], engine_of())


def test_what_a_gone_client_had_is_free() -> None:
    requests = Requests()
    for number in range(3):
        requests.add(30, 20, np.arange(100 * number, 100 * number + 7), 100 * number + 50)
    engine = engine_of(num_blocks=26, sglang=SglangOptions(chunked_prefill_size=16))
    worker = RadixScheduler(engine, requests, RadixCache(26), Clock(engine.timing, engine.capacity_tokens))
    now = 0
    for request in range(3):
        worker.submit(request, now)
    for step in range(40):
        worker.step()
        worker.begin(now)
        if step in (1, 7):
            for request in (2, 0) if step == 1 else (1,):
                worker.abort(request, now)
        now = worker.wake or now
    assert worker.is_idle
    assert worker.pool.num_used == 0


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInput, match="schedule_policy must be one of fifo, lpm; got 'lifo'"):
        SglangOptions(schedule_policy="lifo")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"chunked_prefill_size must be a whole number, 1 to .*; got 0"):
        SglangOptions(chunked_prefill_size=0)
