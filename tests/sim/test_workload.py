"""Generated traces: what they share, when they come; and that a seed says all."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from kvist.errors import InvalidInput
from kvist.sim.describe import describe
from kvist.sim.trace import Trace
from kvist.sim.workload import Arrivals, Lengths, agent_trees, documents, sessions, shared_prefixes

SMALL: dict[Any, dict[str, Any]] = {
    shared_prefixes: {"requests": 40, "prompt": Lengths(300, 0.8), "prefix_groups": 3},
    sessions: {"count": 8, "turns": 4, "system_tokens": 100, "message": Lengths(50, 0.5)},
    agent_trees: {"count": 4, "depth": 3, "forks": 2, "system_tokens": 100, "message": Lengths(50, 0.5)},
    documents: {"requests": 40, "count": 6, "document": Lengths(500, 0.5)},
}
COMMON: dict[str, Any] = {"output": Lengths(20, 0.3), "arrivals": Arrivals(5.0), "block_size": 16}


def digest(trace: Trace) -> str:
    """Of every bit."""
    made = hashlib.sha256(repr((trace.block_size, trace.request_ids)).encode())
    for column in fields(Trace):
        value = getattr(trace, column.name)
        if isinstance(value, np.ndarray):
            made.update(np.ascontiguousarray(value).tobytes())
    return made.hexdigest()[:16]


DIGESTS = {
    "shared_prefixes": "0dbf010d125be5bd",
    "sessions": "3084fbcf03331ea0",
    "agent_trees": "d3d7878f86155abc",
    "documents": "6f0f216c91219e0d",
}


@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_a_seed_says_all(kind: Any) -> None:
    made = kind(**SMALL[kind], **COMMON, seed=3)
    assert digest(made) == DIGESTS[kind.__name__]  # on this machine and on others
    assert digest(kind(**SMALL[kind], **COMMON, seed=4)) != digest(made)
    assert kind(**SMALL[kind], **COMMON, seed=2**64 - 1).arrival_ms[0] == 0


@pytest.mark.parametrize("kind", [shared_prefixes, documents], ids=lambda kind: kind.__name__)
def test_another_rate_has_the_same_prompts(kind: Any) -> None:
    slow, fast = (kind(**SMALL[kind], **COMMON | {"arrivals": Arrivals(rate)}, seed=3) for rate in (1.0, 10.0))
    assert (
        slow.block_ids.tolist() == fast.block_ids.tolist() and slow.input_tokens.tolist() == fast.input_tokens.tolist()
    )
    np.testing.assert_allclose(slow.arrival_ms, fast.arrival_ms * 10, atol=0.01)


def test_arrivals() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    assert Arrivals(4.0, "constant").times_ms(4, rng).tolist() == [0, 250, 500, 750]
    times = Arrivals(4.0).times_ms(20_000, rng)
    assert times[0] == 0 and np.all(np.diff(times) >= 0)
    gaps = np.diff(times)
    assert abs(gaps.mean() - 250) < 8 and abs(gaps.std() - 250) < 12  # exponential: both are the same
    assert np.array_equal(times, np.round(times, 3))
    bursts = Arrivals(4.0, "burst", 3).times_ms(20_000, rng)
    sizes = list(Counter(bursts.tolist()).values())
    assert set(sizes[:-1]) == {3} and sizes[-1] == 2  # 20,000 is no multiple of 3
    assert abs(bursts[-1] / 20_000 - 250) < 12


def test_lengths() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    assert {Lengths(7).draw(rng) for _ in range(9)} == {7}
    drawn = np.array([Lengths(1000, 0.5).draw(rng) for _ in range(20_000)])
    assert abs(drawn.mean() - 1000) < 15 and abs(np.log(drawn).std() - 0.5) < 0.01
    assert min(Lengths(1, 3.0).draw(rng) for _ in range(99)) == 1


def leading(one: Trace, first: int, second: int) -> int:
    """Trace blocks with which two prompts both begin."""
    pairs = zip(one.blocks(first).tolist(), one.blocks(second).tolist(), strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(map(len, (one.blocks(first), one.blocks(second))))
    )


def test_shared_prefixes() -> None:
    made = shared_prefixes(requests=200, prompt=Lengths(1000), prefix_groups=2, block_size=64)
    assert set(made.input_tokens.tolist()) == {1000} and made.previous.tolist() == [-1] * 200
    found = Counter(leading(made, first, second) for first in range(99) for second in range(first))
    assert set(found) == {0, 7} and abs(found[0] / found.total() - 0.5) < 0.05  # 500 tokens are 7 whole blocks
    whole = shared_prefixes(requests=9, prompt=Lengths(1000), shared_prefix_ratio=1, block_size=64)
    assert describe(whole).unique_blocks == 16
    none = shared_prefixes(requests=9, prompt=Lengths(1000), shared_prefix_ratio=0, block_size=64)
    assert describe(none).block_hit_ratio == 0
    uneven = shared_prefixes(requests=99, prompt=Lengths(100, 2.0), shared_prefix_ratio=0.9, block_size=64)
    assert uneven.input_tokens.min() < 90  # shorter than what the others share


def test_sessions() -> None:
    made = sessions(count=5, turns=4, system_tokens=130, message=Lengths(100), output=Lengths(30), block_size=64)
    assert len(made) == 20 and describe(made).turns == 15 and describe(made).forks == 0
    for row in range(20):
        before = int(made.previous[row])
        if before < 0:
            assert made.input_tokens[row] == 230 and not np.isnan(made.arrival_ms[row])
        else:  # all that was asked and answered, and a message
            assert made.input_tokens[row] == made.input_tokens[before] + 30 + 100
            assert leading(made, row, before) == len(made.blocks(before)) and made.delay_ms[row] > 0
    starts = np.flatnonzero(made.previous < 0).tolist()
    assert [leading(made, starts[0], start) for start in starts[1:]] == [2] * 4  # 130 tokens are 2 whole blocks


def test_agent_trees() -> None:
    made = agent_trees(
        count=3, depth=3, forks=4, system_tokens=64, message=Lengths(100), output=Lengths(30), block_size=64
    )
    assert len(made) == 3 * 21
    below = Counter(made.previous.tolist())
    assert below.pop(-1) == 3 and set(below.values()) == {4} and describe(made).forks == 3 * 5 * 3
    for row in np.flatnonzero(made.previous >= 0).tolist():
        before = int(made.previous[row])
        assert made.input_tokens[row] == made.input_tokens[before] + 130
        siblings = [other for other in np.flatnonzero(made.previous == before).tolist() if other != row]
        whole = (int(made.input_tokens[before]) + 30) // 64  # they share the answer that they continue
        assert {leading(made, row, other) for other in siblings} == {whole}
    chain = agent_trees(count=1, depth=5, forks=1, block_size=64)
    assert len(chain) == 5 and chain.previous.tolist() == [-1, 0, 1, 2, 3]
    assert [leading(chain, row, row - 1) for row in range(1, 5)] == [len(chain.blocks(row)) for row in range(4)]


def test_documents() -> None:
    made = documents(requests=4000, count=50, skew=1.0, document=Lengths(640), message=Lengths(10), block_size=64)
    asked = Counter(int(made.blocks(row)[0]) for row in range(len(made)))
    ranked = [asked[block] for block in range(0, 500, 10)]
    weights = 1 / np.arange(1, 51)
    np.testing.assert_allclose(ranked, 4000 * weights / weights.sum(), rtol=0.6, atol=10)
    assert abs(ranked[0] - 889) < 90
    even = documents(requests=4000, count=50, skew=0.0, document=Lengths(640), block_size=64)
    assert min(Counter(int(even.blocks(row)[0]) for row in range(len(even))).values()) > 40


def test_what_a_model_says_when_nothing_is_shared() -> None:
    found = describe(shared_prefixes(requests=1))
    assert (found.reused_ratio, found.span_ms, found.requests_per_s, found.block_hit_ratio) == (0, 0, 0, 0)
    empty = describe(shared_prefixes(requests=1).head(0))
    assert (empty.requests, empty.input_tokens.max, empty.block_hit_ratio, empty.reused_ratio) == (0, 0, 0, 0)


def test_an_endless_cache_reuses_no_whole_prompt() -> None:
    made = shared_prefixes(requests=3, prompt=Lengths(128), shared_prefix_ratio=1.0, block_size=64)
    assert describe(made, 64).reused_ratio == (0 + 64 + 64) / (3 * 128)
    assert describe(made, 128).reused_ratio == 0
    assert describe(made, 1).reused_ratio == (0 + 127 + 127) / (3 * 128)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arrivals(0), "rate: expected 1e-06 to 1e[+]06 requests per second, got 0"),
        (lambda: Arrivals(float("nan")), "rate: .* got nan"),
        (lambda: Arrivals(1, "later"), "arrivals: expected one of poisson, constant, burst, got 'later'"),
        (lambda: Arrivals(1, "burst", 0), "burst: expected 1 to 2147483647, got 0"),
        (lambda: Lengths(0), "tokens: expected 1 to 2147483647, got 0"),
        (lambda: Lengths(1, 3.5), "sigma: expected 0 to 3, got 3.5"),
        (lambda: shared_prefixes(requests=0), "requests: expected 1 to 10000000, got 0"),
        (lambda: shared_prefixes(prefix_groups=0), "prefix_groups: expected 1 to 10000000, got 0"),
        (lambda: shared_prefixes(shared_prefix_ratio=1.1), "shared_prefix_ratio: expected 0 to 1, got 1.1"),
        (lambda: shared_prefixes(seed=-1), "seed: expected 0 to 18446744073709551615, got -1"),
        (lambda: shared_prefixes(block_size=0), "block_size: expected 1 to 2147483647, got 0"),
        (lambda: sessions(count=0), "sessions: expected 1 to 10000000, got 0"),
        (lambda: sessions(count=10_000, turns=1001), "turns: expected 1 to 1000, got 1001"),
        (lambda: sessions(system_tokens=-1), "system_tokens: expected 0 to 2147483647, got -1"),
        (lambda: sessions(mean_delay_ms=-1), r"mean_delay_ms: expected 0 to 1e\+09, got -1"),
        (lambda: agent_trees(count=0), "trees: expected 1 to 10000000, got 0"),
        (lambda: agent_trees(depth=0), "depth: expected 1 to 1000, got 0"),
        (lambda: agent_trees(forks=0), "forks: expected 1 to 10000000, got 0"),
        (lambda: agent_trees(forks=10, depth=8), "forks: expected 10000000 requests or fewer"),
        (lambda: documents(count=0), "documents: expected 1 to 10000000, got 0"),
        (lambda: documents(skew=11), "skew: expected 0 to 10, got 11"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()
