"""Who follows a mock's events knows its pool: kvist's own index, and NVIDIA Dynamo's selection service."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from kvist.hashing import local_block_hashes
from kvist.router.feed import FeedState
from kvist.router.index import Index
from kvist.router.subscribe import Subscriber
from router.dynamo_child import Dynamo

from .conftest import SIZE, Mock

WORKERS = 3
SMALL: dict[str, Any] = {"num_blocks": 64, "max_model_len": 1024, "speedup": 20.0}


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of which many share a beginning."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    for _ in range(count):
        start = rng.choice(made)[: rng.randint(0, 200)] if made and rng.random() < 0.7 else []
        made.append([*start, *(rng.randrange(50_000) for _ in range(rng.randint(1, 150)))])
    return made


def serve_all(mocks: list[Mock], work: list[list[int]], seed: int) -> None:
    """Let every prompt be answered by one of the workers, many at once."""
    rng = random.Random(seed)
    jobs = [(rng.choice(mocks), prompt, rng.randint(1, 80)) for prompt in work]
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda job: job[0].complete(job[1], max_tokens=job[2]), jobs))


@pytest.fixture
def mocks(start: Callable[..., list[Mock]]) -> list[Mock]:
    return start(WORKERS, **SMALL)


@pytest.fixture
def dynamo() -> Iterator[Dynamo]:
    with Dynamo() as dynamo:
        yield dynamo


def test_kvists_index_and_dynamos_service_know_what_the_pools_hold(mocks: list[Mock], dynamo: Dynamo) -> None:
    workers = [
        {
            "worker_id": number,
            "model_name": "mock",
            "endpoint": mock.url,
            "block_size": SIZE,
            "data_parallel_start_rank": 0,
            "data_parallel_size": 1,
            "kv_events_endpoints": {0: mock.about["kv_events_endpoint"]},
            "replay_endpoint": mock.about["kv_replay_endpoint"],
        }
        for number, mock in enumerate(mocks)
    ]
    with ExitStack() as stack:
        subscriber = stack.enter_context(Subscriber(Index(), replay_timeout_s=60))
        for number, mock in enumerate(mocks):
            endpoints = mock.about["kv_events_endpoint"], mock.about["kv_replay_endpoint"]
            subscriber.follow(number, *endpoints, block_size=SIZE)
        serve_all(mocks, prompts(60, 0), 0)
        dynamo("service_start", workers)  # late: what it missed it asks for
        work = prompts(400, 1)
        serve_all(mocks, work[:200], 1)
        assert_dynamo_agrees(dynamo, mocks, work[:200])
        serve_all(mocks, work[200:], 2)
        assert_dynamo_agrees(dynamo, mocks, work)
        for number, mock in enumerate(mocks):
            published = mock.cluster.workers[number].publisher.stats
            assert published.batches > 100
            assert subscriber.wait(number, published.batches - 1)
            assert subscriber.stats(number).state is FeedState.CURRENT
            assert subscriber.stats(number).refused == 0
        with subscriber.reading() as index:
            assert max(index.num_blocks(number) for number in range(WORKERS)) <= SMALL["num_blocks"]
            for prompt in work:
                found = index.find(local_block_hashes(prompt, SIZE))
                assert [found[n, 0].device if (n, 0) in found else 0 for n in range(WORKERS)] == held(mocks, prompt)
        assert sum(mock.metrics()["vllm:num_preemptions_total{}"] for mock in mocks) > 0, "it was too easy"


def held(mocks: list[Mock], prompt: list[int]) -> list[int]:
    """At rest: nothing runs on the engines' loop."""
    return [mock.engine.num_held(prompt) for mock in mocks]


def assert_dynamo_agrees(dynamo: Dynamo, mocks: list[Mock], work: list[list[int]]) -> None:
    requests = [{"model_name": "mock", "token_ids": prompt} for prompt in work]
    expected = [held(mocks, prompt) for prompt in work]
    assert sum(map(sum, expected)) > 100
    end = time.monotonic() + 30
    while True:
        answers = dynamo("service_overlaps", requests)
        said = [
            [
                next((one["device_blocks"] for one in answer if one["worker_id"] == number), 0)
                for number in range(WORKERS)
            ]
            for answer in answers
        ]
        if said == expected:
            return
        assert time.monotonic() < end, [pair for pair in zip(said, expected, strict=True) if pair[0] != pair[1]][:5]
        time.sleep(0.1)
