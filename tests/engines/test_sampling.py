"""Sampling, and the numbers that are reported with it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.engines.hf import Engine, SamplingParams, StepOutput
from kvist.engines.hf.sampling import choose, log_probabilities, most_likely, uniform
from kvist.engines.hf.sequence import Event
from kvist.errors import InvalidInput

from .driving import params, prompt, run, trace

Load = Callable[..., Engine]
LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_draws_are_in_range_and_differ(seed: int, draw: int) -> None:
    assert 0 <= uniform(seed, draw) < 1
    assert uniform(seed, draw) == uniform(seed, draw) != uniform(seed, draw + 1)


def test_draws_are_pinned() -> None:
    """Snapshots hold (seed, draws): the numbers behind them may never change."""
    assert [round(uniform(7, n), 12) for n in range(3)] == [0.302606520155, 0.680530710734, 0.616438147894]


def frequencies(count: int = 4000, **settings: float) -> list[float]:
    settings = {"temperature": 1.0, "seed": 11} | settings
    chosen = Counter(choose(LOGITS, SamplingParams(**settings), draw) for draw in range(count))
    return [chosen[token] / count for token in range(4)]


def test_frequencies_follow_the_distribution() -> None:
    assert frequencies() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert frequencies(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert frequencies(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert frequencies(top_p=0.5) == [1, 0, 0, 0]
    assert frequencies(temperature=0.01) == [1, 0, 0, 0]
    assert frequencies(temperature=1000) == pytest.approx([0.25] * 4, abs=0.03)
    assert frequencies(top_k=9) == frequencies()


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose(np.array([0, 2, 2, 1], dtype=np.float32), SamplingParams(), 0) == 1
    assert most_likely(np.array([0, 2, 2, 1], dtype=np.float32), 3) == ((1, 2.0), (2, 2.0), (3, 1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": 2**63},
        {"seed": -1},
        {"logprobs": -1},
        {"stop_token_ids": ("a",)},
        {"max_tokens": True},
    ],
)
def test_wrong_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_state_survives_json() -> None:
    original = SamplingParams(temperature=0.5, top_p=0.9, top_k=3, seed=2**62, stop_token_ids=(4, 5), ignore_eos=True)
    state = json.loads(json.dumps(original.state()))
    assert SamplingParams(max_tokens=3).with_state(state).state() == original.state()
    assert SamplingParams(max_tokens=3).with_state(state).max_tokens == 3
    with pytest.raises(InvalidInput):
        SamplingParams().with_state({"stop_token_ids": 5})
    with pytest.raises(InvalidInput):
        SamplingParams().with_state({"temperature": "hot"})


def test_seeds_decide(load: Load) -> None:
    engine, ids = load(), prompt(10)
    hot = {"temperature": 1.0}
    assert run(engine, ids, 12, seed=1, **hot) == run(engine, ids, 12, seed=1, **hot)
    assert run(engine, ids, 12, seed=1, **hot) != run(engine, ids, 12, seed=2, **hot)
    assert run(engine, ids, 12, **hot).tokens != run(engine, ids, 12, **hot).tokens, "unseeded requests differ"


def test_an_unseeded_sequence_can_be_resumed(load: Load) -> None:
    """The seed that the engine drew is part of the state."""
    engine, ids = load(), prompt(10)
    run(engine, ids, 5, temperature=1.0, sequence_id="trunk")
    assert run(engine, [], 9, resume="trunk") == run(engine, [], 9, resume="trunk")


def test_logprobs_are_the_models(load: Load) -> None:
    engine = load()
    for output in engine.submit(prompt(10), params(5, temperature=3.0, top_k=5, seed=1, logprobs=4)).result():
        expected = torch.log_softmax(torch.from_numpy(output.logits), dim=-1).numpy()
        assert np.array_equal(expected, log_probabilities(output.logits))
        assert output.logprob == expected[output.token_id]
        assert [token for token, _ in output.top] == list(np.argsort(-expected, kind="stable")[:4])
    quiet = engine.submit(prompt(10), SamplingParams(max_tokens=1)).result()[0]
    assert (quiet.top, quiet.logits) == ((), None)
    assert output.logits.dtype == np.float32


def test_a_sequence_finished_by_its_listener_goes_on_as_if_it_had_not(load: Load) -> None:
    """What a server does at a stop string: the token in hand is the last, and the draws go on from there."""
    engine, ids = load(), prompt(10)
    whole = run(engine, ids, 12, temperature=1.0, seed=5)
    seen: list[StepOutput] = []
    over = threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, StepOutput):
            seen.append(event)
            if len(seen) == 4:
                request.finish()
        else:
            over.set()

    with engine.exclusive():  # so that `request` is bound before the first token
        request = engine.submit(ids, params(12, temperature=1.0, seed=5), sequence_id="cut", on_step=listen)
    over.wait()
    assert request.finish_reason == "stop"
    assert trace(seen) + run(engine, [], 8, resume="cut") == whole


def test_a_resumed_sequence_can_change_its_parameters(load: Load) -> None:
    engine, ids = load(), prompt(10)
    whole = run(engine, ids, 12, temperature=1.0, seed=5)
    run(engine, ids, 5, temperature=1.0, seed=5, sequence_id="trunk")
    known = ids + whole.tokens[:5]
    greedy = engine.submit([], params(7), resume="trunk", override={"temperature": 0.0}).result()
    assert trace(greedy) == run(engine, known, 7)
    same = engine.submit([], params(7), resume="trunk", override={"temperature": 1.0}).result()
    assert [output.token_id for output in same] == whole.tokens[5:], "the draws go on"
    seeded = engine.submit([], params(7), resume="trunk", override={"seed": 5}).result()
    assert [output.token_id for output in seeded] == whole.tokens[5:], "the same seed is no new one"
    reseeded = engine.submit([], params(7), resume="trunk", override={"seed": 6}).result()
    assert trace(reseeded) == run(engine, known, 7, temperature=1.0, seed=6)
    with pytest.raises(InvalidInput, match="temperature"):
        engine.submit([], params(7), resume="trunk", override={"temperature": -1.0})
