"""Curves: one pass finds what the replays find, no policy is above the ceiling, and a replay is what a pool does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.blocks import BlockManager
from kvist.blocks.policy import POLICIES
from kvist.errors import InvalidInput
from kvist.sim import curve
from kvist.sim.chains import Chains, chains
from kvist.sim.curve import BELADY, CEILING, Curves, Requests, curves, default_capacities
from kvist.sim.curve_page import page, png
from kvist.sim.stack import lru_hits, most_hits
from kvist.sim.trace import Trace, TraceBuilder, read_trace

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=25)
CAPACITIES = range(1, 16)


def interned(prompts: Sequence[Sequence[int]]) -> Chains:
    """Chains of prompts, of which each element is a block."""
    known: dict[tuple[int, ...], int] = {}
    ids = [known.setdefault(tuple(prompt[:end]), len(known)) for prompt in prompts for end in range(1, len(prompt) + 1)]
    offsets = np.concatenate(([0], np.cumsum([len(prompt) for prompt in prompts], dtype=np.int64)))
    return Chains(np.array(ids, np.int64), offsets, len(known))


def made(prompts: Sequence[Sequence[int]], *, tail: int = 0) -> Trace:
    """A trace of these prompts in blocks of 4 tokens, and some tokens more."""
    builder = TraceBuilder(4)
    for row, prompt in enumerate(prompts):
        blocks = [*prompt, 99] if tail else prompt
        builder.add(4 * len(prompt) + tail, 1, blocks, arrival_ms=float(row))
    return builder.build("made")


@settings(deadline=None, max_examples=150)
@given(prompts=PROMPTS)
def test_one_pass_finds_what_lru_hits_at_every_capacity(prompts: list[list[int]]) -> None:
    """Also where a request is longer than the cache; and lineage hits the same."""
    found = interned(prompts)
    requests = Requests(found)
    replayed = [requests.hits("lru", capacity) for capacity in CAPACITIES]
    assert lru_hits(found, CAPACITIES) == replayed
    assert [requests.hits("lineage", capacity) for capacity in CAPACITIES] == replayed


@settings(deadline=None, max_examples=100)
@given(prompts=PROMPTS)
def test_no_policy_is_above_the_ceiling(prompts: list[list[int]]) -> None:
    """Not even the one that knows the trace."""
    found = interned(prompts)
    requests = Requests(found)
    for capacity in CAPACITIES:
        ceiling = most_hits(found, capacity)
        assert ceiling <= len(found.ids) - found.count
        for name in (*POLICIES, BELADY):
            assert requests.hits(name, capacity) <= ceiling, (name, capacity)


@settings(deadline=None, max_examples=60)
@given(prompts=st.lists(st.lists(st.integers(0, 1), max_size=3), max_size=5), capacity=st.integers(1, 4))
def test_the_ceiling_is_the_largest_set_of_intervals_that_fit(prompts: list[list[int]], capacity: int) -> None:
    """Found by trying them all."""
    found = interned(prompts)
    last: dict[int, int] = {}
    intervals = []
    for place, content in enumerate(found.ids.tolist()):
        if content in last:
            intervals.append(range(last[content], place))
        last[content] = place

    def fits(chosen: Sequence[range]) -> bool:
        return all(sum(place in one for one in chosen) <= capacity for place in range(len(found.ids)))

    sizes = range(len(intervals), -1, -1)
    most = next(size for size in sizes if any(map(fits, itertools.combinations(intervals, size))))
    assert most_hits(found, capacity) == most


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, max_examples=60)
@given(prompts=PROMPTS, capacity=st.integers(1, 12))
def test_a_replay_is_what_a_block_manager_does(policy: str, prompts: list[list[int]], capacity: int) -> None:
    """The same policy objects, by the same calls."""
    found = interned(prompts)
    manager = BlockManager(capacity, 4, policy)
    hits = 0
    for request in range(len(prompts)):
        names = found.of(request).tolist()
        hits += min(manager.peek(names), capacity)
        manager.deref(names[: manager.use(names)][::-1])
    assert Requests(found).hits(policy, capacity) == hits


def test_hit_ratios_are_parts_of_the_prompt_tokens() -> None:
    """Three prompts of 2 blocks and 2 tokens more; the second and third find 1 and 2 blocks."""
    found = curves(made([[1, 2], [1, 3], [1, 2]], tail=2), policies=["lru", "fifo"], capacities=[9, 1, 9])
    assert found.capacities == (1, 9)
    assert found.hits == {"lru": (2, 3), "fifo": (2, 3), CEILING: (2, 3)}
    assert found.ratios("lru") == [8 / 30, 12 / 30]
    assert found.to_json() == {
        "trace": "made",
        "block_size": 4,
        "requests": 3,
        "prompt_tokens": 30,
        "blocks": 6,
        "unique_blocks": 3,
        "capacities": [1, 9],
        "curves": {name: {"hit_blocks": [2, 3], "hit_ratio": [8 / 30, 12 / 30]} for name in ("lru", "fifo", CEILING)},
    }


def test_blocks_may_be_smaller_than_those_of_the_trace() -> None:
    """As an engine has them."""
    found = curves(made([[1, 2], [1, 2]]), block_size=2, points=1)
    assert (found.block_size, found.unique_blocks, found.capacities) == (2, 4, (4,))
    assert set(found.hits.values()) == {(4,)}


def test_processes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number; and progress is told."""
    monkeypatch.setattr(curve, "_LITTLE", 0)
    trace = made([[row % 5, row % 3, row % 7] for row in range(40)])
    told: list[tuple[int, int]] = []
    alone = curves(trace, policies=["arc", "sieve"], points=3)
    assert curves(trace, policies=["arc", "sieve"], points=3, jobs=2, progress=lambda *done: told.append(done)) == alone
    assert told == [(done, 6) for done in range(1, 7)]


