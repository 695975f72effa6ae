"""The tests of the original's block manager, by name and with its expectations; those of its offload are elsewhere.

Where we do otherwise on purpose, the test says what the original does, and why it is not what happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from uuid import UUID, uuid4

import pytest

from kvist.blocks import (
    BlockManager,
    Deref,
    Event,
    FullBlock,
    LineageEntry,
    PartialBlock,
    Promote,
    Removed,
    Stored,
    Use,
)
from kvist.errors import InvalidInput, NotFound
from kvist.sim.sequence import ActiveSequence
from kvist.testing.blocks import Follower

pytestmark = pytest.mark.usefixtures("whole")

CHAINS = {
    0: None,
    1: 0,
    2: 1,
    3: 2,
    4: 3,
    5: 1,
    6: 5,
    7: 2,
    8: 7,
    9: 8,
    10: None,
    11: 10,
    12: 11,
    13: None,
}
"""The lineage of the lifecycle test: the parent of each block."""


class Driven:
    """A manager, what it published since it was last asked, and the short calls of the original's tests."""

    def __init__(self, capacity: int, block_size: int = 16, policy: str = "lineage") -> None:
        self.published: list[Event] = []
        self.told: list[Stored | Removed] = []  # of them, all that `events` gave
        self.manager = BlockManager(capacity, block_size, policy, self.published.append)

    def use(self, *blocks: int, lineage: Sequence[LineageEntry]) -> int:
        handled = self.manager.process(Use([FullBlock(block) for block in blocks], lineage=lineage))
        self.manager.check_integrity()
        return handled

    def use_full(self, block: int, lineage: int) -> int:
        return self.use(block, lineage=[(lineage, None)])

    def use_partial(self, uuid: UUID) -> int:
        return self.manager.process(Use([PartialBlock(uuid)]))

    def deref(self, *blocks: int) -> None:
        self.manager.process(Deref([FullBlock(block) for block in blocks]))
        self.manager.check_integrity()

    def events(self) -> list[Stored | Removed]:
        data = [event.data for event in self.published]
        self.published.clear()
        known = [each for each in data if isinstance(each, Stored | Removed)]
        assert known == data
        self.told += known
        return known


def heard(events: Sequence[Stored | Removed]) -> dict[int, int | None]:
    """What an index holds that heard these: of each block the one before it."""
    index = Follower()
    for number, data in enumerate(events):
        index.hear(Event(number, data))
    return {name: told.parent for name, told in index.names.items()}


def most(events: Sequence[Stored | Removed]) -> int:
    """How many blocks such an index holds at most while it hears them."""
    return max(len(heard(events[: number + 1])) for number in range(len(events)))


def test_use_single_full_block() -> None:
    driven = Driven(10)
    assert driven.use_full(1, 100) == 1
    assert driven.manager.num_active_blocks == 1


def test_use_rejects_short_token_ids_before_mutating_state() -> None:
    driven = Driven(10, block_size=4)
    move = Use(
        [FullBlock(1), FullBlock(2)],
        local_hashes=[101, 102],
        lineage=[(100, None), (200, None)],
        token_ids=[[1, 2, 3, 4]],
    )
    with pytest.raises(InvalidInput, match="token_ids of a Use must name 2 full blocks, not 1"):
        driven.manager.process(move)
    assert driven.manager.num_active_blocks == 0
    assert driven.manager.residents() == []
    assert driven.events() == []


def test_duplicate_use_bumps_refcount() -> None:
    driven = Driven(10)
    driven.use_full(1, 100)
    driven.use_full(1, 100)
    assert driven.manager.num_active_blocks == 1
    assert driven.manager.num_active_block_refs == 2


def test_capacity_exhaustion_returns_partial() -> None:
    driven = Driven(4)
    for block in range(4):
        assert driven.use_full(block, block + 100) == 1
    assert driven.use_full(4, 500) == 0


def test_deref_returns_to_inactive() -> None:
    driven = Driven(4)
    driven.use_full(1, 100)
    driven.deref(1)
    assert driven.manager.num_active_blocks == 0


def test_inactive_reuse_via_match_blocks() -> None:
    """The original tells nobody of the second name, and removes the block by the first one only."""
    driven = Driven(10)
    driven.use_full(1, 100)
    driven.deref(1)
    assert driven.use_full(2, 100) == 1
    assert driven.manager.num_active_blocks == 1
    theirs: list[Stored | Removed] = [Stored([1])]
    ours = driven.events()
    assert ours == [Stored([1]), Stored([2])]
    assert heard(theirs) == {1: None}  # no router sends requests for block 2 here
    assert heard(ours) == {1: None, 2: None}


def test_all_names_of_a_block_go_with_it() -> None:
    """Not of the original, which would remove one name of two if it told of both."""
    driven = Driven(1)
    for block in (1, 2):
        driven.use_full(block, 100)
        driven.deref(block)
    driven.use_full(3, 300)
    theirs: list[Stored | Removed] = [Stored([1]), Stored([3]), Removed([1])]
    ours = driven.events()
    assert ours == [Stored([1]), Stored([2]), Removed([2, 1]), Stored([3])]
    assert heard(theirs) == heard(ours) == {3: None}
    assert most(theirs) == 2  # in a pool of one block


