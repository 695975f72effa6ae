"""What a block manager does, case by case; `test_mocker` has the original's cases, and `test_manager_machine` any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from kvist.blocks import (
    BlockManager,
    Cleared,
    Deref,
    Event,
    EventLog,
    FullBlock,
    PartialBlock,
    PrefillCost,
    Promote,
    Removed,
    Resident,
    Stored,
    Tier,
    UniqueBlock,
    Use,
)
from kvist.blocks.policy import POLICIES, Lru
from kvist.errors import Conflict, IntegrityError, InvalidInput, KvistError, NotFound, PoolExhausted


class Heard:
    """What a manager published since it was last asked."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[object]:
        data = [event.data for event in self.events]
        self.events.clear()
        return data


class Reading:
    """Says of all that is evicted that it is still read."""

    def __init__(self, reads: bool = True) -> None:
        self.reads = reads
        self.is_reading = False
        self.gone: list[Resident] = []
        self.let_go: list[Resident] = []

    def evicted(self, blocks: Sequence[Resident]) -> Collection[int]:
        self.gone += blocks
        return [block.slot for block in blocks] if self.reads else ()

    def released(self, blocks: Sequence[Resident]) -> None:
        self.let_go += blocks


def full(*names: int) -> list[UniqueBlock]:
    return [FullBlock(name) for name in names]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"capacity": 0}, "capacity must be an integer of 1 or more, not 0"),
        ({"capacity": True}, "capacity must be"),
        ({"block_size": 0}, "block_size must be"),
        ({"dp_rank": -1}, "dp_rank must be"),
        ({"policy": "best"}, "policy must be one of .*lineage"),
        ({"policy": None}, "policy must be a name or a Policy, not None"),
        ({"policy": []}, "policy must be a name or a Policy"),
        ({"events": 5}, "events must be a function or an EventLog, not 5"),
    ],
)
def test_a_manager_that_cannot_be(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        BlockManager(**{"capacity": 4, "block_size": 4, **arguments})


def test_a_policy_of_ones_own_comes_empty() -> None:
    policy: Lru[int] = Lru()
    assert BlockManager(4, 4, policy).use([1, 2]) == 2
    with pytest.raises(InvalidInput, match="must be empty, not hold 2 keys"):
        BlockManager(4, 4, policy)


def test_an_empty_manager(heard: Heard) -> None:
    manager = BlockManager(4, 16, events=heard, dp_rank=3)
    assert (manager.capacity, manager.block_size, manager.dp_rank) == (4, 16, 3)
    assert manager.num_free_blocks == 4
    assert manager.active_fraction == 0
    assert manager.residents() == []
    assert manager.process(Use([])) == 0
    assert manager.process(Deref([])) == 1
    assert manager.match([1]) == manager.peek([1]) == 0
    assert manager.allocate(0) == []
    manager.clear()
    manager.check_integrity()
    assert heard.take() == []


_WRONG: list[tuple[Any, type[KvistError], str]] = [
    ("use", InvalidInput, "a move must be"),
    (Use(full(1), local_hashes=[1, 2]), InvalidInput, "local_hashes of a Use must name 1 full blocks, not 2"),
    (Use(full(1), local_hashes=[-1]), InvalidInput, "local_hash must be an integer from 0"),
    (Use(full(1), local_hashes=7), InvalidInput, "local_hashes of a Use must be a sequence"),  # type: ignore[arg-type]
    (Use(full(1), lineage=[(1, None), (2, None)]), InvalidInput, "lineage of a Use must name 1 full blocks, not 2"),
    (Use(full(1), lineage=[7]), InvalidInput, "a lineage entry must be"),  # type: ignore[list-item]
    (Use(full(1), lineage=[(1 << 128, None)]), InvalidInput, "a lineage hash must be"),
    (Use(full(1), lineage=[(1, 1)]), InvalidInput, "lineage 1 would be its own ancestor"),
    (Use(full(1, 2), lineage=[(1, 2), (2, 1)]), InvalidInput, "lineage 2 would be its own ancestor"),
    (Use(full(1, 1), lineage=[(1, None), (2, None)]), InvalidInput, "block 1 is of lineage 1, not 2"),
    (Use(full(1, 2), lineage=[(1, None), (1, 5)]), InvalidInput, "the parent of lineage 1 is None, not 5"),
    (Use(full(10), lineage=[(10, 5)]), InvalidInput, "the parent of lineage 10 is None, not 5"),
    (Use(full(10), lineage=[(11, None)]), InvalidInput, "block 10 is of lineage 10, not 11"),
    (Use(full(1), token_ids=[]), InvalidInput, "token_ids of a Use must name 1 full blocks, not 0"),
    (Use(full(1), token_ids=[[1, 2, 3]]), InvalidInput, "must be 4 tokens, not"),
    (Use(full(1), token_ids=[5]), InvalidInput, "must be 4 tokens, not 5"),  # type: ignore[list-item]
    (Use(full(1), parent=PartialBlock(uuid4())), InvalidInput, "the parent of a Use must be a FullBlock"),
    (Use(full(1), parent=FullBlock(-1)), InvalidInput, "the parent's sequence_hash must be"),
    (Use(full(1), parent=7), InvalidInput, "the parent of a Use must be a FullBlock"),  # type: ignore[arg-type]
    (Use(full(1, 2), parent=FullBlock(2)), InvalidInput, "block 2 cannot be its own ancestor"),
    (Use(full(-1)), InvalidInput, "sequence_hash must be an integer from 0 to 2\\*\\*64-1, not -1"),
    (Use(full(1 << 64)), InvalidInput, "sequence_hash must be"),
    (Use([FullBlock("a")]), InvalidInput, "sequence_hash must be"),  # type: ignore[arg-type]
    (Use([FullBlock([])]), InvalidInput, "sequence_hash must be"),  # type: ignore[arg-type]
    (Use([FullBlock(1), 2]), InvalidInput, "Use needs FullBlock or PartialBlock, not 2"),  # type: ignore[list-item]
    (Use(3), InvalidInput, "Use needs a sequence of blocks"),  # type: ignore[arg-type]
    (Use([PartialBlock("a")]), InvalidInput, "Use needs FullBlock or PartialBlock"),  # type: ignore[arg-type]
    (Deref(full(1)), NotFound, "block 1 was to be given back 1 times, and is held 0 times"),
    (Deref(full(10, 10)), NotFound, "block 10 was to be given back 2 times, and is held 1 times"),
    (Deref(full(11, 10, 12)), NotFound, "block 12"),
    (Deref([PartialBlock(uuid4())]), NotFound, "was to be given back 1 times, and is held 0 times"),
    (Deref([FullBlock([])]), InvalidInput, "sequence_hash"),  # type: ignore[arg-type]
    (Deref(3), InvalidInput, "Deref needs a sequence of blocks"),  # type: ignore[arg-type]
    (Promote(uuid4(), 1), NotFound, "was to be promoted, and is not held"),
    (Promote("a", 1), InvalidInput, "Promote needs the uuid"),  # type: ignore[arg-type]
    (Promote(uuid4(), 1, parent_hash=1), InvalidInput, "block 1 cannot be its own ancestor"),
]


@pytest.mark.parametrize(("move", "error", "match"), _WRONG)
def test_a_wrong_move_changes_nothing(heard: Heard, move: Any, error: type[KvistError], match: str) -> None:
    manager = BlockManager(8, 4, events=heard)
    manager.use([10, 11])
    heard.take()
    with pytest.raises(error, match=match):
        manager.process(move)
    manager.check_integrity()
    assert [block.sequence_hash for block in manager.residents()] == [10, 11]
    assert manager.num_active_block_refs == 2
    assert heard.take() == []


def test_what_is_hit_is_not_evicted_for_it(heard: Heard) -> None:
    """Block 1 is the oldest leaf; the original would evict what a later part of the move is about to hit."""
    manager = BlockManager(3, 4, events=heard)
    for name in (1, 2, 3):
        manager.use([name])
    for name in (1, 2, 3):
        manager.deref([name])
    heard.take()
    assert manager.use([4, 1]) == 2
    assert heard.take() == [Removed([2]), Stored([4])]
    assert [block.slot for block in manager.residents()] == [0, 2, 1]


def test_the_longest_part_that_fits_is_handled(heard: Heard) -> None:
    manager = BlockManager(4, 4, events=heard)
    manager.use([1, 2])
    heard.take()
    assert manager.use([1, 3, 2, 4, 5]) == 4
    assert heard.take() == [Stored([3], parent=1), Stored([4], parent=2)]
    assert manager.num_active_block_refs == 6
    manager.check_integrity()


def test_partial_blocks_take_slots_and_tell_nothing(heard: Heard) -> None:
    manager = BlockManager(3, 4, events=heard)
    first, second = PartialBlock(uuid4()), PartialBlock(uuid4())
    assert manager.process(Use([FullBlock(1), first])) == 2
    assert manager.process(Use([first])) == 1
    assert manager.process(Use([first, second, FullBlock(2)])) == 2
    assert (manager.num_active_blocks, manager.num_partial_blocks, manager.num_active_block_refs) == (3, 2, 3)
    manager.process(Deref([first, FullBlock(1)]))
    assert manager.num_active_blocks == 1
    assert heard.take() == [Stored([1])]
    manager.check_integrity()


@pytest.mark.parametrize("held", [True, False])
def test_promote_to_what_is_there_gives_the_slot_back(heard: Heard, held: bool) -> None:
    manager = BlockManager(3, 4, events=heard)
    partial = PartialBlock(uuid4())
    manager.use([1, 2])
    if not held:
        manager.deref([2, 1])
    manager.process(Use([partial]))
    heard.take()
    manager.process(Promote(partial.uuid, 2, parent_hash=1))
    assert manager.refs(2) == 1 + held
    assert manager.num_free_blocks == 1
    assert heard.take() == []
    manager.check_integrity()


def test_promote_stores_in_its_own_slot(heard: Heard) -> None:
    manager = BlockManager(3, 2, events=heard)
    partial = PartialBlock(uuid4())
    manager.process(Use([FullBlock(1), partial]))
    manager.process(Promote(partial.uuid, 2, parent_hash=1, local_hash=22, token_ids=[5, 6]))
    assert heard.take() == [Stored([1]), Stored([2], 1, [22], [[5, 6]])]
    block = manager.residents()[1]
    assert block == Resident(2, 1, 2, 1, 1, 22, [5, 6])


def test_a_block_of_two_names(heard: Heard) -> None:
    """References belong to names; all names go with the block, the latest used first."""
    manager = BlockManager(1, 4, events=heard)
    for name in (1, 2, 1):
        manager.process(Use(full(name), lineage=[(100, None)]))
    assert (manager.refs(1), manager.refs(2), manager.num_active_blocks) == (2, 1, 1)
    with pytest.raises(NotFound, match="given back 2 times, and is held 1 times"):
        manager.process(Deref(full(2, 2)))
    manager.process(Deref(full(1, 1)))
    assert manager.num_inactive_blocks == 0
    manager.process(Deref(full(2)))
    assert manager.num_inactive_blocks == 1
    assert manager.peek([2]) == manager.peek([1]) == manager.match([2]) == 1
    manager.deref([2])
    manager.check_integrity()
    assert manager.use([3]) == 1
    assert heard.take() == [Stored([1]), Stored([2]), Removed([2, 1]), Stored([3])]
    manager.check_integrity()


def test_a_name_that_is_another_blocks_lineage() -> None:
    manager = BlockManager(4, 4)
    manager.process(Use(full(5), lineage=[(7, None)]))
    manager.process(Use(full(7), lineage=[(5, None)]))
    assert [(block.sequence_hash, block.lineage_hash) for block in manager.residents()] == [(5, 7), (7, 5)]
    manager.process(Deref(full(5)))
    assert (manager.refs(5), manager.refs(7)) == (0, 1)
    manager.check_integrity()


def test_an_order_that_contradicts_the_first_makes_no_circle() -> None:
    manager = BlockManager(2, 4, "lru")
    manager.use([1, 2])
    manager.deref([1])
    assert manager.use([3]) == 1
    manager.deref([3])
    assert manager.use([2, 1]) == 2
    manager.check_integrity()
    assert manager.residents()[1].lineage_parent is None


def test_match_refers_and_peek_does_not() -> None:
    manager = BlockManager(4, 4)
    manager.use([1, 2, 3])
    manager.deref([3, 2, 1])
    assert manager.peek([1, 2, 4]) == 2
    assert manager.num_active_blocks == 0
    assert manager.match([1, 2, 4], whole=True) == 0
    assert manager.match([1, 2, 4]) == 2
    assert manager.match([1]) == 1
    assert manager.num_active_block_refs == 3
    assert manager.match([]) == 0
    with pytest.raises(InvalidInput, match="given twice"):
        manager.match([1, 1])
    manager.check_integrity()


def test_allocate_is_all_or_nothing(heard: Heard) -> None:
    manager = BlockManager(4, 4, events=heard)
    manager.use([1, 2, 3])
    manager.deref([3, 2])
    heard.take()
    with pytest.raises(PoolExhausted, match="4 slots were asked for; 1 are free, 2 inactive and 0 on their way of 4"):
        manager.allocate(4)
    for wrong in (-1, 1.5, "a", True):
        with pytest.raises(InvalidInput, match="cannot allocate"):
            manager.allocate(wrong)  # type: ignore[arg-type]
    manager.check_integrity()
    assert heard.take() == []
    assert manager.allocate(2) == [3, 2]
    assert heard.take() == [Removed([3])]
    assert manager.num_active_blocks == 3
    for slots in ([0], [3, 3], [9]):
        with pytest.raises(NotFound, match="is not allocated, or given twice"):
            manager.free(slots)
    manager.free([2, 3])
    assert manager.allocate(2) == [2, 3]
    manager.check_integrity()


def test_register_parts_runs_where_a_block_is_there_already(heard: Heard) -> None:
    manager = BlockManager(8, 2, events=heard)
    manager.use([1, 2])
    slots = manager.allocate(4)
    heard.take()
    blocks = [Resident(name, -1, name, name - 1 or None, local_hash=name * 10) for name in (2, 3, 4)]
    assert manager.register(blocks, slots, parent=1) == 3
    assert heard.take() == [Stored([3, 4], 2, [30, 40])]
    assert manager.num_inactive_blocks == 2
    assert manager.num_active_blocks == 3  # two are held, and one slot is left over
    manager.free(slots[3:])
    assert manager.register(blocks, manager.allocate(1)) == 1
    assert manager.register([], []) == 0
    manager.check_integrity()


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ([Resident(3, -1, 3), Resident(3, -1, 4)], "given twice"),
        ([Resident(3, -1, 4), Resident(5, -1, 4)], "given twice"),
        ([Resident(-3, -1, 3)], "sequence_hash must be"),
        ([Resident(1, -1, 3)], "block 1 is of lineage 1, not 3"),
        ([Resident(2, -1, 2, 5)], "the parent of lineage 2 is 1, not 5"),
        ([Resident(3, -1, 3, 3)], "lineage 3 would be its own ancestor"),
        ([Resident(3, -1, 3, token_ids=[1])], "must be 2 tokens"),
    ],
)
def test_what_cannot_be_registered(blocks: list[Resident], match: str) -> None:
    manager = BlockManager(8, 2)
    manager.use([1, 2])
    slots = manager.allocate(2)
    with pytest.raises(InvalidInput, match=match):
        manager.register(blocks, slots)
    with pytest.raises(NotFound):
        manager.register(blocks, [0])
    manager.free(slots)
    manager.check_integrity()


