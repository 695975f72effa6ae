"""Answers are drawn from the seed and the prompt, and from nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.engines.mock import draw_answer
from kvist.errors import InvalidInput

WORDS = [10, 20, 30, 40, 50]
PROMPTS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)


def test_the_same_tokens_for_ever() -> None:
    assert draw_answer([1, 2, 3], WORDS, seed=7, limit=12) == [20, 20, 40, 20, 30, 40, 20, 20, 20, 40, 30, 30]


@given(PROMPTS, st.integers(), st.integers(1, 50), st.integers(1, 50))
def test_the_longer_answer_begins_with_the_shorter(prompt: list[int], seed: int, one: int, two: int) -> None:
    answers = [draw_answer(prompt, WORDS, seed=seed, limit=limit) for limit in sorted((one, two))]
    assert answers[1][: len(answers[0])] == answers[0]
    assert set(answers[1]) <= set(WORDS)


@given(PROMPTS, st.integers(0, 1000), st.integers(1, 60), st.integers(0, 30))
def test_the_end(prompt: list[int], seed: int, limit: int, least: int) -> None:
    free = draw_answer(prompt, WORDS, seed=seed, limit=limit)
    tokens = draw_answer(prompt, WORDS, seed=seed, limit=limit, mean=10.0, least=least, end=0)
    if tokens[-1] == 0:
        assert len(tokens) >= least
        assert tokens[:-1] == free[: len(tokens) - 1]
    else:
        assert tokens == free, "it was cut by the limit"


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    lengths = [len(draw_answer([n], WORDS, seed=0, limit=10_000, mean=50.0, end=0)) for n in range(3000)]
    assert 46 < sum(lengths) / len(lengths) < 54
    assert {len(draw_answer([n], WORDS, seed=0, limit=9, mean=1.0, end=0)) for n in range(100)} == {1}


@pytest.mark.parametrize(
    ("change", "says"),
    [({"vocabulary": []}, "vocabulary"), ({"mean": 0.5, "end": 0}, "mean"), ({"prompt": [-1]}, "token ids")],
)
def test_what_cannot_be(change: dict[str, object], says: str) -> None:
    arguments = {"prompt": [1], "vocabulary": WORDS, "seed": 0, "limit": 5} | change
    with pytest.raises(InvalidInput, match=says):
        draw_answer(**arguments)  # type: ignore[arg-type]
