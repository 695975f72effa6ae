"""Up: what is loaded, from where, how long it takes, and that it is all or nothing."""

from __future__ import annotations

import pytest
from tests.tiers.making import Worker, hashes, tier, tokens

from kvist.blocks import Deref, FullBlock, Removed, Stored, Tier, Use
from kvist.errors import Conflict, InvalidInput
from kvist.tiers import Load, LoadState


def below(worker: Worker, *blocks: int) -> Worker:
    """Have a chain in the host tier, and nothing on the device."""
    worker.run(*blocks)
    worker.drain()
    worker.manager.clear()
    worker.told()
    return worker


def test_nothing_is_loaded_where_nothing_is() -> None:
    worker = Worker(8)
    assert worker.tiers.load([]).state is LoadState.NOTHING
    assert worker.tiers.load([1, 2]).state is LoadState.NOTHING
    worker.run(1, 2)
    worker.drain()
    assert worker.tiers.load([1, 2]).state is LoadState.NOTHING
    assert worker.tiers.load([1, 2, 3]).blocks == 0


def test_a_chain_comes_up() -> None:
    worker = below(Worker(8), 1, 2, 3)
    assert worker.tiers.peek([1, 2, 3, 4]) == 3
    load = worker.tiers.load([1, 2, 3, 4])
    assert (load.state, load.blocks, load.ended_at) == (LoadState.RUNNING, 3, None)
    assert worker.manager.num_active_blocks == 3
    worker.check()
    assert worker.tiers.deadline() == 6.0  # after the 3 that they took on the way down
    worker.tiers.advance(5.9)
    assert worker.told() == []
    worker.tiers.advance(6.0)
    assert (load.state, load.ended_at) == (LoadState.DONE, 6.0)
    assert worker.told() == [Stored([1, 2, 3], None, hashes([1, 2, 3]), tokens([1, 2, 3]))]
    assert worker.manager.num_inactive_blocks == 3
    assert worker.below() == {1, 2, 3}
    stats = worker.tiers.stats[Tier.HOST]
    assert (stats.hits, stats.bytes_out) == (3, 3_000_000)
    worker.check()


def test_what_the_device_holds_stays_for_the_rest() -> None:
    worker = below(Worker(4), 1, 2, 3)
    worker.run(1, 2)
    worker.drain()
    worker.told()
    load = worker.tiers.load([1, 2, 3])
    assert load.blocks == 1
    assert worker.manager.num_active_blocks == 3
    assert worker.use(7, 8) == 1  # not in the place of 1 and 2
    worker.drain()
    assert worker.manager.peek([1, 2, 3]) == 3
    assert Stored([3], 2, hashes([3]), tokens([3])) in worker.told()
    assert worker.manager.num_active_blocks == 1
    worker.check()


def test_room_for_all_or_none() -> None:
    worker = below(Worker(4), 1, 2, 3)
    worker.use(8, 9)
    worker.told()
    load = worker.tiers.load([1, 2, 3])
    assert load.state is LoadState.NOTHING
    assert worker.told() == []
    assert worker.manager.num_free_blocks == 2
    assert worker.tiers.is_idle
    worker.check()


def test_room_that_must_be_copied_down_first() -> None:
    worker = Worker(3, mode="blocking")
    worker.run(1, 2, 3)
    assert worker.use(7, 8, 9) == 0
    worker.drain()
    assert worker.use(7, 8, 9) == 3
    worker.release(7, 8, 9)
    worker.told()
    assert worker.tiers.load([1, 2]).state is LoadState.BLOCKED
    assert worker.told() == [Removed([9, 8])]
    assert worker.tiers.load([1, 2, 3]).state is LoadState.BLOCKED  # it will fit when they are copied
    worker.drain()
    load = worker.tiers.load([1, 2])
    assert load.state is LoadState.RUNNING
    worker.drain()
    assert worker.manager.peek([1, 2]) == 2
    worker.check()


def test_sources_stay_while_they_are_read() -> None:
    worker = below(Worker(8, tier(capacity=2, up_gb_per_s=0.1)), 1, 2)
    load = worker.tiers.load([1, 2])
    worker.run(5)
    worker.tiers.advance(10.0)
    assert load.state is LoadState.RUNNING
    assert worker.below() == {1, 2}
    assert worker.tiers.stats[Tier.HOST].no_room == 1
    worker.drain()
    assert load.state is LoadState.DONE
    worker.run(6)
    worker.drain()
    assert worker.below() == {1, 6}