def test_clear(heard: Heard) -> None:
    manager = BlockManager(4, 4, events=heard)
    manager.use([1, 2])
    with pytest.raises(Conflict, match="2 blocks are active"):
        manager.clear()
    manager.deref([2, 1])
    manager.clear()
    assert manager.num_free_blocks == 4
    assert heard.take() == [Stored([1, 2]), Cleared()]
    manager.use([1])
    manager.deref([1])
    manager.attach(Reading())
    manager.clear()
    assert heard.take() == [Stored([1]), Cleared()]
    manager.check_integrity()


@pytest.mark.parametrize("attached", [True, False])
def test_clear_is_of_the_device_alone(heard: Heard, attached: bool) -> None:
    """Cleared empties all tiers of an index: once the log told of another, it is not said any more."""
    manager = BlockManager(4, 4, events=heard)
    if attached:
        manager.attach(Reading())
    manager.use([1, 2])
    manager.deref([2, 1])
    manager.log.emit(Stored([1]), Tier.HOST)
    heard.take()
    manager.clear()
    assert heard.take() == [Removed([2, 1])]


def test_what_is_being_copied_is_not_cleared(heard: Heard) -> None:
    manager = BlockManager(4, 4, events=heard)
    reading = Reading()
    manager.attach(reading)
    manager.use([1, 2])
    manager.deref([2, 1])
    heard.take()
    reading.is_reading = True
    with pytest.raises(Conflict, match="being copied"):
        manager.clear()
    assert manager.peek([1, 2]) == 2
    assert heard.take() == []
    reading.is_reading = False
    manager.clear()
    assert manager.num_free_blocks == 4


