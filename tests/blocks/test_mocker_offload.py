"""The offload tests of the mocker that these rules come from, by name, with their expectations; and what differs.

Links carry a block of 1,000,000 bytes at 1 GB/s: one millisecond each.
"""

from __future__ import annotations

import pytest

from kvist.blocks import BlockManager, Deref, Event, FullBlock, Removed, Stored, Tier, Use
from kvist.blocks.resident import Resident
from kvist.tiers import LoadState, TierConfig, Tiers, TiersConfig

pytestmark = pytest.mark.usefixtures("whole")


def make(capacity: int, host: int = 100) -> tuple[BlockManager, Tiers, list[Event]]:
    events: list[Event] = []
    manager = BlockManager(capacity, 4, events=events.append)
    config = TiersConfig(block_bytes=1_000_000, host=TierConfig(capacity=host, down_gb_per_s=1.0), mode="blocking")
    return manager, Tiers(manager, config), events


def use(manager: BlockManager, block: int, tokens: list[int] | None = None) -> int:
    return manager.process(
        Use(
            [FullBlock(block)],
            local_hashes=[101 * block],
            lineage=[(block, None)],
            token_ids=[tokens or [4 * block - 3, 4 * block - 2, 4 * block - 1, 4 * block]],
        )
    )


def deref(manager: BlockManager, block: int) -> None:
    manager.process(Deref([FullBlock(block)]))


def tick(tiers: Tiers) -> None:
    deadline = tiers.deadline()
    assert deadline is not None
    tiers.advance(deadline)


def of(events: list[Event], tier: Tier) -> list[Stored | Removed]:
    return [event.data for event in events if event.tier is tier]  # type: ignore[misc]


def test_fresh_manager_has_no_offload_engine() -> None:
    assert not BlockManager(8, 4).has_offload


def test_attach_new_offload_engine_wires_in_after_construction() -> None:
    manager = BlockManager(16, 4)
    assert not manager.has_offload
    Tiers(manager, TiersConfig(block_bytes=0))
    assert manager.has_offload


def test_g2_completion_publishes_host_pinned_stored_event() -> None:
    manager, tiers, events = make(1, host=1)
    assert use(manager, 1) == 1
    deref(manager, 1)
    events.clear()
    assert use(manager, 2) == 0
    assert of(events, Tier.DEVICE) == [Removed([1])]  # at once
    assert of(events, Tier.HOST) == []  # nothing has arrived
    assert tiers.deadline() == 1.0
    tick(tiers)
    assert of(events, Tier.HOST) == [Stored([1], None, [101], [[1, 2, 3, 4]])]
    tiers.check_integrity()
    manager.check_integrity()


def test_g2_eviction_publishes_host_pinned_removed_event() -> None:
    manager, tiers, events = make(1, host=1)
    assert use(manager, 1) == 1
    deref(manager, 1)
    assert use(manager, 2) == 0
    tick(tiers)
    assert use(manager, 2) == 1
    deref(manager, 2)
    events.clear()
    assert use(manager, 3) == 0
    tick(tiers)
    assert of(events, Tier.HOST) == [Removed([1]), Stored([2], None, [202], [[5, 6, 7, 8]])]
    tiers.check_integrity()
    manager.check_integrity()


def test_reoffloaded_swapped_in_block_keeps_token_ids_for_g2_raw_event() -> None:
    manager, tiers, events = make(1, host=1)
    slots = manager.allocate(1)
    assert manager.register([Resident(1, -1, 1, None, None, 101, [1, 2, 3, 4])], slots) == 1
    events.clear()
    assert use(manager, 2) == 0
    tick(tiers)
    assert of(events, Tier.HOST) == [Stored([1], None, [101], [[1, 2, 3, 4]])]
    manager.check_integrity()


def test_g1_eviction_offload_holds_source_slot_until_complete() -> None:
    manager, tiers, _ = make(1)
    assert use(manager, 1) == 1
    deref(manager, 1)
    assert (manager.num_active_blocks, manager.num_inactive_blocks) == (0, 1)
    assert use(manager, 2) == 0
    assert manager.num_active_blocks == 1  # the slot is still read
    tick(tiers)
    assert manager.num_active_blocks == 0
    assert use(manager, 2) == 1
    assert manager.num_active_blocks == 1


def test_try_batch_swap_in_returns_no_hits_without_engine() -> None:
    """There, a manager without an engine is asked, and answers that there are none; here, tiers that hold nothing."""
    manager = BlockManager(8, 4)
    tiers = Tiers(manager, TiersConfig(block_bytes=1_000_000))
    assert tiers.load([1, 2, 3]).state is LoadState.NOTHING
    assert manager.num_free_blocks == 8


def test_swap_in_registration_anchors_suffix_to_reused_prefix_parent() -> None:
    events: list[Event] = []
    manager = BlockManager(8, 4, events=events.append)
    blocks = [
        Resident(12, -1, 12, None, None, 120, [1] * 4),
        Resident(13, -1, 13, None, None, 130, [2] * 4),
    ]
    assert manager.register(blocks, manager.allocate(2), parent=11) == 2
    assert [event.data for event in events] == [Stored([12, 13], 11, [120, 130], [[1] * 4, [2] * 4])]
    assert manager.num_inactive_blocks == 2


def test_asking_again_copies_down_no_more() -> None:
    """Ours. There, each call that is blocked evicts anew what it lacks, though that is on its way already."""
    manager, tiers, _ = make(4)
    for block in (1, 2, 3, 4):
        use(manager, block)
    for block in (1, 2, 3, 4):
        deref(manager, block)
    move = Use([FullBlock(block) for block in (5, 6)], lineage=[(5, None), (6, 5)])
    theirs = [2, 0, 0]
    ours = []
    for _ in range(3):
        assert manager.process(move) == 0
        ours.append(manager.num_inactive_blocks)
    assert (ours, theirs[-1]) == ([2, 2, 2], 0)
    tick(tiers)
    assert manager.process(move) == 2


def test_a_block_that_is_below_already_blocks_nobody() -> None:
    """Ours. There, the call fails, and the slot is free at once; here, the call gets that slot."""
    manager, tiers, events = make(1)
    use(manager, 1)
    deref(manager, 1)
    use(manager, 2)
    tick(tiers)
    assert use(manager, 1) == 1  # stored anew: nobody loaded it
    deref(manager, 1)
    events.clear()
    assert use(manager, 2) == 1
    assert of(events, Tier.DEVICE) == [Removed([1]), Stored([2], None, [202], [[5, 6, 7, 8]])]
    assert tiers.stats[Tier.HOST].present == 1


def test_one_call_copies_down_all_that_it_needs_room_for() -> None:
    """As there: the first eviction blocks the call, which evicts for the rest of the move at once."""
    manager, tiers, _ = make(4)
    for block in (1, 2, 3, 4):
        use(manager, block)
    for block in (1, 2, 3, 4):
        deref(manager, block)
    move = Use([FullBlock(block) for block in (5, 6, 7)], lineage=[(5, None), (6, 5), (7, 6)])
    assert manager.process(move) == 0
    assert (manager.num_active_blocks, manager.num_inactive_blocks) == (3, 1)
    assert tiers.deadline() == 3.0  # one batch
    tick(tiers)
    assert manager.process(move) == 3
    manager.check_integrity()
