"""Costs by Dynamo's rules, and what is under way."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest

from kvist.errors import AlreadyExists, InvalidInput, NotFound
from kvist.router.index import Overlap
from kvist.router.score import Candidate, ScoreConfig, Selector, cost, credit, pick

A, B = ("a", 0), ("b", 0)


def device(blocks: int) -> Overlap:
    return Overlap(blocks, blocks, blocks, blocks)


@pytest.mark.parametrize(("overlap", "held", "expected"), [(2, 10, 18), (5, 5, 10), (8, 9, 11)])
def test_the_example_of_dynamos_guide(overlap: int, held: int, expected: float) -> None:
    candidate = Candidate(device(overlap), held_blocks=held)
    assert cost(ScoreConfig(), candidate, tokens=160, block_size=16) == expected


def test_each_tier_has_its_credit() -> None:
    config = ScoreConfig(shared_credit=0.5)
    assert credit(config, Overlap(2, 6, 10, 30)) == 2 + 0.75 * 4 + 0.25 * 24
    assert credit(config, Overlap(2, 2, 2, 2), shared_blocks=4) == 4
    assert credit(config, Overlap(0, 0, 0, 8)) == credit(config, Overlap(0, 0, 8, 8)) == 2


def test_all_terms_of_the_cost() -> None:
    config = ScoreConfig(prefill_load_scale=2, active_request_weight=3)
    candidate = Candidate(Overlap(4, 8, 8, 8), waiting_tokens=24, held_blocks=7, requests=2)
    assert cost(config, candidate, tokens=168, block_size=16) == 2 * (12 - 4 - 3) + 7 + 6
    assert cost(config, Candidate(device(99)), tokens=1, block_size=16) == 0


def test_the_credit_decays_with_what_waits() -> None:
    config = ScoreConfig(device_credit_decay=2)
    candidate = Candidate(device(6), waiting_tokens=80)
    assert cost(config, candidate, tokens=160, block_size=16, least_waiting_tokens=80) == 15 - 6
    assert cost(config, candidate, tokens=160, block_size=16) == 15 - 6 / (1 + 2 * 5 / 10)


def test_a_pool_that_only_decodes_has_no_prompt_work() -> None:
    config = ScoreConfig(decode_pool=True, active_request_weight=1)
    candidate = Candidate(device(4), waiting_tokens=999, held_blocks=10, requests=2)
    assert cost(config, candidate, tokens=160, block_size=16) == 10 - 4 + 2
    assert cost(config, Candidate(device(40), held_blocks=10), tokens=160, block_size=16) == 0


def test_picks() -> None:
    assert pick([3, 1, 2], 0, 0.9) == 1
    assert [pick([1, 2, 1], 0, sample) for sample in (0, 0.49, 0.5, 0.99)] == [0, 0, 2, 2]
    assert [pick([5, 5], 1, sample) for sample in (0, 0.49, 0.5)] == [0, 0, 1]
    share = 1 / (1 + 2.718281828459045**-2)  # of the cheaper one, at temperature 1/2
    assert pick([10, 20], 0.5, share - 0.001) == 0
    assert pick([10, 20], 0.5, share + 0.001) == 1
    assert pick([0, 1e300], 1e-9, 0.999) == 0
    assert [pick([20, 10, 20], 1e-9, sample) for sample in (0, 1 - 2**-53)] == [1, 1], "the dearer have no weight"
    with pytest.raises(InvalidInput):
        pick([], 0, 0)


def test_what_is_under_way_is_counted() -> None:
    selector = Selector(16)
    for pool in (A, B):
        selector.add_pool(pool)
    hashes = list(range(10))
    overlaps = {A: Overlap(4, 8, 8, 8)}
    choice = selector.select(overlaps, tokens=160, hashes=hashes)
    assert (choice.pool, choice.cost, choice.costs, choice.overlap) == (A, 13, {A: 13, B: 20}, overlaps[A])
    selector.start("first", A, tokens=160, overlap=choice.overlap, hashes=hashes)
    assert selector.candidate(A, device(0), tokens=160, hashes=hashes) == Candidate(device(0), 48, 10, 1)
    assert selector.candidate(A, device(0), tokens=161, hashes=[1, 99]) == Candidate(device(0), 48, 10 + 1 + 9, 1)
    selector.start("second", A, tokens=20)
    assert selector.candidate(A, device(0), tokens=160, hashes=hashes).waiting_tokens == 48 + 20
    selector.first_token("first")
    selector.first_token("first")
    assert selector.candidate(A, device(0), tokens=160, hashes=hashes) == Candidate(device(0), 20, 11, 2)
    selector.finish("first")
    selector.finish("second")
    assert selector.candidate(A, device(0), tokens=160, hashes=hashes) == Candidate(device(0), 0, 10, 0)


def test_equal_seeds_choose_alike() -> None:
    def choices(seed: int, temperature: float) -> list[object]:
        selector = Selector(16, ScoreConfig(temperature=temperature), seed=seed)
        for worker in range(4):
            selector.add_pool((worker, 0))
        return [selector.select({(0, 0): device(5)}, tokens=160).pool for _ in range(200)]

    assert choices(1, 0.5) == choices(1, 0.5) != choices(2, 0.5)
    assert set(choices(1, 0)) == {(0, 0)}
    counts = Counter(choices(1, 0.5))
    assert len(counts) == 4
    assert counts.most_common(1)[0][0] == (0, 0)


def test_wrong_calls_are_refused() -> None:
    selector = Selector(16)
    with pytest.raises(NotFound):
        selector.select({}, tokens=1)
    selector.add_pool(A)
    with pytest.raises(AlreadyExists):
        selector.add_pool(A)
    with pytest.raises(NotFound):
        selector.start("x", B, tokens=1)
    with pytest.raises(InvalidInput):
        selector.start("x", A, tokens=0)
    with pytest.raises(InvalidInput):
        selector.select({}, tokens=0)
    selector.start("x", A, tokens=1)
    with pytest.raises(AlreadyExists):
        selector.start("x", A, tokens=1)
    selector.remove_pool(A)
    for call in (selector.finish, selector.first_token):
        with pytest.raises(NotFound):
            call("x")
    with pytest.raises(NotFound):
        selector.remove_pool(A)
    with pytest.raises(InvalidInput):
        Selector(0)


@pytest.mark.parametrize("name", [each.name for each in fields(ScoreConfig) if each.name != "decode_pool"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_are_checked(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=name):
        ScoreConfig(**{name: value})