def test_whoever_is_attached_is_told(heard: Heard) -> None:
    manager = BlockManager(2, 2, events=heard)
    reading = Reading(reads=False)
    manager.attach(reading)
    assert manager.has_offload
    with pytest.raises(Conflict, match="already"):
        manager.attach(reading)
    manager.process(Use(full(1, 2), local_hashes=[10, 20], token_ids=[[1, 1], [2, 2]]))
    manager.deref([2, 1])
    assert [block.sequence_hash for block in reading.let_go] == [2, 1]
    assert manager.use([3]) == 1
    assert reading.gone == [Resident(2, 1, 2, 1, 1, 20, [2, 2])]
    manager.detach()
    assert not manager.has_offload
    with pytest.raises(NotFound, match="nobody"):
        manager.detach()
    assert manager.use([4]) == 1
    assert len(reading.gone) == 1
    manager.check_integrity()


def test_what_is_still_read_counts_as_active(heard: Heard) -> None:
    """One round for the whole move, and it handles what fits without those slots."""
    manager = BlockManager(4, 4, events=heard)
    manager.use([1, 2, 3])
    manager.deref([3, 2, 1])
    reading = Reading()
    manager.attach(reading)
    heard.take()
    assert manager.use([1, 5, 6, 7]) == 2
    assert [block.sequence_hash for block in reading.gone] == [3, 2]
    assert heard.take() == [Removed([3, 2]), Stored([5], parent=1)]
    assert (manager.num_active_blocks, manager.num_inactive_blocks, manager.num_free_blocks) == (4, 0, 0)
    manager.check_integrity()
    manager.free([block.slot for block in reading.gone])
    assert manager.use([6, 7], parent=5) == 2
    manager.check_integrity()