def test_from_two_levels_down() -> None:
    """Disk to host to device: two links, and no place in host."""
    worker = Worker(8, tier(capacity=2), disk=tier())
    worker.run(1, 2)
    worker.drain()
    worker.run(8, 9)
    worker.drain()
    worker.manager.clear()
    assert (worker.below(0), worker.below(1)) == ({8, 9}, {1, 2})
    start = worker.tiers.network.now
    load = worker.tiers.load([1, 2])
    worker.drain()
    assert load.ended_at == start + 4.0
    assert worker.manager.peek([1, 2]) == 2
    assert (worker.below(0), worker.below(1)) == ({8, 9}, {1, 2})
    assert [stats.hits for stats in worker.tiers.stats.values()] == [0, 2]
    assert [stats.bytes_out for stats in worker.tiers.stats.values()] == [2_000_000, 2_000_000]


def test_batches_follow_each_other_through_the_links() -> None:
    worker = Worker(8, tier(capacity=2), disk=tier(), batch_blocks=1)
    worker.run(1, 2)
    worker.drain()
    worker.run(8, 9)
    worker.drain()
    worker.manager.clear()
    start = worker.tiers.network.now
    load = worker.tiers.load([1, 2])
    worker.drain()
    assert load.ended_at == start + 3.0


def test_one_run_from_several_levels() -> None:
    worker = Worker(8, tier(capacity=2), disk=tier())
    worker.run(1, 2, 3)
    worker.drain()
    worker.run(8)  # 2 goes to the disk
    worker.drain()
    worker.manager.clear()
    assert (worker.below(0), worker.below(1)) == ({1, 8}, {2})
    start = worker.tiers.network.now
    load = worker.tiers.load([1, 2, 3])
    assert load.blocks == 2
    worker.drain()
    assert load.ended_at == start + 2.0
    assert worker.manager.peek([1, 2, 3]) == 2


def test_two_loads_share_a_link() -> None:
    worker = Worker(8)
    worker.run(1)
    worker.run(2)
    worker.drain()
    worker.manager.clear()
    start = worker.tiers.network.now
    loads = [worker.tiers.load([block]) for block in (1, 2)]
    worker.drain()
    assert [load.ended_at for load in loads] == [start + 2.0] * 2


def test_a_block_on_its_way_is_not_brought_twice() -> None:
    worker = below(Worker(8), 1, 2)
    ended: list[Load] = []
    load = worker.tiers.load([1, 2])
    load.then(ended.append)
    assert worker.tiers.load([1]) is load
    worker.drain()
    assert ended == [load]
    with pytest.raises(Conflict, match="done"):
        load.then(ended.append)


def test_a_callback_may_use_the_blocks() -> None:
    worker = below(Worker(2), 1, 2)
    used: list[int] = []
    worker.tiers.load([1, 2]).then(lambda _: used.append(worker.use(1, 2)))
    worker.drain()
    assert used == [2]
    assert worker.manager.num_active_blocks == 2
    worker.check()


def test_what_was_stored_meanwhile_stays() -> None:
    worker = below(Worker(8), 1, 2)
    worker.tiers.load([1, 2])
    assert worker.use(1) == 1
    worker.told()
    worker.drain()
    assert worker.told() == [Stored([2], 1, hashes([2]), tokens([2]))]
    assert worker.manager.num_free_blocks == 6
    worker.check()


def test_a_chain_begins_at_its_root() -> None:
    worker = below(Worker(8), 1, 2)
    with pytest.raises(InvalidInput, match="root"):
        worker.tiers.load([2])
    for chain, lineage in (([1, 1, 2], []), ([5, 5], []), ([1, 2], [(1, None), (1, None)])):
        with pytest.raises(InvalidInput, match="twice"):
            worker.tiers.load(chain, lineage=lineage)
    with pytest.raises(InvalidInput, match="sequence hash"):
        worker.tiers.load([[1]])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="2 blocks"):
        worker.tiers.load([1, 2], lineage=[(1, None)])
    assert worker.tiers.is_idle
    worker.check()


def test_by_lineage() -> None:
    worker = below(Worker(8), 1, 2)
    assert worker.tiers.peek([71, 72], lineage=[(1, None), (2, 1)]) == 2
    load = worker.tiers.load([71, 72], lineage=[(1, None), (2, 1)])
    assert load.blocks == 2
    worker.drain()
    assert worker.manager.peek([1, 2]) == 2


