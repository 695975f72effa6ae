"""Down: what is copied, when slots come back, and what routers hear."""

from __future__ import annotations

import pytest
from tests.tiers.making import Worker, stored, tier

from kvist.blocks import Removed, Tier
from kvist.errors import Conflict, InvalidInput, NotFound
from kvist.tiers import Level, Network


def test_released_blocks_are_copied_while_they_stay() -> None:
    worker = Worker(8)
    worker.run(1, 2, 3)
    worker.told()
    assert worker.tiers.deadline() == 3.0
    worker.tiers.advance(2.9)
    assert worker.told() == []
    assert worker.below() == set()
    worker.tiers.advance(3.0)
    assert worker.told(Tier.HOST) == [stored([1, 2, 3], None)]
    assert worker.manager.num_inactive_blocks == 3
    assert worker.below() == {1, 2, 3}
    assert worker.tiers.is_idle
    worker.check()


def test_what_hangs_on_a_block_below_is_told_as_its_child() -> None:
    worker = Worker(8)
    worker.run(1, 2)
    worker.drain()
    worker.told()
    worker.run(1, 2, 3, 4)
    worker.drain()
    assert worker.told(Tier.HOST) == [stored([3, 4], 2)]
    assert worker.tiers.stats[Tier.HOST].present == 2


def test_a_block_in_use_is_not_copied() -> None:
    worker = Worker(8)
    worker.use(1)
    assert worker.tiers.deadline() is None


def test_a_block_that_is_below_goes_at_once() -> None:
    worker = Worker(2)
    worker.run(1, 2)
    worker.drain()
    worker.told()
    assert worker.use(3, 4) == 2
    assert worker.told() == [Removed([2, 1]), stored([3, 4], None)]
    assert worker.below() == {1, 2}


def test_a_busy_link_blocks_nobody() -> None:
    worker = Worker(2, batch_blocks=1)
    worker.run(1, 2)  # 1 is on the link, 2 waits
    assert worker.use(3) == 1
    assert worker.tiers.stats[Tier.HOST].too_busy == 1
    worker.drain()
    assert worker.below() == {1}
    worker.check()


def test_a_slot_on_the_link_is_read_to_the_end() -> None:
    worker = Worker(2, batch_blocks=1)
    worker.run(1, 2)  # 1 is on the link, 2 waits
    worker.told()
    assert worker.use(3, 4) == 1
    assert worker.manager.num_active_blocks == 2
    assert worker.told() == [Removed([2, 1]), stored([3], None)]
    worker.tiers.advance(1.0)
    assert worker.told() == [stored([1], None)]
    assert worker.use(3, 4) == 2
    worker.check()


def test_an_idle_link_takes_what_goes_uncopied() -> None:
    worker = Worker(2, queue_blocks=1)
    worker.run(1, 2)  # the queue has room for 1 only
    worker.drain()
    assert worker.below() == {1}
    assert worker.use(3) == 0
    assert worker.manager.num_active_blocks == 1
    worker.drain()
    assert worker.below() == {1, 2}
    assert worker.use(3) == 1
    worker.check()


def test_the_queue_is_bounded() -> None:
    worker = Worker(8, queue_blocks=2, batch_blocks=1)
    worker.run(1, 2, 3, 4)  # 1 and 2 fit, and 1 is on the link at once
    assert worker.tiers.stats[Tier.HOST].too_busy == 2
    worker.run(5)
    assert worker.tiers.stats[Tier.HOST].too_busy == 2
    worker.drain()
    assert worker.below() == {1, 2, 5}


def test_slots_are_kept_free() -> None:
    worker = Worker(10, free_low=0.3, free_high=0.5)
    worker.run(*range(1, 9))
    worker.told()
    assert worker.manager.num_free_blocks == 2
    worker.tiers.advance(1.0)  # what is evicted ahead of need is copied first
    assert worker.manager.num_free_blocks == 2
    assert worker.told() == [Removed([8, 7, 6])]
    worker.tiers.advance(8.0)
    assert worker.manager.num_free_blocks == 5
    assert worker.told() == [stored(list(range(1, 9)), None)]
    worker.tiers.advance(9.0)
    assert worker.told() == []
    worker.check()


def test_second_touch() -> None:
    worker = Worker(8, admission="second_touch")
    worker.run(1, 2)
    assert worker.tiers.deadline() is None
    assert worker.tiers.stats[Tier.HOST].refused == 2
    worker.run(1, 3)
    worker.drain()
    assert worker.below() == {1}