def test_allocate_gives_nothing_while_the_evicted_are_read() -> None:
    manager = BlockManager(2, 4)
    manager.use([1, 2])
    manager.deref([2, 1])
    reading = Reading()
    manager.attach(reading)
    assert manager.allocate(1) == []
    assert manager.num_active_blocks == 1
    manager.free([block.slot for block in reading.gone])
    assert manager.allocate(1) == [1]
    manager.check_integrity()


def test_asking_again_evicts_no_more(heard: Heard) -> None:
    """Slots that are still read are on their way. The original evicts anew each time it is asked."""
    manager = BlockManager(10, 4, "lfu", events=heard)
    manager.use(list(range(10)))
    manager.deref(list(range(9, -1, -1)))
    reading = Reading()
    manager.attach(reading)
    heard.take()
    uses = []
    for _ in range(5):
        assert manager.use([20, 21, 0]) == 0
        assert manager.allocate(2) == []
        uses.append(list(manager._policy))
    assert [block.sequence_hash for block in reading.gone] == [9, 8]
    assert manager.num_inactive_blocks == 8
    assert uses[1:] == uses[:-1]  # and the hit that was not reached counts no more uses
    manager.free([reading.gone[0].slot])
    assert manager.use([20, 21, 22]) == 1
    assert [block.sequence_hash for block in reading.gone[2:]] == [7]
    manager.free([block.slot for block in reading.gone[1:]])
    assert manager.use([21, 22], parent=20) == 2
    assert manager.num_inactive_blocks == 7
    manager.check_integrity()


