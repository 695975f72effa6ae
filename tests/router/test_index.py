"""The index, against plain dicts and by example."""

from __future__ import annotations

import pytest
from hypothesis import settings

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored, Tier
from kvist.errors import AlreadyExists, InvalidInput, KvistError, NotFound
from kvist.router.index import Index, Overlap
from kvist.router.runs import LONGEST
from kvist.testing.index import IndexMachine, check_index, drive

TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(5))
def test_a_drive(seed: int) -> None:
    drive(seed, 500)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 50))
def test_long_drives(first: int) -> None:
    for seed in range(first, first + 50):
        drive(seed, 2000)


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


def test_a_name_means_another_block_in_another_tier() -> None:
    index = Index()
    for data in (Stored([7], None, [22]), Stored([5], None, [22])):
        index.apply("a", event(data, Tier.HOST))
    index.apply("a", event(Stored([5], None, [11])))
    index.apply("a", event(Stored([8], 7, [44])))  # below 5 of the host
    index.apply("a", event(Removed([7]), Tier.HOST))
    other = Index()
    for each in index.events_of("a"):
        other.apply("a", each)
    for known in (index, other):
        assert known.find([11, 44]) == {("a", 0): Overlap(1, 1, 1, 1)}
        assert known.find([22, 44]) == {("a", 0): Overlap(0, 2, 2, 2)}
        assert known.hashes_of("a") == {5, 8}
        check_index(known)


def test_hashes_may_be_any_integers() -> None:
    index = index_of(("a", Stored([-1, -2], None, [11, 12])), ("a", Stored([-2], None, [21])))
    assert index.hashes_of("a") == {-1, -2}
    assert index.find([11, 12]) == index.find([21]) == {("a", 0): Overlap(1, 1, 1, 1)}
    check_index(index)


@pytest.mark.parametrize("step", [1, -1])
def test_a_long_run_can_go_block_by_block(step: int) -> None:
    """What a cut copies has a bound, however long the run was told."""
    names = list(range(10 * LONGEST + 1))
    index = index_of(("a", Stored(names, None, names)))
    assert index.find(names) == {("a", 0): Overlap(*[len(names)] * 4)}
    for gone, name in enumerate(names[::step], start=1):
        assert max(len(run.blocks) for run in index._tree.walk(index._tree.root)) <= LONGEST
        index.apply("a", event(Removed([name])))
        if not gone % 100:
            check_index(index)
            assert index.hashes_of("a") == set(names[::step][gone:])
    assert index.find(names) == {}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (Stored([5], 4, [15]), NotFound),
        (Stored([], 4, []), NotFound),
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