def test_eviction_frees_inactive_for_new_allocation() -> None:
    driven = Driven(4)
    for block in range(4):
        driven.use_full(block, block + 100)
    for block in range(4):
        driven.deref(block)
    for block in range(10, 14):
        assert driven.use_full(block, block + 1000) == 1
    assert driven.manager.num_active_blocks == 4


def test_promote_basic() -> None:
    driven = Driven(10)
    uuid = uuid4()
    driven.use_partial(uuid)
    driven.manager.process(Promote(uuid, 42, lineage=(500, None)))
    assert driven.manager.num_active_blocks == 1
    assert driven.manager.num_partial_blocks == 0
    assert driven.manager.refs(42) == 1
    driven.manager.check_integrity()


def test_promote_nonexistent_panics() -> None:
    """A typed error, where the original panics."""
    driven = Driven(10)
    with pytest.raises(NotFound, match="was to be promoted, and is not held"):
        driven.manager.process(Promote(uuid4(), 42, lineage=(500, None)))


def test_deref_partial_returns_to_reset() -> None:
    driven = Driven(10)
    uuid = uuid4()
    driven.use_partial(uuid)
    assert driven.manager.num_partial_blocks == 1
    driven.manager.process(Deref([PartialBlock(uuid)]))
    assert driven.manager.num_partial_blocks == 0
    assert driven.manager.num_active_block_refs == 0
    driven.manager.check_integrity()


def test_prefill_cost_no_overlap() -> None:
    driven = Driven(10)
    sequence = ActiveSequence(range(35), 10, 16, rng=Random(1))
    cost = driven.manager.prefill_cost(sequence)
    assert cost.new_blocks == len(sequence.unique_blocks) == 3
    assert cost.new_tokens == 35
    assert cost.cached_tokens == 0


@pytest.mark.parametrize("policy", ["lru", "multi_lru"])
def test_eviction_backend_lru_and_multi_lru(policy: str) -> None:
    driven = Driven(4, policy=policy)
    for block in range(4):
        assert driven.use_full(block, block + 100) == 1
    for block in range(4):
        driven.deref(block)
    for block in range(10, 14):
        assert driven.use_full(block, block + 1000) == 1
    assert driven.manager.num_active_blocks == 4


def test_failure_on_max_capacity() -> None:
    driven = Driven(10)
    assert driven.use(*range(10), lineage=[(block, None) for block in range(10)]) == 10
    assert driven.manager.num_active_blocks == 10
    assert driven.use_full(10, 10) == 0


def test_block_lifecycle_stringent() -> None:
    """The original publishes each Removed after the Stored that took the slots, so its pool seems too full between."""
    driven = Driven(10)
    manager = driven.manager

    def use(*blocks: int) -> int:
        return driven.use(*blocks, lineage=[(block, CHAINS[block]) for block in blocks])

    def assert_active(refs: dict[int, int]) -> None:
        assert manager.num_active_blocks == len(refs)
        assert manager.num_active_block_refs == sum(refs.values())
        assert {block: manager.refs(block) for block in refs} == refs

    def assert_inactive(*blocks: int) -> None:
        assert manager.num_inactive_blocks == len(blocks)
        assert {block.sequence_hash for block in manager.residents() if not manager.refs(block.sequence_hash)} == {
            *blocks
        }

    assert use(0, 1, 2, 3, 4) == 5
    assert driven.events() == [Stored([0, 1, 2, 3, 4], None)]
    assert use(0, 1, 5, 6) == 4
    assert driven.events() == [Stored([5, 6], 1)]
    assert_active({0: 2, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1})

    driven.deref(4, 3, 2, 1, 0)
    assert driven.events() == []
    assert_active({0: 1, 1: 1, 5: 1, 6: 1})
    assert_inactive(2, 3, 4)
    driven.deref(6, 5, 1, 0)
    assert driven.events() == []
    assert_active({})
    assert_inactive(0, 1, 2, 3, 4, 5, 6)

    assert use(0, 1, 2, 7, 8, 9) == 6
    assert driven.events() == [Stored([7, 8, 9], 2)]
    assert_active({0: 1, 1: 1, 2: 1, 7: 1, 8: 1, 9: 1})
    assert_inactive(3, 4, 5, 6)

    assert use(10, 11, 12) == 3
    theirs = [Stored([10, 11, 12], None), Removed([4, 3, 6])]
    assert driven.events() == theirs[::-1]
    so_far, ours = driven.told[:-2], driven.told[-2:]
    assert heard(so_far + theirs) == heard(so_far + ours)
    assert (most(so_far + theirs), most(so_far + ours)) == (13, 10)
    assert_active(dict.fromkeys([0, 1, 2, 7, 8, 9, 10, 11, 12], 1))
    assert_inactive(5)

    assert use(13) == 1
    theirs = [Stored([13], None), Removed([5])]
    assert driven.events() == theirs[::-1]
    assert_active(dict.fromkeys([0, 1, 2, 7, 8, 9, 10, 11, 12, 13], 1))
    assert manager.num_inactive_blocks == 0