@pytest.mark.parametrize("attached", [True, False])
def test_the_block_before_a_move_stays(heard: Heard, attached: bool) -> None:
    """A router that just heard that it went could not place what follows it."""
    manager = BlockManager(2, 4, events=heard)
    manager.use([2])
    manager.use([9])
    manager.deref([2])
    manager.deref([9])
    if attached:
        manager.attach(Reading(reads=False))
    heard.take()
    assert manager.use([3], parent=2) == 1
    assert heard.take() == [Removed([9]), Stored([3], parent=2)]
    assert manager.num_inactive_blocks == 1
    assert manager.use([4], parent=2) == 0
    assert heard.take() == []
    manager.deref([3])
    assert manager.process(Use([FullBlock(4), PartialBlock(uuid4())], parent=FullBlock(2))) == 1
    assert heard.take() == [Removed([3]), Stored([4], parent=2)]
    manager.check_integrity()


def test_a_parent_goes_by_the_name_that_was_told_first(heard: Heard) -> None:
    """An index that knows the block already keeps the name by which it heard of it."""
    manager = BlockManager(8, 4, events=heard)
    for name in (1, 2):
        manager.process(Use(full(name), lineage=[(100, None)]))
    manager.process(Use(full(3), lineage=[(103, 100)], parent=FullBlock(2)))
    manager.process(Use(full(2, 4), lineage=[(100, None), (104, 100)]))
    partial = PartialBlock(uuid4())
    manager.process(Use([partial]))
    manager.process(Promote(partial.uuid, 5, 2))
    assert manager.register([Resident(6, -1, 106, 100)], manager.allocate(1), parent=2) == 1
    assert heard.take() == [
        Stored([1]),
        Stored([2]),
        Stored([3], parent=1),
        Stored([4], parent=1),
        Stored([5], parent=1),
        Stored([6], 1, [0]),
    ]
    assert [block.parent for block in manager.residents()] == [None, 1, 1, 1, 1]
    manager.check_integrity()


