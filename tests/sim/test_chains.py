"""Chains against a slow obvious model: the tokens of every prompt, and the set of their prefixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput
from kvist.sim.chains import chains
from kvist.sim.trace import Trace, TraceBuilder, read_trace


def model(trace: Trace, block_size: int) -> list[list[int]]:
    """Of each request, its full blocks: each numbered by all tokens up to its end."""
    known: dict[tuple[int, ...], int] = {}
    made = []
    for request in range(len(trace)):
        tokens = np.repeat(trace.blocks(request), trace.block_size)[: trace.input_tokens[request]].tolist()
        ends = range(block_size, len(tokens) + 1, block_size)
        made.append([known.setdefault(tuple(tokens[:end]), len(known)) for end in ends])
    return made


@st.composite
def prompts(draw: st.DrawFn) -> Trace:
    rows = TraceBuilder(draw(st.integers(1, 9)))
    for _ in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.sampled_from([0, 1, 2, 10**15]), min_size=1, max_size=7))
        rows.add(draw(st.integers(1, len(ids) * rows.block_size)), 1, ids, arrival_ms=0)
    return rows.build("any")


@given(prompts(), st.integers(1, 20))
def test_ids_are_equal_where_prefixes_are(trace: Trace, block_size: int) -> None:
    made = chains(trace, block_size)
    expected = model(trace, block_size)
    pairs = set()
    for request, blocks in enumerate(expected):
        assert len(made.of(request)) == len(blocks)
        pairs |= set(zip(made.of(request).tolist(), blocks, strict=True))
    # one to one, and numbered without a gap
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}) == made.count
    assert {one for one, _ in pairs} == set(range(made.count))
    assert len(made.ids) == made.offsets[-1] == sum(map(len, expected))


def test_ids_may_stand_at_other_places() -> None:
    """Nothing is taken for granted of `hash_ids`: an id may come twice in a prompt, and after other ids."""
    rows = TraceBuilder(2)
    for ids in ([7, 7, 7], [7, 8, 7], [8, 7, 7], [7, 7, 8]):
        rows.add(6, 1, ids, arrival_ms=0)
    made = [chains(rows.build("t"), 2).of(request).tolist() for request in range(4)]
    assert made[0][:2] == made[3][:2] and made[0][2] != made[3][2]
    assert made[0][0] == made[1][0] and made[0][2] != made[1][2]
    assert not set(made[2]) & {*made[0], *made[1], *made[3]}


def test_no_requests_and_no_full_block() -> None:
    rows = TraceBuilder(512)
    rows.add(63, 1, [1], arrival_ms=0)
    trace = rows.build("t")
    for some in (trace, trace.head(0)):
        made = chains(some, 64)
        assert made.count == 0 and len(made.ids) == 0 and made.offsets.tolist() == [0] * (len(some) + 1)
    with pytest.raises(InvalidInput, match="block_size: expected 1 or more, got 0"):
        chains(trace, 0)


def test_the_result_is_read_only() -> None:
    rows = TraceBuilder(512)
    rows.add(512, 1, [1], arrival_ms=0)
    made = chains(rows.build("t"), 64)
    for column in (made.ids, made.offsets):
        with pytest.raises(ValueError):
            column[0] = 1


@pytest.mark.parametrize("block_size", [48, 64, 1024])
def test_the_conversation_trace(public_traces: Path, block_size: int) -> None:
    """Its ids name prefixes, so that the model needs no tokens: a block is named by its place and its last trace id."""
    trace = read_trace(public_traces / "conversation_trace.jsonl")
    assert len(trace) == 12_031 and len(trace.block_ids) == 288_500 and len(np.unique(trace.block_ids)) == 182_790
    made = chains(trace, block_size)
    full = trace.input_tokens // block_size
    place = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    last = trace.block_ids[np.repeat(trace.offsets[:-1], full) + ((place + 1) * block_size - 1) // 512]
    names = (place << 18) + last
    assert made.count == len(np.unique(names)) == made.ids.max() + 1
    assert made.count == len(np.unique((made.ids << 34) + names))  # one to one
