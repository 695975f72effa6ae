"""The selector beside NVIDIA Dynamo's selection service, which hears of the same blocks and requests."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

pytest.importorskip("zmq", reason="ZeroMQ is not installed: pip install 'kvist[router]'")

from kvist.blocks.events import Event, Stored, Tier
from kvist.hashing import local_block_hashes, sequence_hashes
from kvist.router.index import Index, Overlap, Pool
from kvist.router.publish import Publisher
from kvist.router.score import Candidate, Selector, credit

from .dynamo_child import Dynamo

BLOCK_SIZE = 4
TOKENS = list(range(100, 100 + 24 * BLOCK_SIZE))
WORKERS = {  # blocks of the text in each tier, one after the other
    1: (6, 3, 3, 4),
    2: (0, 0, 0, 16),
    3: (4, 0, 0, 8),
    4: (0, 2, 9, 1),
    5: (0, 0, 16, 0),
    6: (0, 0, 0, 0),
}
MODEL = "m"


@pytest.fixture
def dynamo() -> Iterator[Dynamo]:
    with Dynamo() as dynamo:
        yield dynamo


def stored(counts: tuple[int, ...]) -> list[Event]:
    """What a worker tells of its blocks."""
    local_hashes = local_block_hashes(TOKENS, BLOCK_SIZE)
    names = sequence_hashes(local_hashes)
    tokens = [TOKENS[start : start + BLOCK_SIZE] for start in range(0, len(TOKENS), BLOCK_SIZE)]
    tiers = [tier for tier, count in zip(Tier, counts, strict=True) for _ in range(count)]
    return [
        Event(i, Stored([names[i]], names[i - 1] if i else None, [local_hashes[i]], [tokens[i]]), tier)
        for i, tier in enumerate(tiers)
    ]


def test_loads_and_choices_are_the_services(dynamo: Dynamo) -> None:
    index = Index()
    selector = Selector(BLOCK_SIZE)
    with ExitStack() as stack:
        publishers = {worker: stack.enter_context(Publisher(block_size=BLOCK_SIZE)) for worker in WORKERS}
        dynamo(
            "service_start",
            [
                {
                    "worker_id": worker,
                    "model_name": MODEL,
                    "endpoint": "http://127.0.0.1:1",
                    "block_size": BLOCK_SIZE,
                    "kv_events_endpoints": {0: publisher.endpoint},
                }
                for worker, publisher in publishers.items()
            ],
        )
        for worker, counts in WORKERS.items():
            index.add_worker(worker)
            selector.add_pool((worker, 0))
            for event in stored(counts):
                index.apply(worker, event)
        tell_until_known(dynamo, publishers)

    rng = random.Random(0)
    running: list[str] = []
    chosen = set()
    for number in range(120):
        tokens = TOKENS[: rng.randint(0, len(TOKENS))] + [1000 * number + i for i in range(rng.randint(1, 30))]
        asked = {"model_name": MODEL, "token_ids": tokens}
        local_hashes = local_block_hashes(tokens, BLOCK_SIZE)
        hashes = sequence_hashes(local_hashes)
        overlaps = index.find(local_hashes)

        def candidate(
            worker: int, overlaps: dict[Pool, Overlap] = overlaps, size: int = len(tokens), hashes: list[int] = hashes
        ) -> Candidate:
            overlap = overlaps.get((worker, 0), Overlap(0, 0, 0, 0))
            return selector.candidate((worker, 0), overlap, tokens=size, hashes=hashes)

        loads = dynamo("service_call", "potential_loads", asked)
        assert {load["worker_id"] for load in loads} == WORKERS.keys()
        for load in loads:
            ours = candidate(load["worker_id"])
            waiting = ours.waiting_tokens + len(tokens) - credit(selector.config, ours.overlap) * BLOCK_SIZE
            assert load["potential_prefill_tokens"] == waiting
            assert load["active_requests"] == ours.requests
            # A last block that is not full is left out here, and counts where select compares.
            assert load["potential_decode_blocks"] == ours.held_blocks - bool(len(tokens) % BLOCK_SIZE)

        choice = selector.select(overlaps, tokens=len(tokens), hashes=hashes)
        theirs = dynamo("service_call", "select_and_reserve", asked | {"selection_id": str(number)})
        worker = theirs["worker_id"]
        assert choice.costs[worker, 0] == choice.cost
        assert theirs["potential_decode_blocks"] == candidate(worker).held_blocks
        before = candidate(worker).waiting_tokens
        selector.start(str(number), (worker, 0), tokens=len(tokens), overlap=candidate(worker).overlap, hashes=hashes)
        assert theirs["effective_prefill_tokens"] == candidate(worker).waiting_tokens - before
        chosen.add(worker)
        running.append(str(number))
        if rng.random() < 0.5:
            request = rng.choice(running)
            dynamo("service_call", "prefill_complete", request)
            selector.first_token(request)
        if len(running) > 8:
            request = running.pop(rng.randrange(len(running)))
            dynamo("service_call", "free_reservation", request)
            selector.finish(request)
    assert chosen == WORKERS.keys()


def tell_until_known(dynamo: Dynamo, publishers: dict[int, Publisher]) -> None:
    """Return when the service has all that the workers tell; what was told before it listened is lost to it."""
    expected = {worker: (counts[0], sum(counts[:2]), sum(counts)) for worker, counts in WORKERS.items()}
    end = time.monotonic() + 20
    while True:
        (answer,) = dynamo("service_overlaps", [{"model_name": MODEL, "token_ids": TOKENS}])
        known = {
            each["worker_id"]: (each["device_blocks"], each["host_pinned_blocks"], each["disk_blocks"])
            for each in answer
        }
        if known == expected:
            return
        assert time.monotonic() < end, f"the service knows of {known}"
        for worker, publisher in publishers.items():
            if known.get(worker) != expected[worker]:
                publisher.publish(stored(WORKERS[worker]))
        time.sleep(0.1)