def test_a_sink_that_fails_hears_all_the_same() -> None:
    """Its error comes when the move is done and told, so that an index that missed one event can be told of that."""
    heard: list[Event] = []

    def sink(event: Event) -> None:
        heard.append(event)
        if isinstance(event.data, Removed):
            raise OSError("no room")

    manager = BlockManager(1, 4, events=sink)
    manager.use([1])
    manager.deref([1])
    with pytest.raises(OSError, match="no room"):
        manager.use([2])
    assert [event.data for event in heard] == [Stored([1]), Removed([1]), Stored([2])]
    assert manager.refs(2) == 1
    manager.check_integrity()


_BAD: list[Callable[[BlockManager], object]] = [
    lambda manager: manager.match([[1]]),  # type: ignore[list-item]
    lambda manager: manager.match(3),  # type: ignore[arg-type]
    lambda manager: manager.peek([[1]]),  # type: ignore[list-item]
    lambda manager: manager.peek(3),  # type: ignore[arg-type]
    lambda manager: manager.refs([]),  # type: ignore[arg-type]
    lambda manager: manager.free(3),  # type: ignore[arg-type]
    lambda manager: manager.free([[]]),  # type: ignore[list-item]
    lambda manager: manager.use(3),  # type: ignore[arg-type]
    lambda manager: manager.use([1.0]),  # type: ignore[list-item]
    lambda manager: manager.use([True]),
    lambda manager: manager.use([1], token_ids=["abcd"]),  # type: ignore[list-item]
    lambda manager: manager.use([1], token_ids=[{1, 2, 3, 4}]),  # type: ignore[list-item]
    lambda manager: manager.use([1], local_hashes=Array()),  # type: ignore[arg-type]
    lambda manager: manager.use([1], token_ids=Array()),  # type: ignore[arg-type]
    lambda manager: manager.process(Use(full(1), lineage=Array())),  # type: ignore[arg-type]
    lambda manager: manager.deref([2, 1.0]),  # type: ignore[list-item]
    lambda manager: manager.deref([2, True]),
    lambda manager: manager.deref(3),  # type: ignore[arg-type]
    lambda manager: manager.register([3], []),  # type: ignore[list-item]
    lambda manager: manager.register(3, []),  # type: ignore[arg-type]
]


class Array:
    """Neither true nor false, as numpy's."""

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("number", range(len(_BAD)))
@pytest.mark.parametrize("lane", ["fast", "slow"])
def test_what_is_no_hash_and_no_slot(heard: Heard, number: int, lane: str) -> None:
    manager = (BlockManager if lane == "fast" else OneByOne)(4, 4, events=heard)
    for name in (1, 1, 2):
        manager.use([name])
    manager.match([2])
    manager.deref([2])
    heard.take()
    with pytest.raises(InvalidInput):
        _BAD[number](manager)
    manager.check_integrity()
    assert (manager.num_active_block_refs, manager.num_free_blocks) == (3, 2)
    assert heard.take() == []


def test_hashes_may_come_once() -> None:
    """Also if it is not the fast lane that takes them."""
    manager = BlockManager(4, 4)
    manager.process(Use(full(7), lineage=[(8, None)]))
    assert manager.use(name for name in (1, 2)) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(("lineage", "cached"), [((), 8), (((100, None),), 8), (((100, None), (7, 100)), 8)])
