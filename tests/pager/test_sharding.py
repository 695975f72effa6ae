"""Dealing KV heads out to tensor-parallel ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput
from kvist.pager.sharding import rank_heads


@given(st.integers(1, 32), st.integers(1, 32))
def test_every_rank_has_as_many_heads_and_every_head_is_as_often_there(each: int, tp: int) -> None:
    ranks = [rank_heads(each * tp, tp, rank) for rank in range(tp)]
    assert [head for heads in ranks for head in heads] == list(range(each * tp))
    assert {len(heads) for heads in ranks} == {each}


@given(st.integers(1, 32), st.integers(1, 32))
def test_with_more_ranks_than_heads_each_head_is_with_neighbours(heads: int, copies: int) -> None:
    ranks = [rank_heads(heads, heads * copies, rank) for rank in range(heads * copies)]
    assert [(one.start, len(one)) for one in ranks] == [(head, 1) for head in range(heads) for _ in range(copies)]


@pytest.mark.parametrize(
    ("heads", "tp", "rank", "says"),
    [
        (3, 2, 0, "evenly"),
        (2, 3, 1, "evenly"),
        (4, 2, 2, "rank"),
        (4, 2, -1, "rank"),
        (0, 1, 0, "least"),
        (1, 0, 0, "least"),
    ],
)
def test_refused(heads: int, tp: int, rank: int, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        rank_heads(heads, tp, rank)
