"""A lower pool: arriving, resident, read, gone."""

from __future__ import annotations

import pytest

from kvist.blocks import Event, EventLog, Removed, Resident, Tier
from kvist.errors import InvalidInput, NotFound
from kvist.tiers import LowerPool


def block(key: int, parent: int | None = None, name: int | None = None) -> Resident:
    return Resident(key if name is None else name, 0, key, parent)


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def log(heard: list[Event]) -> EventLog:
    return EventLog(heard.append)


def test_an_empty_pool(log: EventLog) -> None:
    pool = LowerPool(Tier.HOST, 1)
    assert len(pool) == 0
    assert 1 not in pool
    assert pool.get(1) is None and pool.told_by(1) is None and pool.readers(1) == 0
    assert pool.reserve([], log) == (0, [])
    pool.commit([])
    pool.touch([])
    pool.clear(log)
    pool.check_integrity()


def test_what_arrives_is_not_there_yet(log: EventLog) -> None:
    pool = LowerPool(Tier.HOST, 2)
    assert pool.reserve([block(1), block(2, 1)], log) == (2, [])
    assert pool.holds(1) and 1 not in pool
    assert pool.reserve([block(3)], log) == (0, [])
    pool.commit([1])
    pool.cancel([2])
    assert list(pool) == [block(1)]
    assert not pool.holds(2)
    pool.check_integrity()


def test_what_goes_is_told_by_its_name(log: EventLog, heard: list[Event]) -> None:
    pool = LowerPool(Tier.DISK, 2)
    pool.reserve([block(1, name=11), block(2, 1, name=12)], log)
    pool.commit([1, 2])
    assert pool.reserve([block(3), block(4, 3)], log) == (
        2,
        [(log, block(2, 1, name=12)), (log, block(1, name=11))],
    )
    assert heard == []
    pool.tell_gone([(log, block(2, 1, name=12)), (log, block(1, name=11))])
    assert heard == [Event(0, Removed([12, 11]), Tier.DISK)]
    pool.check_integrity()


def test_each_log_hears_of_what_it_brought(log: EventLog, heard: list[Event]) -> None:
    others: list[Event] = []
    other = EventLog(others.append)
    pool = LowerPool(Tier.EXTERNAL, 3, "fifo")
    for key, bringer in ((1, log), (2, other), (3, log)):
        pool.reserve([block(key)], bringer)
        pool.commit([key])
    assert pool.told_by(2) is other
    fit, gone = pool.reserve([block(4), block(5), block(6)], other)
    assert fit == 3
    pool.tell_gone(gone)
    assert [event.data for event in heard] == [Removed([1]), Removed([3])]
    assert [event.data for event in others] == [Removed([2])]


def test_what_is_read_stays(log: EventLog) -> None:
    pool = LowerPool(Tier.HOST, 2, "lru")
    pool.reserve([block(1), block(2)], log)
    pool.commit([1, 2])
    pool.pin([1])
    pool.pin([1, 2])
    pool.unpin([1, 2])
    assert pool.readers(1) == 1
    assert pool.reserve([block(3), block(4)], log) == (1, [(log, block(2))])
    pool.unpin([1])
    pool.commit([3])
    pool.check_integrity()
    assert pool.reserve([block(4)], log) == (1, [(log, block(1))])


def test_nothing_comes_after_itself(log: EventLog) -> None:
    pool = LowerPool(Tier.HOST, 9)
    assert pool.reserve([block(2, 1), block(3, 2)], log)[0] == 2
    pool.commit([2, 3])
    assert pool.reserve([block(4), block(1, 3), block(5)], log)[0] == 1
    assert pool.reserve([block(6, 6)], log)[0] == 0
    assert pool.reserve([block(1)], log)[0] == 1
    pool.check_integrity()


@pytest.mark.parametrize("policy", ["lineage", "lru"])
def test_parents_stay_for_their_children(log: EventLog, policy: str) -> None:
    pool = LowerPool(Tier.HOST, 2, policy)
    pool.reserve([block(1), block(9)], log)
    pool.commit([1])
    pool.commit([9])
    assert pool.reserve([block(2, 1), block(3, 2)], log) == (1, [(log, block(9))])
    assert pool.reserve([block(3, 1)], log) == (0, [])
    pool.check_integrity()


def test_use_keeps(log: EventLog) -> None:
    pool = LowerPool(Tier.HOST, 2, "lru")
    pool.reserve([block(1), block(2)], log)
    pool.commit([2])
    pool.commit([1])
    pool.touch([2])
    assert pool.reserve([block(3)], log) == (1, [(log, block(1))])


def test_clear_takes_what_one_log_brought(log: EventLog, heard: list[Event]) -> None:
    pool = LowerPool(Tier.HOST, 4)
    pool.reserve([block(1), block(2)], log)
    pool.reserve([block(3)], EventLog())
    pool.commit([1, 2, 3])
    pool.pin([2])
    pool.clear(log)
    assert {each.lineage_hash for each in pool} == {2, 3}
    assert [event.data for event in heard] == [Removed([1])]
    pool.check_integrity()


def test_mistakes_change_nothing(log: EventLog) -> None:
    pool = LowerPool(Tier.HOST, 2)
    pool.reserve([block(1), block(2)], log)
    pool.commit([1])
    with pytest.raises(InvalidInput, match="host_pinned"):
        pool.reserve([block(1)], log)
    with pytest.raises(InvalidInput, match="host_pinned"):
        pool.reserve([block(5), block(5)], log)
    for call, keys in (
        (pool.commit, [1]),
        (pool.commit, [2, 2]),
        (pool.cancel, [7]),
        (pool.pin, [1, 2]),
        (pool.touch, [2]),
        (pool.unpin, [1]),
        (pool.pin, [1, 1]),
    ):
        with pytest.raises(NotFound, match="host_pinned"):
            call(keys)
    assert len(pool) == 1 and pool.holds(2)
    pool.check_integrity()


def test_sizes_and_policies() -> None:
    with pytest.raises(InvalidInput, match="capacity"):
        LowerPool(Tier.HOST, 0)
    with pytest.raises(InvalidInput, match="policy"):
        LowerPool(Tier.HOST, 1, "newest")


def test_a_reader_is_lost_once_a_call(log: EventLog) -> None:
    pool = LowerPool(Tier.HOST, 2)
    pool.reserve([block(1)], log)
    pool.commit([1])
    pool.pin([1])
    for readers in (1, 2):
        with pytest.raises(NotFound, match="twice"):
            pool.unpin([1, 1])
        assert pool.readers(1) == readers
        pool.check_integrity()
        pool.pin([1])


def test_a_sink_that_fails_keeps_nothing_from_others(log: EventLog, heard: list[Event]) -> None:
    def fail(event: Event) -> None:
        raise OSError("sink")

    pool = LowerPool(Tier.EXTERNAL, 2, "fifo")
    for key, bringer in ((1, EventLog(fail)), (2, log)):
        pool.reserve([block(key)], bringer)
        pool.commit([key])
    _, gone = pool.reserve([block(3), block(4)], log)
    with pytest.raises(OSError, match="sink"):
        pool.tell_gone(gone)
    assert [event.data for event in heard] == [Removed([2])]
    pool.check_integrity()