def test_prefill_cost_by_lineage(lineage: tuple[Any, ...], cached: int) -> None:
    manager = BlockManager(8, 4)
    manager.process(Use(full(1, 2), lineage=[(100, None), (102, 100)]))
    sequence = SimpleNamespace(
        unique_blocks=full(1, 2, 3), lineage=lineage, num_input_tokens=12, enable_prefix_caching=True
    )
    assert manager.prefill_cost(sequence) == PrefillCost(1, 12 - cached, cached)


def test_a_log_is_shared() -> None:
    events: list[Event] = []
    log = EventLog(events.append, dp_rank=2)
    manager = BlockManager(4, 4, events=log)
    assert manager.dp_rank == 2
    manager.use([1])
    manager.log.emit(Stored([1]), Tier.HOST)
    assert [(event.event_id, event.tier, event.dp_rank) for event in events] == [
        (0, "device", 2),
        (1, "host_pinned", 2),
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda manager: manager._slots.take(1),
        lambda manager: manager._table.odd.update({5: 1}),
        lambda manager: manager._table.parents.update({1: 7}),
        lambda manager: manager._policy.unpin([1]),
        lambda manager: manager._policy.remove([1]),
        lambda manager: manager._references.counts.__setitem__(3, 1),
        lambda manager: manager._references.named.update({1: 1}),
        lambda manager: manager._table.orphans.update({9: 1}),
        lambda manager: manager._table.first.update({1: 2}),
        lambda manager: manager._slots.reading.add(0),
        lambda manager: setattr(manager, "_inactive", 1),
    ],
)
def test_damage_is_found(damage: Callable[[Any], object]) -> None:
    manager = BlockManager(4, 4)
    manager.use([1, 2])
    manager.check_integrity()
    damage(manager)
    with pytest.raises(IntegrityError):
        manager.check_integrity()


class OneByOne(BlockManager):
    """A manager without the fast lane."""

    def _use_plain(self, *_: object) -> None:
        return None

    def deref(self, hashes: Sequence[int]) -> None:
        self._deref_any(full(*hashes) if isinstance(hashes, Sequence) else hashes)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(2))
def test_the_fast_lane_does_what_the_slow_one_does(policy: str, seed: int) -> None:
    rng = Random(seed)
    heard = Heard(), Heard()
    fast, slow = BlockManager(48, 4, policy, heard[0]), OneByOne(48, 4, policy, heard[1])
    chains = [[rng.getrandbits(64) for _ in range(rng.randint(1, 16))] for _ in range(4)]
    hearing = Reading(reads=False), Reading(reads=False)
    if seed:
        fast.attach(hearing[0])
        slow.attach(hearing[1])
    held: list[list[UniqueBlock]] = []
    for _ in range(400):
        if held and rng.random() < 0.5:
            blocks = held.pop(rng.randrange(len(held)))[::-1]
            if rng.random() < 0.2:
                rng.shuffle(blocks)
            moves: list[Use | Deref] = [Deref(blocks)]
        else:
            chain = rng.choice(chains)
            if rng.random() < 0.3:
                chains.append(chain := chain[: rng.randint(0, len(chain))] + [rng.getrandbits(64) for _ in range(3)])
            elif chain and rng.random() < 0.05:
                chain = [*chain, rng.choice(chain)]
            blocks = full(*chain)
            if rng.random() < 0.4:
                blocks.append(PartialBlock(uuid4()))
            cut = rng.randint(0, len(chain)) if rng.random() < 0.2 else 0
            parent = FullBlock(chain[cut - 1]) if cut else None
            tokens = [[name % 7] * 4 for name in chain[cut:]] if rng.random() < 0.5 else None
            moves = [Use(blocks[cut:], chain[cut:] if rng.random() < 0.5 else (), (), tokens, parent)]
        for move in moves:
            handled = fast.process(move)
            assert slow.process(move) == handled
            if isinstance(move, Use):
                held.append(list(move.blocks[:handled]))
        assert heard[0].take() == heard[1].take()
        assert (hearing[0].gone, hearing[0].let_go) == (hearing[1].gone, hearing[1].let_go)
        assert fast.residents() == slow.residents()
        assert list(fast._policy) == list(slow._policy)
        assert list(fast._slots) == list(slow._slots)
        fast.check_integrity()
        slow.check_integrity()