def test_chunked_prefill_parent_hash() -> None:
    sequence = ActiveSequence(range(512), 100, 64, rng=Random(1))
    driven = Driven(256, block_size=64)
    for tokens in (256, 512):
        move = sequence.prepare_allocation(tokens)
        assert move is not None
        assert driven.manager.process(move) == 4
        sequence.commit_allocation(tokens)
    first, second = driven.events()
    assert isinstance(first, Stored)
    assert isinstance(second, Stored)
    assert first.parent is None
    block = sequence.unique_blocks[3]
    assert isinstance(block, FullBlock)
    assert second.parent == block.sequence_hash


def test_repreempt_after_partial_recompute_only_frees_reallocated_blocks() -> None:
    sequence = ActiveSequence(range(6), 16, 4, rng=Random(1))
    manager = BlockManager(16, 4)
    move = sequence.take_creation_signal()
    assert move is not None
    assert manager.process(move) == 2
    for _ in range(3):
        for each in sequence.generate():
            manager.process(each)
        if sequence.generated_tokens < sequence.max_output_tokens:
            sequence.commit_allocation(len(sequence))
    assert manager.num_active_blocks == 3

    for each in sequence.reset_with_signal():
        manager.process(each)
    assert manager.num_active_blocks == 0

    move = sequence.prepare_allocation(sequence.num_input_tokens)
    assert move is not None
    assert manager.process(move) == 2
    sequence.commit_allocation(sequence.num_input_tokens)
    assert manager.num_active_blocks == 2
    for each in sequence.reset_with_signal():
        manager.process(each)
    assert manager.num_active_blocks == 0
    manager.check_integrity()


def test_inactive_hit_does_not_republish_stored() -> None:
    driven = Driven(4)
    driven.use_full(1, 100)
    driven.deref(1)
    driven.use_full(1, 100)
    assert driven.events() == [Stored([1])]


def test_stored_suffix_anchors_to_last_reused_block() -> None:
    driven = Driven(8)
    driven.use(10, 11, lineage=[(10, None), (11, None)])
    driven.deref(10)
    driven.deref(11)
    driven.events()
    driven.use(10, 11, 12, lineage=[(10, None), (11, None), (12, None)])
    assert driven.events() == [Stored([12], parent=11)]


def test_a_hit_between_new_blocks_parts_two_runs() -> None:
    """Not of the original, which publishes one event here, Stored [10, 12] after 11: block 10 is misplaced."""
    driven = Driven(8)
    driven.use(11, lineage=[(11, 10)])
    driven.events()
    driven.use(10, 11, 12, lineage=[(10, None), (11, 10), (12, 11)])
    theirs: list[Stored | Removed] = [Stored([10, 12], parent=11)]
    ours = driven.events()
    assert ours == [Stored([10], parent=None), Stored([12], parent=11)]
    assert heard(theirs) == {10: 11, 12: 10}
    assert heard(ours) == {10: None, 12: 11}


def test_shared_prefix_distinct_vs_refcount() -> None:
    driven = Driven(8)
    driven.use(10, 11, 12, lineage=[(10, None), (11, None), (12, None)])
    assert driven.manager.num_active_blocks == 3
    assert driven.manager.num_active_block_refs == 3
    driven.use(10, 11, 13, lineage=[(10, None), (11, None), (13, None)])
    assert driven.manager.num_active_blocks == 4
    assert driven.manager.num_active_block_refs == 6


def test_random_plh_stable_across_preempt_retry() -> None:
    sequence = ActiveSequence(range(64), 100, 16, False, rng=Random(1))
    driven = Driven(8)
    manager = driven.manager
    move = sequence.take_creation_signal()
    assert move is not None
    assert manager.process(move) == 4
    assert manager.num_active_blocks == 4

    for each in sequence.reset_with_signal():
        manager.process(each)
    assert manager.num_active_blocks == 0
    assert manager.num_inactive_blocks == 4

    move = sequence.take_creation_signal()
    assert move is not None
    assert manager.process(move) == 4
    assert manager.num_active_blocks == 4
    assert manager.num_inactive_blocks == 0
    assert len(driven.events()) == 1


def test_eviction_emits_exact_removed_event() -> None:
    driven = Driven(2)
    driven.use(10, 11, lineage=[(10, None), (11, None)])
    driven.deref(10)
    driven.deref(11)
    assert driven.manager.num_active_blocks == 0
    assert driven.manager.num_inactive_blocks == 2
    driven.events()
    driven.use_full(12, 12)
    removed, stored = driven.events()
    assert isinstance(removed, Removed)
    assert removed.hashes == [10]  # the original allows 10 or 11; 10 became inactive first
    assert stored == Stored([12])
