"""NVIDIA Dynamo's own radix tree follows our events over JSON, and ends with what the workers hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from msgspec import structs

from kvist.blocks import BlockManager, Deref, FullBlock, Use
from kvist.blocks.events import Cleared, Event, Removed, Stored, Tier
from kvist.hashing import local_block_hashes
from kvist.router.index import Index
from kvist.router.wire.dynamo import decode_router_event, encode_event

from .dynamo_child import Dynamo
from .workload import BLOCK_SIZE, RUNS, Held, Worker, Workload, held_of

POOLS = [(1, 0, "watermark"), (2, 0, "blocking"), (2, 1, "none")]


@pytest.fixture
def dynamo() -> Iterator[Dynamo]:
    with Dynamo() as dynamo:
        yield dynamo


@pytest.mark.parametrize(("seed", "moves"), RUNS)
def test_the_tree_holds_what_the_devices_hold(dynamo: Dynamo, seed: int, moves: int) -> None:
    """Its JSON has no tiers: events of tiers below the device go to our index alone."""
    index = Index()
    kinds: set[type] = set()

    def publish(worker: Worker, events: Sequence[Event]) -> None:
        for event in events:
            index.apply(worker.worker, event)
        told = [event for event in events if event.tier is Tier.DEVICE]
        kinds.update(type(event.data) for event in told)
        assert dynamo("tree_apply", worker.worker, [encode_event(event).decode() for event in told]) == []

    workload = Workload(POOLS, publish, seed)
    workload.run(moves // 2)
    workload.clear(2)
    workload.run(moves)
    assert kinds == {Stored, Removed, Cleared}
    assert all(workload.counts[tier, kind] > 1000 for tier, kind in workload.counts)
    held = workload.held
    theirs: dict[tuple[int, int], Held] = {pool[:2]: {} for pool in POOLS}
    copy = Index()
    for line in dynamo("tree_dump"):
        worker, event = decode_router_event(line.encode())
        theirs[worker, event.dp_rank].update(held_of(event))
        copy.apply(worker, event)
    for (worker, rank), blocks in theirs.items():
        assert blocks == held[worker, rank, Tier.DEVICE]
        assert blocks.keys() == index.hashes_of(worker, rank)
    queries = [local_block_hashes(text, BLOCK_SIZE) for text in workload.texts]
    for query, scores in zip(queries, dynamo("tree_find", queries), strict=True):
        ours = {pool: overlap.device for pool, overlap in index.find(query).items() if overlap.device}
        assert {(worker, rank): depth for worker, rank, depth in scores} == ours
        assert {pool: overlap.device for pool, overlap in copy.find(query).items()} == ours


def test_cleared_is_of_one_rank_of_one_worker(dynamo: Dynamo) -> None:
    stored = Event(0, Stored([7, 8], None, [1, 2]))
    pools = {(1, 0), (1, 1), (2, 0)}
    index = Index()

    def tell(worker: int, event: Event) -> None:
        index.apply(worker, event)
        dynamo("tree_apply", worker, [encode_event(event).decode()])

    for worker, rank in pools:
        tell(worker, structs.replace(stored, dp_rank=rank))
    tell(1, Event(1, Cleared(), dp_rank=1))
    left = {(worker, rank): depth for worker, rank, depth in dynamo("tree_find", [[1, 2]])[0]}
    assert left == {(1, 0): 2, (2, 0): 2}
    assert {pool: overlap.device for pool, overlap in index.find([1, 2]).items()} == left


def test_a_block_with_two_names_is_gone_when_it_is_evicted(dynamo: Dynamo) -> None:
    """The tree keeps the first name alone: it needs that one in Removed, and complains of the other."""
    events: list[Event] = []
    manager = BlockManager(2, 1, events=events.append)
    for name in (100, 200):
        block = FullBlock(name)
        manager.process(Use([block], [7], lineage=[(1, None)]))
        manager.process(Deref([block]))
    assert dynamo("tree_apply", 1, [encode_event(event).decode() for event in events]) == []
    assert dynamo("tree_find", [[7]]) == [[[1, 0, 1]]]
    events.clear()
    manager.process(Use([FullBlock(301), FullBlock(302)], [8, 9]))
    errors = dynamo("tree_apply", 1, [encode_event(event).decode() for event in events])
    assert errors == ["Failed to apply event: Failed to find block"]
    assert dynamo("tree_find", [[7], [8, 9]]) == [[], [[1, 0, 2]]]