def test_second_touch_of_what_was_used_long_ago() -> None:
    worker = Worker(8, tier(capacity=2), admission="second_touch")
    worker.run(1)
    worker.run(2)
    worker.run(3)
    worker.run(1)
    assert worker.tiers.deadline() is None


def test_frequency() -> None:
    worker = Worker(8, admission="frequency", admission_count=3)
    worker.run(1)
    worker.run(1)
    assert worker.tiers.deadline() is None
    worker.run(1)
    worker.drain()
    assert worker.below() == {1}


def test_admission_decides_about_evictions() -> None:
    worker = Worker(1, mode="blocking", admission="second_touch")
    worker.run(1)
    assert worker.use(2) == 1
    worker.release(2)
    worker.run(2)
    assert worker.use(3) == 0


def test_blocking_copies_what_goes_and_nothing_else() -> None:
    worker = Worker(3, mode="blocking")
    worker.run(1, 2, 3)
    assert worker.tiers.deadline() is None
    worker.told()
    assert worker.use(4, 5) == 0
    assert worker.told() == [Removed([3, 2])]
    worker.drain()
    assert worker.told() == [stored([2, 3], 1)]
    assert worker.use(4, 5) == 2
    worker.check()


def test_a_child_waits_for_its_parent() -> None:
    """The leaf goes first, and arrives first; a router could not place it."""
    worker = Worker(2, mode="blocking")
    worker.run(1, 2)
    assert worker.use(3) == 0
    worker.tiers.advance(0.5)
    assert worker.manager.allocate(2) == []  # and now its parent
    worker.told()
    worker.tiers.advance(1.0)
    assert worker.told() == []
    assert worker.below() == set()
    assert worker.manager.num_free_blocks == 1
    worker.check()
    worker.tiers.advance(2.0)
    assert worker.told() == [stored([1, 2], None)]
    worker.check()


def test_a_child_whose_parent_is_nowhere_is_lost() -> None:
    worker = Worker(2, tier(capacity=1), mode="blocking")
    worker.run(1, 2)
    assert worker.use(3) == 0  # 2 is copied
    worker.tiers.advance(0.5)
    assert worker.manager.allocate(2) == []  # 1 waits for 2, which will wait for 1, and there is one place
    worker.drain()
    assert worker.below() == set()
    stats = worker.tiers.stats[Tier.HOST]
    assert (stats.no_room, stats.orphaned) == (1, 1)
    assert worker.tiers.is_idle
    assert worker.use(3, 4) == 2
    worker.check()


def test_a_full_tier_lets_go() -> None:
    worker = Worker(8, tier(capacity=2))
    worker.run(1, 2)
    worker.drain()
    worker.told()
    worker.run(3)
    assert worker.told(Tier.HOST) == [Removed([2])]
    worker.drain()
    assert worker.told(Tier.HOST) == [stored([3], None)]


def test_more_than_a_tier_holds_is_not_copied() -> None:
    worker = Worker(8, tier(capacity=2))
    worker.run(1, 2, 3)
    worker.drain()
    assert worker.below() == {1, 2}
    assert worker.tiers.stats[Tier.HOST].no_room == 1


def test_children_do_not_push_out_what_they_hang_on() -> None:
    worker = Worker(8, tier(capacity=3), batch_blocks=2)
    worker.run(9)
    worker.drain()
    worker.run(1, 2, 3, 4)
    worker.drain()
    assert worker.below() == {1, 2, 3}
    assert worker.tiers.stats[Tier.HOST].no_room == 1
    worker.check()


def test_what_a_tier_lets_go_goes_to_the_next() -> None:
    worker = Worker(8, tier(capacity=1), disk=tier(capacity=1), external=tier())
    for block in (1, 2, 3):
        worker.run(block)
        worker.drain()
    assert [worker.below(number) for number in range(3)] == [{3}, {2}, {1}]
    assert [(event.tier, event.data) for event in worker.events if event.tier is not Tier.DEVICE] == [
        (Tier.HOST, stored([1], None)),
        (Tier.HOST, Removed([1])),
        (Tier.HOST, stored([2], None)),
        (Tier.DISK, stored([1], None)),
        (Tier.HOST, Removed([2])),
        (Tier.DISK, Removed([1])),
        (Tier.HOST, stored([3], None)),
        (Tier.DISK, stored([2], None)),
        (Tier.EXTERNAL, stored([1], None)),
    ]
    assert worker.tiers.stats[Tier.DISK].evicted == 1
    worker.check()


def test_what_a_tier_lets_go_may_find_the_link_busy() -> None:
    worker = Worker(8, tier(capacity=4), disk=tier(), spill_blocks=1)
    worker.run(1, 2, 3, 4)
    worker.drain()
    worker.run(5, 6, 7)
    worker.drain()
    assert worker.tiers.stats[Tier.DISK].too_busy == 2
    assert len(worker.below(1)) == 1
    worker.check()


