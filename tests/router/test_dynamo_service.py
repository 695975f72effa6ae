"""NVIDIA Dynamo's own selection service follows our streams through loss, and ends with what the workers hold."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

pytest.importorskip("zmq", reason="ZeroMQ is not installed: pip install 'kvist[router]'")

from kvist.blocks.events import Event, Removed, Stored, Tier
from kvist.hashing import local_block_hashes, sequence_hashes
from kvist.router.feed import FeedState
from kvist.router.index import Index
from kvist.router.publish import Publisher
from kvist.router.subscribe import Subscriber
from kvist.router.wire.dynamo import decode_router_event

from .dynamo_child import Dynamo
from .workload import BLOCK_SIZE, RUNS, Held, Place, Worker, Workload, held_of

POOLS = [(1, 0, "watermark"), (2, 0, "blocking"), (3, 1, "watermark")]
MODEL = "m"
PROBE = Stored([1 << 63], None, token_ids=[[1] * BLOCK_SIZE])
END_PROBE = Removed([1 << 63])


class Lossy(Publisher):
    """Keeps all batches and leaves out some."""

    lost: range = range(0)

    def _send(self, frames: list[bytes]) -> None:
        if int.from_bytes(frames[1], "big") not in self.lost:
            super()._send(frames)


@pytest.fixture
def dynamo() -> Iterator[Dynamo]:
    with Dynamo() as dynamo:
        yield dynamo


def theirs(dynamo: Dynamo) -> dict[Place, Held]:
    """All blocks that the service knows."""
    found: dict[Place, Held] = {(worker, rank, tier): {} for worker, rank, _ in POOLS for tier in Tier}
    for line in dynamo("service_snapshot"):
        worker, event = decode_router_event(line.encode())
        found[worker, event.dp_rank, event.tier].update(held_of(event))
    return found


@pytest.mark.parametrize(("seed", "moves"), RUNS)
def test_the_service_sees_what_the_workers_hold(dynamo: Dynamo, seed: int, moves: int) -> None:
    with ExitStack() as stack:
        publishers = {
            worker: stack.enter_context(Lossy(block_size=BLOCK_SIZE, dp_rank=rank)) for worker, rank, _ in POOLS
        }
        subscriber = stack.enter_context(Subscriber(Index(), replay_timeout_s=60))
        for worker, rank, _ in POOLS:
            where = publishers[worker].endpoint, publishers[worker].replay_endpoint
            subscriber.follow(worker, *where, dp_rank=rank)
        dynamo(
            "service_start",
            [
                {
                    "worker_id": worker,
                    "model_name": MODEL,
                    "endpoint": "http://127.0.0.1:1",
                    "block_size": BLOCK_SIZE,
                    "data_parallel_start_rank": rank,
                    "data_parallel_size": 1,
                    "kv_events_endpoints": {rank: publishers[worker].endpoint},
                    "replay_endpoint": publishers[worker].replay_endpoint,
                }
                for worker, rank, _ in POOLS
            ],
        )
        for worker, rank, _ in POOLS:
            until_it_hears(dynamo, publishers[worker], (worker, rank, Tier.DEVICE))

        def publish(worker: Worker, events: Sequence[Event]) -> None:
            publisher = publishers[worker.worker]
            done = publisher.stats.batches
            if done % 300 == 0 and not publisher.lost:
                publisher.lost = range(done, done + 20 * worker.worker)
            elif done == publisher.lost.stop:
                publisher.lost = range(0)
            publisher.publish(events)

        workload = Workload(POOLS, publish, seed)
        workload.run(moves // 2)
        workload.clear(0)
        workload.run(moves)
        for publisher in publishers.values():
            publisher.lost = range(0)
            assert publisher.stats.batches > 600
        workload.rest()
        for worker, rank, _ in POOLS:
            publishers[worker].publish([Event(0, END_PROBE, dp_rank=rank)])

        held = workload.held
        end = time.monotonic() + 20
        while (known := theirs(dynamo)) != held and time.monotonic() < end:
            time.sleep(0.1)
        assert known == held
        assert all(count > 1000 for count in workload.counts.values())
        for worker, rank, _ in POOLS:
            published = publishers[worker].stats
            assert subscriber.wait(worker, published.batches - 1, dp_rank=rank)
            stats = subscriber.stats(worker, rank)
            assert (stats.state, stats.resyncs, stats.refused) == (FeedState.CURRENT, 0, 0)
            assert stats.gaps >= 2, "ours lost some, too"
            assert published.replays - stats.replays >= 2, "the service asked for what it lost"

        with subscriber.reading() as index:
            for (worker, rank, tier), blocks in held.items():
                assert index.hashes_of(worker, rank, tier) == blocks.keys()
            compare_overlaps(dynamo, index, [text for text in workload.texts if len(text) >= BLOCK_SIZE])


def compare_overlaps(dynamo: Dynamo, index: Index, texts: list[list[int]]) -> None:
    """What the service calls disk is all below host memory.

    It goes from tier to tier, and never up again, where ours takes each block from the best tier that has it: for a
    block on disk whose successor is in host memory, ours reaches farther.
    """
    answers = dynamo("service_overlaps", [{"model_name": MODEL, "token_ids": text} for text in texts])
    tiers = {pool[:2]: [index.hashes_of(*pool[:2], tier) for tier in Tier] for pool in POOLS}
    found_some = farther = 0
    for text, answer in zip(texts, answers, strict=True):
        said = {
            (each["worker_id"], each["dp_rank"]): reach
            for each in answer
            if any(reach := (each["device_blocks"], each["host_pinned_blocks"], each["disk_blocks"]))
        }
        local_hashes = local_block_hashes(text, BLOCK_SIZE)
        found = index.find(local_hashes)
        assert said.keys() == found.keys()
        for pool, overlap in found.items():
            ours = overlap.device, overlap.host, overlap.external
            if said[pool] != ours:
                assert said[pool] == going_down(sequence_hashes(local_hashes), tiers[pool])
                assert said[pool][:2] == ours[:2]
                assert said[pool][2] < ours[2]
                farther += 1
        found_some += len(found)
    assert found_some > 300
    assert farther < found_some // 20


def going_down(names: list[int], tiers: list[frozenset[int]]) -> tuple[int, int, int]:
    """How far each tier reaches, by the service's rule."""
    depth = 0
    reach = []
    for held in tiers:
        while depth < len(names) and names[depth] in held:
            depth += 1
        reach.append(depth)
    return reach[0], reach[1], reach[3]


def until_it_hears(dynamo: Dynamo, publisher: Publisher, place: Place) -> None:
    """Return when the service is connected."""
    end = time.monotonic() + 20
    while not theirs(dynamo)[place]:
        assert time.monotonic() < end, "the service does not listen"
        publisher.publish([Event(0, PROBE, dp_rank=place[1])])
        time.sleep(0.05)
