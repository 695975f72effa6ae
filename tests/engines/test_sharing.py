"""Prefix reuse, forks, copy on write, eviction and preemption."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvist.engines.hf import Engine, HfPager
from kvist.errors import Conflict, InvalidInput, NotFound
from kvist.hashing import block_root

from .driving import page_bytes, params, prompt, run, trace

Load = Callable[..., Engine]


def held(engine: Engine) -> int:
    return engine.stats()["pages_held"]


def test_a_prompt_starts_from_the_longest_prefix(load: Load) -> None:
    """Full pages by hash, then part of a page of whichever sequence goes furthest."""
    engine, ids = load(), prompt(45)
    first = engine.submit(ids, params(4))
    assert first.result()
    assert first.cached_tokens == 0
    for shared in (1, 7, 16, 23, 32, 44):
        request = engine.submit(ids[:shared] + prompt(20, seed=shared + 1), params(2))
        expected = run(load(), ids[:shared] + prompt(20, seed=shared + 1), 2)
        assert trace(request.result()) == expected
        assert request.cached_tokens == shared


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_the_same_prompt_again_computes_one_token(length: int, load: Load) -> None:
    engine, ids = load(), prompt(length)
    expected = run(engine, ids, 4)
    again = engine.submit(ids, params(4))
    assert trace(again.result()) == expected
    assert (again.cached_tokens, again.prompt_tokens) == (length - 1, length)


def test_a_page_kept_only_by_hash_is_reused_to_its_last_token_but_one(load: Load) -> None:
    engine, ids = load(), prompt(32)
    expected = run(engine, ids, 4, sequence_id="gone")
    engine.drop("gone")
    assert engine.sequences() == []
    again = engine.submit(ids, params(4))
    assert trace(again.result()) == expected
    assert again.cached_tokens == 31


def test_twelve_forks_share_all_but_the_tail(load: Load) -> None:
    """40 tokens are two full pages and a tail; each fork copies the tail and nothing else."""
    engine = load()
    run(engine, prompt(38), 3, sequence_id="trunk")
    before = page_bytes(engine, "trunk")
    assert held(engine) == 3
    requests = [engine.submit([], params(2), resume="trunk", sequence_id=f"fork-{n}") for n in range(12)]
    traces = [trace(request.result()) for request in requests]
    assert all(fork == traces[0] for fork in traces)
    assert [request.cached_tokens for request in requests] == [40] * 12
    assert held(engine) == 2 + 1 + 12
    assert page_bytes(engine, "trunk") == before


def test_copy_on_write_leaves_the_source_alone(load: Load) -> None:
    engine, ids = load(), prompt(20)
    run(engine, ids, 1, sequence_id="source")
    before = page_bytes(engine, "source")
    run(engine, ids + prompt(30, seed=5), 4)
    assert page_bytes(engine, "source") == before
    continued = run(engine, [], 4, resume="source")
    assert continued == run(load(), ids + run(load(), ids, 1).tokens, 4)


def test_two_sequences_computing_one_block_end_up_sharing_it(load: Load) -> None:
    engine, ids = load(), prompt(40)
    requests = [engine.submit(ids, params(1)) for _ in range(4)]
    assert len({tuple(trace(request.result()).tokens) for request in requests}) == 1
    assert held(engine) == 2 + 4


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.95, "top_k": 40}])
def test_resuming_equals_not_stopping(length: int, sampling: dict[str, float], load: Load) -> None:
    whole = run(load(), prompt(length), 30, **sampling)
    engine = load()
    pieces = [run(engine, prompt(length), 7, sequence_id="part-0", **sampling)]
    for n, more in enumerate((1, 9, 13)):
        pieces.append(run(engine, [], more, resume=f"part-{n}", sequence_id=f"part-{n + 1}"))
    joined = pieces[0] + pieces[1] + pieces[2] + pieces[3]
    assert joined == whole


def test_a_running_sequence_can_be_forked(load: Load) -> None:
    engine = load()
    running = engine.submit(prompt(20), params(60), sequence_id="running")
    outputs = iter(running)
    for _ in range(5):
        next(outputs)
    fork = engine.submit([], params(200), resume="running")
    rest = [output.token_id for output in outputs]
    forked = [output.token_id for output in fork.result()][: len(rest)]
    assert any(rest[n : n + 20] == forked[:20] for n in range(len(rest) - 19))


def test_names_are_the_callers(load: Load) -> None:
    engine = load()
    engine.pause()
    engine.submit(prompt(4), params(1), sequence_id="chat")
    with pytest.raises(Conflict, match="chat"):
        engine.submit(prompt(4), params(1), sequence_id="chat")
    engine.resume()
    engine.submit(prompt(9), params(1)).result()
    second = engine.submit(prompt(4) + prompt(3, seed=1), params(1), sequence_id="chat")
    second.result()
    assert second.cached_tokens == 4, "the finished one of that name gave its pages before it went"
    assert [info.tokens for info in engine.sequences() if info.id == "chat"] == [8]
    engine.drop("chat")
    with pytest.raises(NotFound):
        engine.drop("chat")
    with pytest.raises(NotFound):
        engine.submit([], resume="chat")
    with pytest.raises(InvalidInput):
        engine.submit(prompt(1), sequence_id="../chat")


def test_evicted_prefixes_come_back_the_same(load: Load) -> None:
    engine = load(pages=8)
    ids = prompt(50)
    expected = run(engine, ids, 8, sequence_id="first")
    for n in range(4):
        run(engine, prompt(90, seed=n + 1), 8)
    assert engine.stats()["evictions"] > 0
    with pytest.raises(NotFound):
        engine.submit([], resume="first")
    again = engine.submit(ids, params(8))
    assert trace(again.result()) == expected
    assert again.cached_tokens == 0


def test_least_recently_used_goes_first(load: Load) -> None:
    """Of two finished sequences, the one that was used since stays."""
    engine = load(pages=8)
    for name in ("a", "b"):
        run(engine, prompt(33, seed=ord(name)), 1, sequence_id=name)
    run(engine, [], 1, resume="a", sequence_id="a2")
    run(engine, prompt(40, seed=9), 1, sequence_id="c")
    assert {info.id for info in engine.sequences()} == {"a", "a2", "c"}


def test_preempted_sequences_lose_nothing(load: Load) -> None:
    """Four sequences of four pages each in a pool of eight."""
    engine = load(pages=8)
    prompts = [prompt(10, seed=n) for n in range(4)]
    expected = [run(load(), ids, 50) for ids in prompts[:2]]
    requests = [engine.submit(ids, params(50)) for ids in prompts]
    traces = [trace(request.result()) for request in requests]
    assert traces[:2] == expected
    assert engine.stats()["preemptions"] > 0


def test_a_sequence_waits_for_slots_that_a_pager_holds(load: Load) -> None:
    """A restore in progress takes room for a while; a lone sequence yields its turns, and can be cancelled."""
    engine = load(pages=8)
    pager = HfPager(engine)
    slots = pager.allocate_pages(5)
    stuck = engine.submit(prompt(60, seed=1), params(4))
    time.sleep(0.1)
    stuck.cancel()
    assert stuck.result() == []
    request = engine.submit(prompt(60), params(4))
    time.sleep(0.1)
    steps = engine.stats()["steps"]
    time.sleep(0.05)
    assert engine.stats()["steps"] == steps
    pager.release_pages(slots)
    assert trace(request.result()) == run(load(), prompt(60), 4)


def test_finished_sequences_stay_while_there_is_room(load: Load) -> None:
    engine = load(pages=256)
    for n in range(100):
        run(engine, prompt(5, seed=n), 1)
    assert len(engine.sequences()) == 100


def test_many_residents_do_not_slow_admission(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that share a prefix, some are looked at; those of another prefix never."""
    engine = load(pages=128)
    trunk = prompt(16)
    for n in range(40):
        run(engine, prompt(20, seed=n + 1), 1)
    for n in range(20):
        run(engine, trunk + prompt(3, seed=n + 1), 1)
    monkeypatch.setattr("kvist.engines.hf.scheduler._CANDIDATES", 4)
    assert len(engine.scheduler.residents.after(block_root(), 1000)) == 60
    request = engine.submit(trunk + prompt(3, seed=20), params(1))
    request.result()
    assert request.cached_tokens == 18
    old = engine.submit(trunk + prompt(3, seed=1), params(1))
    old.result()
    assert old.cached_tokens >= 16, "out of sight, but full pages are found by hash"


def test_sequences_that_need_no_room_do_not_pile_up(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.engines.hf.scheduler._FINISHED", 3)
    engine = load()
    for n in range(6):
        run(engine, prompt(16), 0, sequence_id=f"same-{n}")
    assert [info.id for info in engine.sequences()] == ["same-3", "same-4", "same-5"]


def test_clearing_the_prefix_cache(load: Load) -> None:
    engine, ids = load(), prompt(40)
    run(engine, ids, 1, sequence_id="kept")
    run(engine, prompt(40, seed=1), 1, sequence_id="gone")
    engine.drop("gone")
    assert engine.clear_prefix_cache() == 2
    requests = [engine.submit(tokens, params(1)) for tokens in (ids, prompt(40, seed=1))]
    assert [(request.result(), request.cached_tokens)[1] for request in requests] == [39, 0]


def test_pages_are_evicted_from_the_end(load: Load) -> None:
    """A prefix shrinks; it never loses its head first, which would make the rest useless."""
    engine, ids = load(pages=9), prompt(100)
    run(engine, ids, 1, sequence_id="gone")
    engine.drop("gone")
    run(engine, prompt(60, seed=1), 1)
    request = engine.submit(ids, params(1))
    request.result()
    assert request.cached_tokens == 80