def test_a_trace_without_full_blocks() -> None:
    """Zero case: nothing can be hit."""
    found = curves(made([[], []], tail=3))
    assert (found.unique_blocks, found.capacities) == (0, (1,))
    assert set(found.hits.values()) == {(0,)}
    assert found.ratios("lru") == [0.0]


def test_default_capacities_end_with_the_cache_that_never_evicts() -> None:
    """A thousandth of it is the first; fewer points where there are not as many."""
    assert default_capacities(4000, 3) == [4, 126, 4000]
    assert default_capacities(4000, 1) == [4000]
    assert default_capacities(2, 12) == [1, 2]
    assert default_capacities(0, 12) == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": ["mru"]}, "policy must be one of .*, belady, not 'mru'"),
        ({"policies": ["lru", "lru"]}, "policies must all be different; got lru, lru"),
        ({"capacities": []}, "capacities must be 1 block or more; got none"),
        ({"capacities": [4, 0]}, "capacities must be 1 block or more; got 0"),
        ({"points": 0}, "points must be 1 or more; got 0"),
        ({"jobs": 0}, "jobs must be 1 or more; got 0"),
        ({"block_size": 0}, "block_size: expected 1 or more, got 0"),
    ],
)
def test_what_cannot_be_right_is_refused(settings: dict[str, object], message: str) -> None:
    """Before anything is replayed."""
    with pytest.raises(InvalidInput, match=message):
        curves(made([[1]]), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drawn() -> Curves:
    return curves(made([[row % 5, row % 3, row % 7] for row in range(40)]), points=4)


def test_the_page_holds_all_it_shows(drawn: Curves) -> None:
    """Lines, numbers, both colour schemes; nothing is loaded."""
    text = page(drawn)
    assert text == page(drawn)
    assert text.count("<polyline") == len(POLICIES) + 1
    assert all(f"<th>{policy}</th>" in text for policy in (*POLICIES, CEILING))
    assert all(f"{ratio:.2%}" in text for ratio in drawn.ratios("arc"))
    assert "prefers-color-scheme: dark" in text
    assert not any(word in text for word in ("http:", "https:", "<script", "src=", "@import", "url("))


def test_names_on_the_page_are_text() -> None:
    """A file may be called anything."""
    named = Curves("<b>", 4, 1, 4, 1, 1, (1,), {"lru": (0,), CEILING: (0,)})
    assert "<b>" not in page(named)


def test_the_picture_is_a_png_and_always_the_same(drawn: Curves) -> None:
    pytest.importorskip("matplotlib")
    picture = png(drawn)
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert png(drawn) == picture


def test_the_conversation_trace(public_traces: Path) -> None:
    """One pass equals the replays; the ceiling is over Belady's policy, and that over LRU."""
    found = chains(read_trace(public_traces / "conversation_trace.jsonl"), 512)
    assert (len(found.ids), found.count) == (276_491, 170_899)
    requests, capacities = Requests(found), [100, 1000, 8000, 60_000, 170_899]
    by_lru = lru_hits(found, capacities)
    assert by_lru == [requests.hits("lru", capacity) for capacity in capacities]
    assert by_lru[1:3] == [12_990, 53_426]
    assert by_lru[-1] == found.offsets[-1] - found.count
    assert by_lru[2] < requests.hits(BELADY, 8000) <= most_hits(found, 8000)