def test_by_lineage_without_parents() -> None:
    lineage = [(110, None), (111, None)]
    move = Use([FullBlock(10), FullBlock(11)], lineage=lineage)
    worker = Worker(8)
    assert worker.manager.process(move) == 2
    worker.release(10, 11)
    worker.drain()
    worker.manager.clear()
    worker.told()
    assert worker.tiers.peek([10, 11], lineage=lineage) == 2
    assert worker.tiers.load([10, 11], lineage=lineage).blocks == 2
    worker.drain()
    assert worker.told() == [Stored([10, 11], None, [0, 0])]
    worker.check()
    with pytest.raises(InvalidInput, match="root"):
        below(worker, 1, 2).tiers.load([2], lineage=[(2, None)])


def test_what_contradicts_the_device_when_it_arrives_stays_below() -> None:
    worker = below(Worker(8), 1, 2, 3)
    ended: list[Load] = []
    load = worker.tiers.load([1, 2, 3])
    load.then(ended.append)
    assert worker.manager.process(Use([FullBlock(2)])) == 1  # as a root: there, 2 comes after 1
    worker.told()
    worker.drain()
    assert ended == [load]
    assert (load.state, load.blocks, load.brought) == (LoadState.DONE, 3, 1)
    assert worker.told() == [Stored([1], None, hashes([1]), tokens([1]))]
    assert (worker.manager.num_inactive_blocks, worker.manager.num_free_blocks) == (1, 6)
    worker.check()
    worker.manager.process(Deref([FullBlock(2)]))
    assert worker.manager.num_active_blocks == 0


def test_a_load_that_brings_nothing_gives_everything_back() -> None:
    worker = below(Worker(8), 1, 2)
    load = worker.tiers.load([1, 2])
    assert worker.manager.process(Use([FullBlock(9), FullBlock(1)])) == 2  # 1 after 9
    worker.drain()
    assert (load.state, load.brought) == (LoadState.DONE, 0)
    assert worker.manager.num_free_blocks == 6
    assert worker.tiers.levels[0].pool.readers(1) == 0
    worker.check()


def test_the_prefix_is_given_back_tail_first() -> None:
    worker = below(Worker(8, policy="lru"), 1, 2, 3, 4)
    worker.run(1, 2, 3)
    worker.drain()
    worker.told()
    worker.tiers.load([1, 2, 3, 4])
    worker.drain()
    worker.manager.free(worker.manager.allocate(8))
    assert worker.told(Tier.DEVICE)[-1] == Removed([4, 3, 2, 1])


def test_a_prefix_given_back_is_copied_root_first() -> None:
    worker = Worker(8, queue_blocks=1)
    for count in (1, 2, 3):
        worker.run(*range(1, count + 1))
        worker.drain()
    worker.manager.clear()
    pool = worker.tiers.levels[0].pool
    pool.pin([3])
    pool.clear(worker.manager.log)
    pool.unpin([3])
    assert worker.use(1, 2) == 2
    assert worker.tiers.load([1, 2, 3]).blocks == 1
    worker.release(1, 2)
    assert worker.below() == {3}
    worker.drain()
    assert worker.below() == {1, 3}  # there is room for one in the queue


def test_a_sink_that_fails_while_room_is_made_takes_nothing() -> None:
    worker = below(Worker(4), 1, 2, 3)
    worker.run(1)
    worker.run(7, 8, 9)
    worker.drain()
    heard = worker.manager.log._sink

    def fail(event: object) -> None:
        raise OSError("sink")

    worker.manager.log._sink = fail
    with pytest.raises(OSError, match="sink"):
        worker.tiers.load([1, 2, 3])
    worker.manager.log._sink = heard
    assert worker.tiers.is_idle
    assert worker.manager.num_active_blocks == 0
    assert [worker.tiers.levels[0].pool.readers(block) for block in (1, 2, 3)] == [0, 0, 0]
    worker.check()


def test_a_sink_that_refuses_what_arrived_is_not_the_device() -> None:
    worker = below(Worker(4), 1, 2)
    load = worker.tiers.load([1, 2])

    def fail(event: object) -> None:
        raise InvalidInput("sink")

    worker.manager.log._sink = fail
    with pytest.raises(InvalidInput, match="sink"):
        worker.drain()
    assert (load.state, load.brought) == (LoadState.DONE, 2)
    assert worker.manager.peek([1, 2]) == 2
    worker.check()


def test_a_callback_that_fails_stops_no_other() -> None:
    worker = below(Worker(4), 1)
    load = worker.tiers.load([1])
    called: list[str] = []

    def first(load: Load) -> None:
        called.append("first")
        raise OSError("callback")

    load.then(first)
    load.then(lambda load: called.append("second"))
    with pytest.raises(OSError, match="callback"):
        worker.drain()
    assert called == ["first", "second"]
    assert worker.tiers.is_idle
