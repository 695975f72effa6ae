"""Requests, errors, pausing and threads; and a random workload over a pool that is too small for it."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from kvist.engines.hf import Engine, Event, SamplingParams, StepOutput
from kvist.errors import EngineError, InvalidInput, KvistError

from .driving import params, prompt, run

Load = Callable[..., Engine]


def test_what_cannot_be_right_is_refused_at_submit(load: Load) -> None:
    engine = load(pages=4, max_model_len=100)
    with pytest.raises(InvalidInput, match="at least one token"):
        engine.submit([])
    for wrong in (-1, 300):
        with pytest.raises(InvalidInput, match="token ids"):
            engine.submit([5, wrong])
    with pytest.raises(InvalidInput, match="at most 100"):
        engine.submit(prompt(100))
    with pytest.raises(InvalidInput, match="64 tokens") as caught:
        engine.submit(prompt(64))
    assert "--pages" in str(caught.value.hint)
    assert engine.stats()["pages_held"] == 0


def test_a_sequence_ends_at_the_length_the_pool_allows(load: Load) -> None:
    outputs = load(pages=4).submit(prompt(60), params(50)).result()
    assert [output.finish_reason for output in outputs] == [None, None, None, "length"]


def test_max_tokens_zero_computes_the_prompt(load: Load) -> None:
    engine = load()
    request = engine.submit(prompt(32), params(0), sequence_id="warm")
    assert request.result() == []
    assert request.finish_reason == "length"
    (info,) = engine.sequences()
    assert (info.tokens, info.computed, info.pages, info.status) == (32, 32, 2, "resident")
    assert run(engine, [], 4, resume="warm") == run(load(), prompt(32), 4)


def test_stop_tokens_and_end_of_text(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = load(), prompt(10)
    tokens = run(engine, ids, 6).tokens
    outputs = engine.submit(ids, params(6, stop_token_ids=(tokens[2],))).result()
    assert [output.token_id for output in outputs] == tokens[: tokens.index(tokens[2]) + 1]
    assert outputs[-1].finish_reason == "stop"
    monkeypatch.setattr(engine.model, "eos_ids", frozenset([tokens[1]]))
    assert engine.submit(ids, SamplingParams(max_tokens=6)).result()[-1].token_id == tokens[1]
    assert len(engine.submit(ids, params(6)).result()) == 6


def test_callbacks_get_tokens_then_the_end(load: Load) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine = load()
    request = engine.submit(prompt(5), params(3), on_step=events.put)
    got = [events.get() for _ in range(4)]
    assert [event is None for event in got] == [False, False, False, True]
    with pytest.raises(InvalidInput, match="on_step"):
        request.result()


def test_a_failing_callback_ends_its_request_only(load: Load) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("the client is gone")

    engine = load()
    other = engine.submit(prompt(5), params(10))
    engine.submit(prompt(5), params(10), on_step=fail, sequence_id="failing")
    assert len(other.result()) == 10
    assert "failing" not in {info.id for info in engine.sequences()}
    assert len(engine.submit(prompt(5), params(2)).result()) == 2


def test_a_callback_that_fails_at_the_last_token_still_hears_an_end(load: Load) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def fail_at_last(event: Event) -> None:
        events.put(event)
        if isinstance(event, StepOutput) and event.finish_reason:
            raise RuntimeError("the client is gone")

    engine = load()
    engine.submit(prompt(5), params(1), on_step=fail_at_last, sequence_id="kept")
    last, end = events.get(timeout=10), events.get(timeout=10)
    assert isinstance(last, StepOutput)
    assert isinstance(end, RuntimeError)
    assert [(info.id, info.status) for info in engine.sequences()] == [("kept", "resident")]


def test_a_failing_step_ends_its_request_only(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load()
    tile = engine.model.tile

    def fail_sometimes(cache: Any, slots: Any, tokens: list[int], row: int) -> Any:
        if 299 in tokens:
            raise RuntimeError("out of memory, say")
        return tile(cache, slots, tokens, row)

    monkeypatch.setattr(engine.model, "tile", fail_sometimes)
    good = engine.submit([5, 6, 7], params(1))
    bad = engine.submit([*prompt(20, vocab=299), 299], params(5))
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result()
    assert len(good.result()) == 1
    engine.drop(good.id)
    assert engine.stats()["pages_held"] == 0


def test_cancel_frees_the_pages_and_ends_the_stream(load: Load) -> None:
    engine = load()
    request = engine.submit(prompt(20), params(400))
    outputs = iter(request)
    next(outputs)
    request.cancel()
    assert len(list(outputs)) < 400
    assert request.finish_reason == "cancelled"
    assert engine.stats()["pages_held"] == 0
    request.cancel()


def test_pauses_nest_and_streams_stall(load: Load) -> None:
    engine = load()
    request = engine.submit(prompt(20), params(60))
    outputs = iter(request)
    next(outputs)
    engine.pause()
    engine.pause()
    steps = engine.stats()["steps"]
    engine.resume()
    engine.sequences()
    threading.Event().wait(0.1)
    assert engine.stats()["steps"] == steps
    engine.resume()
    assert len(list(outputs)) == 59
    with pytest.raises(EngineError, match="not paused"):
        engine.resume()


def test_pausing_is_fair(load: Load) -> None:
    """A busy engine lets every pause through, and pauses without end let the engine through."""
    engine = load()
    requests = [engine.submit(prompt(20, seed=n), params(200)) for n in range(3)]
    steps = []
    for _ in range(20):
        engine.pause()
        steps.append(engine.scheduler.steps)
        engine.resume()
    assert all(1 <= later - earlier <= 3 for earlier, later in pairwise(steps[1:]))
    for request in requests:
        request.cancel()


def test_the_engine_thread_cannot_wait_for_itself(load: Load) -> None:
    engine = load()
    caught: queue.SimpleQueue[KvistError] = queue.SimpleQueue()

    def reenter(event: Event) -> None:
        for act in (engine.pause, engine.close, engine.sequences):
            try:
                act()
            except EngineError as error:
                caught.put(error)

    engine.submit(prompt(5), params(1), on_step=reenter)
    assert all("own thread" in str(caught.get()) for _ in range(3))


def test_closing_fails_what_is_not_done(load: Load) -> None:
    engine = load()
    request = engine.submit(prompt(20), params(400))
    next(iter(request))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        request.result()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(prompt(3))
    with pytest.raises(EngineError, match="closed"):
        engine.start()


def test_requests_wait_for_the_engine_to_start(load: Load) -> None:
    engine = load(start=False)
    request = engine.submit(prompt(5), params(2))
    engine.start()
    assert len(request.result()) == 2


def test_numerics_say_what_decides_bits(load: Load) -> None:
    numerics = load().numerics()
    assert numerics["threads"] == torch.get_num_threads()
    assert (numerics["device"], numerics["dtype"], numerics["attention"]) == ("cpu", "f32", "sdpa")
    assert numerics["canonical"] is True


@pytest.mark.parametrize("seed", range(3))
def test_random_workload(seed: int, load: Load) -> None:
    """Tables stay consistent, every request ends, and what finished is what it would have been alone."""
    rng = random.Random(seed)
    engine = load(pages=12, max_running=4)
    prompts = [prompt(rng.randint(1, 70), seed=rng.randint(0, 3)) for _ in range(6)]
    alone: dict[tuple[int, ...], list[int]] = {}
    requests = []
    for n in range(60):
        act = rng.random()
        engine.pause()
        residents = [info.id for info in engine.sequences() if info.status == "resident"]
        if act < 0.5:
            ids = rng.choice(prompts)
            requests.append((ids, engine.submit(ids, params(rng.randint(0, 12)), sequence_id=f"w{n}")))
        elif act < 0.7 and residents:
            requests.append((None, engine.submit([], params(3), resume=rng.choice(residents))))
        elif act < 0.8 and requests:
            rng.choice(requests)[1].cancel()
        elif act < 0.9 and residents:
            engine.drop(rng.choice(residents))
        elif act > 0.97:
            engine.clear_prefix_cache()
        engine.check_integrity()
        engine.resume()
    for ids, request in requests:
        tokens = [output.token_id for output in request.result()]
        assert request.finish_reason in ("length", "cancelled")
        if ids is not None:
            longest = max(alone.setdefault(tuple(ids), []), tokens, key=len)
            assert longest[: len(tokens)] == tokens
            alone[tuple(ids)] = longest
    engine.check_integrity()
    fresh = load(pages=64)
    for ids, tokens in alone.items():
        assert run(fresh, list(ids), len(tokens)).tokens == tokens


def test_the_end_is_told_when_the_name_is_free(load: Load) -> None:
    """Who sees the last token may go on with the sequence at once."""
    engine = load()
    tokens = prompt(5)
    for _ in range(10):
        outputs = iter(engine.submit(tokens, params(2), sequence_id="chat"))
        for output in outputs:
            tokens.append(output.token_id)
            if output.finish_reason:
                break
    assert len(tokens) == 25
