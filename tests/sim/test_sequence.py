"""The blocks of one request."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from kvist.blocks import BlockManager, Deref, FullBlock, Move, PartialBlock, Promote, Use
from kvist.errors import Conflict, InvalidInput
from kvist.hashing import local_block_hashes, sequence_hashes
from kvist.sim.sequence import ActiveSequence


def sequence(tokens: int = 10, output: int = 8, block_size: int = 4, **options: Any) -> ActiveSequence:
    return ActiveSequence(range(tokens), output, block_size, rng=Random(1), **options)


def test_its_blocks_are_named_by_their_tokens() -> None:
    request = sequence()
    names = sequence_hashes(local_block_hashes(range(10), 4))
    assert list(request.unique_blocks[:2]) == [FullBlock(name) for name in names]
    assert isinstance(request.unique_blocks[2], PartialBlock)
    assert list(request.local_hashes) == local_block_hashes(range(10), 4)
    assert (len(request), request.num_input_tokens, request.generated_tokens) == (10, 10, 0)
    assert (request.block_size, request.max_output_tokens, request.blocks_to_completion) == (4, 8, 5)
    assert request.lineage == ()
    assert not request.is_done


def test_a_prompt_of_full_blocks_has_no_partial_one() -> None:
    assert all(isinstance(block, FullBlock) for block in sequence(8).unique_blocks)


def test_without_prefix_caching_its_names_are_its_own() -> None:
    rng = Random(1)
    first, second = (ActiveSequence(range(8), 4, 4, False, with_token_ids=True, rng=rng) for _ in range(2))
    assert not {*first.unique_blocks} & {*second.unique_blocks}
    move = first.prepare_allocation(8)
    assert move is not None
    assert (list(move.local_hashes), move.token_ids) == ([], None)
    assert first.unique_blocks == ActiveSequence(range(8), 4, 4, False, rng=Random(1)).unique_blocks
    first.push(8)
    (promote, _) = [move for token in range(9, 13) for move in first.push(token)]
    assert isinstance(promote, Promote)
    assert promote.local_hash == 0


@pytest.mark.parametrize(
    ("tokens", "output", "block_size"), [(0, 1, 4), (1, 0, 4), (1, 1, 1)], ids=["prompt", "output", "block size"]
)
def test_sequences_that_cannot_be(tokens: int, output: int, block_size: int) -> None:
    with pytest.raises(InvalidInput):
        sequence(tokens, output, block_size)


def test_allocation_in_chunks() -> None:
    request = sequence(with_token_ids=True)
    first = request.prepare_allocation(6)
    assert first is not None
    assert first.blocks == list(request.unique_blocks[:2])
    assert first.parent is None
    assert first.token_ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(first.local_hashes) == list(request.local_hashes)
    request.commit_allocation(6)
    assert request.num_allocated_tokens == 6
    assert request.prepare_allocation(8) is None
    rest = request.take_creation_signal()
    assert rest is not None
    assert rest.blocks == list(request.unique_blocks[2:])
    assert rest.parent == request.unique_blocks[1]
    assert request.take_creation_signal() is None
    for wrong in (-1, 11):
        with pytest.raises(InvalidInput, match="10 tokens"):
            request.prepare_allocation(wrong)
    with pytest.raises(InvalidInput, match="10 tokens have blocks, which is more than 9"):
        request.commit_allocation(9)


def test_a_full_block_is_promoted_when_the_next_one_opens() -> None:
    request = sequence(6, with_token_ids=True)
    partial = request.unique_blocks[1]
    assert isinstance(partial, PartialBlock)
    assert [move for token in (6, 7) for move in request.generate(token)] == []
    assert request.unique_blocks[1] == partial
    promote, use = request.generate(8)
    names = sequence_hashes(local_block_hashes(range(8), 4))
    assert promote == Promote(partial.uuid, names[1], names[0], request.local_hashes[1], None, [4, 5, 6, 7])
    assert use == Use([request.unique_blocks[2]], parent=FullBlock(names[1]))
    assert request.token_ids == tuple(range(9))


def test_pop_undoes_a_token() -> None:
    request = sequence(6)
    for token in (6, 7, 8):
        request.generate(token)
    request.commit_allocation(9)
    request.pop()
    assert (len(request), request.num_allocated_tokens, len(request.unique_blocks)) == (8, 8, 2)
    assert all(isinstance(block, FullBlock) for block in request.unique_blocks)
    (use,) = request.generate(8)
    assert isinstance(use, Use)
    request.pop()
    with pytest.raises(Conflict, match="in a full block, which was promoted"):
        request.pop()
    assert request.token_ids == tuple(range(8))
    fresh = sequence(6)
    fresh.generate(6)
    fresh.pop()
    with pytest.raises(Conflict, match="generated nothing"):
        fresh.pop()


def test_a_name_is_that_of_its_tokens_whatever_is_undone() -> None:
    request = ActiveSequence([1, 2], 9, 4, rng=Random(1))
    for token in (3, 4, 5):
        request.push(token)
    request.pop()
    with pytest.raises(Conflict):
        request.pop()
    for token in (99, 5, 5, 5, 5):
        request.push(token)
    names = sequence_hashes(local_block_hashes([1, 2, 3, 4, 99, 5, 5, 5], 4))
    assert list(request.unique_blocks[:2]) == [FullBlock(name) for name in names]


@pytest.mark.parametrize("token", [-1, 1 << 32, 1.0, "a", None, True])
@pytest.mark.parametrize("caching", [True, False])
def test_what_is_no_token(token: Any, caching: bool) -> None:
    with pytest.raises(InvalidInput, match="a token must be an integer"):
        ActiveSequence([1, token], 4, 4, caching, rng=Random(1))
    request = ActiveSequence([1, 2, 3, 4], 4, 4, caching, rng=Random(1))
    with pytest.raises(InvalidInput, match="a token must be an integer"):
        request.push(token)
    assert (len(request), len(request.unique_blocks)) == (4, 1)
    assert [type(move) for move in request.push(5)] == [Use]


def test_the_last_token_gives_all_back() -> None:
    request = sequence(6, output=3)
    manager = BlockManager(8, 4)
    move: Move | None = request.take_creation_signal()
    assert move is not None
    manager.process(move)
    moves = [move for _ in range(3) for move in request.generate()]
    assert [type(move) for move in moves] == [Promote, Use, Deref]
    assert moves[-1] == Deref(list(request.unique_blocks[::-1]))
    for move in moves:
        manager.process(move)
        manager.check_integrity()
    assert request.is_done
    assert request.num_allocated_tokens == 0
    assert request.free_signal() == request.reset_with_signal() == []
    assert manager.num_active_blocks == 0
    assert manager.num_inactive_blocks == 2
    with pytest.raises(Conflict, match="all its 3 tokens"):
        request.generate()


def test_a_preempted_one_gives_back_what_it_has_and_nothing_else() -> None:
    request = sequence()
    request.commit_allocation(4)
    assert request.reset_with_signal() == [Deref(list(request.unique_blocks[:1]))]
    assert request.reset_with_signal() == []
    assert request.num_allocated_tokens == 0


def test_equal_seeds_give_equal_sequences() -> None:
    moves = [[request.generate() for _ in range(8)] for request in (sequence(), sequence())]
    assert moves[0] == moves[1]