def test_a_shared_tier_is_told_by_who_brought_it() -> None:
    network = Network()
    shared = {Tier.EXTERNAL: Level.make(network, Tier.EXTERNAL, tier(capacity=2))}
    one, two = (
        Worker(8, tier(capacity=1), disk=tier(capacity=1), external=tier(), network=network, shared=shared)
        for _ in range(2)
    )
    for block in (1, 2, 3):
        one.run(block)
        one.drain()
    assert one.told(Tier.EXTERNAL) == [stored([1], None)]
    for block in (1, 2, 4):
        two.run(block)
        two.drain()
    assert two.told(Tier.EXTERNAL) == []  # it is there
    assert two.tiers.stats[Tier.EXTERNAL].present == 1
    assert two.tiers.peek([1]) == 1
    for block in (5, 6):
        two.run(block)
        two.drain()
    assert two.told(Tier.EXTERNAL) == [stored([2], None), stored([4], None)]
    assert one.told(Tier.EXTERNAL) == [Removed([1])]
    assert one.below(2) == two.below(2) == {2, 4}
    for worker in (one, two):
        worker.check()


def test_a_shared_link_is_shared() -> None:
    network = Network()
    host = Level.make(network, Tier.HOST, tier())
    one, two = (Worker(8, network=network, shared={Tier.HOST: host}) for _ in range(2))
    one.run(1)
    two.run(2)
    assert one.tiers.deadline() == two.tiers.deadline() == 2.0
    one.tiers.advance(2.0)
    assert one.told(Tier.HOST) == [stored([1], None)]
    assert two.told(Tier.HOST) == [stored([2], None)]


def test_shared_levels_are_of_this_network_and_tier() -> None:
    network = Network()
    level = Level.make(network, Tier.DISK, tier())
    with pytest.raises(InvalidInput, match="disk"):
        Worker(8, network=network, shared={Tier.DISK: level})
    with pytest.raises(InvalidInput, match="host"):
        Worker(8, network=network, shared={Tier.HOST: level})
    with pytest.raises(InvalidInput, match="network"):
        Worker(8, disk=tier(), shared={Tier.DISK: level})


def test_clear() -> None:
    worker = Worker(8, disk=tier())
    worker.run(1, 2)
    with pytest.raises(Conflict, match="on their way"):
        worker.tiers.clear()
    worker.drain()
    worker.use(1)
    with pytest.raises(Conflict, match="active"):
        worker.tiers.clear()
    assert worker.below() == {1, 2}
    worker.release(1)
    worker.told()
    worker.tiers.clear()
    assert worker.below() == set()
    assert worker.told() == [Removed([2, 1]), Removed([1, 2])]
    worker.check()


def test_the_device_is_not_cleared_while_it_is_read() -> None:
    worker = Worker(3, batch_blocks=1)
    worker.run(1, 2, 3)  # 1 is on the link, 2 and 3 wait
    with pytest.raises(Conflict):
        worker.manager.clear()
    assert worker.manager.num_inactive_blocks == 3
    worker.drain()
    worker.manager.clear()
    assert worker.below() == {1, 2, 3}
    worker.check()


def test_the_device_is_read_until_its_own_copies_end() -> None:
    worker = Worker(3, tier(capacity=1), disk=tier(down_gb_per_s=0.1), batch_blocks=1)
    worker.run(1)
    assert worker.tiers._offload.is_reading
    worker.tiers.advance(1.0)
    assert not worker.tiers._offload.is_reading
    worker.run(2)  # and 1 goes on to the disk
    worker.tiers.advance(2.0)
    assert not worker.tiers.is_idle
    assert not worker.tiers._offload.is_reading
    worker.manager.clear()
    worker.drain()
    assert (worker.below(0), worker.below(1)) == ({2}, {1})
    worker.check()


def test_a_slot_is_kept_free_in_a_small_pool() -> None:
    worker = Worker(10, free_low=0.01, free_high=0.02)
    worker.run(*range(10))
    worker.drain()
    assert worker.manager.num_free_blocks == 1
    worker.check()


def test_close() -> None:
    worker = Worker(1)
    worker.run(1)
    with pytest.raises(Conflict, match="on their way"):
        worker.tiers.close()
    worker.drain()
    worker.tiers.close()
    assert not worker.manager.has_offload
    with pytest.raises(NotFound):
        worker.tiers.close()
    worker.run(2)
    assert worker.below() == {1}
