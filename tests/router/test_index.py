"""The index, against plain dicts and by example."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored, Tier
from kvist.errors import AlreadyExists, InvalidInput, KvistError, NotFound
from kvist.router.index import Index, Overlap
from kvist.testing.index import IndexMachine, OrphanMachine, check_index

TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestOrphanMachine = OrphanMachine.TestCase
TestOrphanMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [IndexMachine, OrphanMachine])
def test_long_runs(machine: type[IndexMachine]) -> None:
    case = machine.TestCase()
    case.settings = settings(
        max_examples=200, stateful_step_count=2000, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case.runTest()


def event(data: EventData, tier: Tier = Tier.DEVICE, dp_rank: int = 0) -> Event:
    return Event(0, data, tier, dp_rank)


def index_of(*stored: tuple[str, Stored]) -> Index:
    index = Index()
    for worker, data in stored:
        index.apply(worker, event(data))
    return index


def test_an_empty_index() -> None:
    index = Index()
    assert index.find([]) == index.find([1]) == {}
    assert index.pools == ()
    index.add_worker("a")
    assert index.find([1]) == {}
    assert index.num_blocks("a") == 0
    assert index.events_of("a") == []
    index.apply("a", event(Stored([])))
    index.apply("a", event(Removed([])))
    index.apply("b", event(Cleared()))
    assert index.pools == (("a", 0), ("b", 0))


def test_workers_and_ranks_are_told_apart() -> None:
    index = index_of(("a", Stored([1, 2, 3], None, [11, 12, 13])), ("b", Stored([7, 8], None, [11, 12])))
    index.apply("a", event(Stored([1], None, [11]), dp_rank=1))
    assert index.find([11, 12, 99]) == {
        ("a", 0): Overlap(2, 2, 2, 2),
        ("a", 1): Overlap(1, 1, 1, 1),
        ("b", 0): Overlap(2, 2, 2, 2),
    }
    index.apply("a", event(Cleared()))
    assert index.find((11,)) == {("a", 1): Overlap(1, 1, 1, 1), ("b", 0): Overlap(1, 1, 1, 1)}
    index.remove_worker("a")
    assert index.pools == (("b", 0),)


def test_slower_tiers_reach_on_from_faster_ones() -> None:
    index = index_of(("a", Stored([1, 2], None, [11, 12])))
    index.apply("a", event(Stored([30, 40], 2, [13, 14]), Tier.HOST))
    index.apply("a", event(Stored([5], 40, [15]), Tier.DISK))
    index.apply("a", event(Stored([6], 5, [16]), Tier.EXTERNAL))
    prompt = [11, 12, 13, 14, 15, 16]
    assert index.find(prompt) == {("a", 0): Overlap(2, 4, 5, 6)}
    index.apply("a", event(Stored([1], None, [11]), Tier.HOST))
    index.apply("a", event(Removed([1])))
    assert index.find(prompt) == {("a", 0): Overlap(0, 4, 5, 6)}
    index.apply("a", event(Removed([1]), Tier.HOST))
    assert index.find(prompt) == {}
    assert index.hashes_of("a", tier=Tier.HOST) == {30, 40}


def test_a_clear_empties_all_tiers() -> None:
    index = index_of(("a", Stored([1], None, [11])))
    index.apply("a", event(Stored([1], None, [11]), Tier.HOST))
    index.apply("a", event(Cleared()))
    assert index.find([11]) == {}
    check_index(index)


def test_a_block_that_comes_back_leads_to_those_that_stayed() -> None:
    index = index_of(("a", Stored([1, 2, 3], None, [11, 12, 13])))
    index.apply("a", event(Removed([2])))
    assert index.find([11, 12, 13]) == {("a", 0): Overlap(1, 1, 1, 1)}
    told = index.events_of("a")
    index.apply("a", event(Stored([2], 1, [12])))
    assert index.find([11, 12, 13]) == {("a", 0): Overlap(3, 3, 3, 3)}
    other = Index()
    for each in told:
        other.apply("a", each)
    other.apply("a", event(Stored([2], 1, [12])))
    assert other.find([11, 12, 13]) == {("a", 0): Overlap(3, 3, 3, 3)}


def test_a_block_with_two_names_stays_until_both_are_gone() -> None:
    index = index_of(("a", Stored([1, 2], None, [11, 12])), ("a", Stored([8, 9], None, [11, 12])))
    index.apply("a", event(Removed([2, 1])))
    assert index.find([11, 12]) == {("a", 0): Overlap(2, 2, 2, 2)}
    index.apply("a", event(Removed([8])))
    assert index.find([11, 12]) == {}
    assert index.num_blocks("a") == 1


def test_a_name_that_moves_leaves_its_old_place() -> None:
    index = index_of(("a", Stored([1, 2, 3], None, [11, 12, 13])), ("a", Stored([9, 2, 8], 1, [21, 22, 23])))
    check_index(index)
    assert index.find([11, 12]) == {("a", 0): Overlap(1, 1, 1, 1)}
    assert index.find([11, 21, 22, 23]) == {("a", 0): Overlap(4, 4, 4, 4)}
    index.apply("a", event(Stored([1], 8, [31])))  # below itself
    check_index(index)
    assert index.find([11]) == {}


def test_orphans_wait_for_their_parent() -> None:
    index = Index(keep_orphans=True)
    index.apply("a", event(Stored([3, 4], 2, [13, 14]), Tier.HOST))
    assert index.find([13]) == {}
    assert index.hashes_of("a", tier=Tier.HOST) == {3, 4}
    index.apply("a", event(Stored([1, 2], None, [11, 12])))
    assert index.find([11, 12, 13, 14]) == {("a", 0): Overlap(2, 4, 4, 4)}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (Stored([5], 4, [15]), NotFound),
        (Stored([5, 6], 1, [15]), InvalidInput),
        (Stored([5], 1), InvalidInput),
        (Stored([5, 5], 1, [15, 16]), InvalidInput),
    ],
)
def test_wrong_events_change_nothing(data: Stored, error: type[KvistError]) -> None:
    index = index_of(("a", Stored([1], None, [11])))
    for worker in ("a", "b"):
        with pytest.raises(error):
            index.apply(worker, event(data))
    assert index.pools == (("a", 0),)
    assert index.hashes_of("a") == {1}


def test_unknown_workers_are_refused() -> None:
    index = index_of(("a", Stored([1], None, [11])))
    for call in (index.remove_worker, index.events_of, index.hashes_of, index.num_blocks):
        with pytest.raises(NotFound):
            call("b")
        with pytest.raises(NotFound):
            call("a", 1)
    with pytest.raises(AlreadyExists):
        index.add_worker("a")
    with pytest.raises(InvalidInput):
        index.add_worker("a", -1)


def test_what_is_empty_takes_no_room() -> None:
    index = Index()
    for worker in range(20):
        names = list(range(worker * 100, worker * 100 + 50))
        index.apply(worker, event(Stored(names, None, list(range(50)))))
    for worker in range(20):
        names = list(range(worker * 100, worker * 100 + 50))
        index.apply(worker, event(Removed(names if worker % 2 else names[::-1])))
        check_index(index)
    assert not index._tree.root.children
    for worker in range(20):
        index.remove_worker(worker)
    assert index.pools == ()
    assert not index._tree.maps
