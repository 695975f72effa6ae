"""Cartridges on the embedded engine: exact, shared, isolated, and back again after their pages were evicted."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.library import Entry, Library
from kvist.engines.hf import Engine, HfPager
from kvist.errors import (
    AlreadyExists,
    DamagedCartridge,
    InvalidCartridge,
    InvalidInput,
    LayoutMismatch,
    ResidencyFull,
    UnknownCartridge,
)

from .cartridges import captured, changed_model, document, noise, prefilled
from .driving import Trace, page_bytes, params, prompt, run, trace

Load = Callable[..., Engine]
QUESTION = prompt(9, seed=5)


def held(engine: Engine) -> int:
    return engine.stats()["pages_held"]


def ask(engine: Engine, question: list[int], cartridge: str, max_tokens: int = 8, **changes: object) -> Trace:
    return trace(engine.submit(question, params(max_tokens, **changes), cartridge=cartridge).result())


# -- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 40, 64])
def test_a_captured_cartridge_is_the_prefill_bit_for_bit(length: int, load: Load) -> None:
    engine, ids = load(), document(length, 0)
    engine.load_cartridge(captured(engine, ids))
    request = engine.submit(QUESTION, params(20), cartridge="doc")
    assert trace(request.result()) == run(load(), ids + QUESTION, 20)
    assert (request.prompt_tokens, request.cached_tokens) == (len(QUESTION), 0)
    assert request.cartridge is not None
    assert (request.cartridge.tokens, request.cartridge.placed) == (length, True)


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bf16"), ("qwen3", None), ("gemma3", None), ("gpt2", None)])
def test_other_models_too(family: str, dtype: str | None, load: Load) -> None:
    """Sliding windows among them: of a cartridge longer than the window, far rows are masked out as of a prompt."""
    engine, ids = load(family, dtype=dtype), document(90, 0)
    engine.load_cartridge(captured(engine, ids))
    assert ask(engine, QUESTION, "doc", 20) == run(load(family, dtype=dtype), ids + QUESTION, 20)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.95, "top_k": 40}])
@pytest.mark.parametrize("page_size_tokens", [4, 16, 64])
def test_in_pages_of_any_size(page_size_tokens: int, sampling: dict[str, float], load: Load) -> None:
    """Captured from pages of one size, and used in pages of another: the cartridge knows no pages."""
    source, engine = load(), load(page_size_tokens=page_size_tokens, pages=200)
    ids = document(45, 0)
    engine.load_cartridge(captured(source, ids))
    with_16 = run(load(), ids + QUESTION, 12, **sampling)
    placed = ask(engine, QUESTION, "doc", 12, **sampling)
    if page_size_tokens == 16:
        assert placed == with_16
    else:  # other shapes of products: other last bits
        near = [np.frombuffer(one.logits, np.float32) for one in (placed, run(engine, ids + QUESTION, 12, **sampling))]
        assert np.abs(near[0][:300] - near[1][:300]).max() < 1e-4


def test_built_by_plain_transformers_it_is_within_a_bound(load: Load, model_dir: Callable[..., Path]) -> None:
    """One forward pass of the whole text sums in another order than tiles do. Measured: 1.9e-6, of logits up to 9.5."""
    engine, ids = load(), document(90, 0)
    engine.load_cartridge(prefilled(engine, model_dir(), ids))
    placed, whole = ask(engine, QUESTION, "doc", 1), run(load(), ids + QUESTION, 1)
    a, b = (np.frombuffer(one.logits, np.float32) for one in (placed, whole))
    assert np.abs(a - b).max() < 2e-5
    assert np.abs(b).max() > 5


# -- sharing -----------------------------------------------------------------------------------------------------


def test_full_pages_are_shared_and_the_tail_is_each_ones_own(load: Load) -> None:
    """40 tokens are two full pages and a tail of 8 rows, on which each request writes its own question."""
    engine = load()
    engine.load_cartridge(captured(engine, document(40, 0)))
    requests = [engine.submit(prompt(5, seed=n), params(2), cartridge="doc", sequence_id=f"seq-{n}") for n in range(12)]
    for request in requests:
        request.result()
    assert held(engine) == 2 + 12
    first = page_bytes(engine, "seq-0")
    assert ask(engine, prompt(30, seed=77), "doc", 5)
    assert page_bytes(engine, "seq-0") == first, "somebody wrote into a shared tail"
    assert all(page_bytes(engine, f"seq-{n}")[:2] == first[:2] for n in range(12))


def test_what_comes_after_a_cartridge_is_prefix_cache_too(load: Load) -> None:
    engine = load()
    engine.load_cartridge(noise(engine, 40, seed=1))
    common = prompt(30, seed=8)
    expected = ask(engine, common + QUESTION, "noise")
    again = engine.submit(common + QUESTION, params(8), cartridge="noise")
    assert trace(again.result()) == expected
    assert again.cached_tokens == len(common + QUESTION) - 1


# -- isolation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 16, 40])
def test_equal_ids_under_different_cartridges_share_nothing(length: int, load: Load) -> None:
    """A, B, A's own text without a cartridge, and virtual ids: each as if it were alone, in every order."""
    ids = document(length, 0)
    alone: dict[str, Trace] = {}
    names = ["exact", "close", "virtual-1", "virtual-2"]

    def make(*wanted: str) -> Engine:
        engine = load()
        for name in wanted:
            made = {
                "exact": lambda: captured(engine, ids, "exact"),
                # the same ids, and another content
                "close": lambda: Cartridge.create(
                    [noise(engine, length, seed=9).layer(n) for n in range(2)],
                    engine.model.identity,
                    cartridge_id="close",
                    token_ids=ids,
                ),
                "virtual-1": lambda: noise(engine, length, seed=1, name="virtual-1"),
                "virtual-2": lambda: noise(engine, length, seed=2, name="virtual-2"),
            }[name]()
            engine.load_cartridge(made)
        return engine

    for name in names:
        alone[name] = ask(make(name), QUESTION, name)
    alone["none"] = run(load(), ids + QUESTION)
    assert alone["exact"] == alone["none"]
    assert len({one.logits for one in alone.values()}) == 4
    engine = make(*names)
    for _ in range(2):
        for name in [*names, "none", *reversed(names), "none"]:
            if name == "none":
                request = engine.submit(ids + QUESTION, params(8))
            else:
                request = engine.submit(QUESTION, params(8), cartridge=name)
            assert trace(request.result()) == alone[name], name


def test_a_name_that_moves_to_other_content_takes_nothing_along(load: Load) -> None:
    engine = load()
    first, second = noise(engine, 20, seed=1, name="doc"), noise(engine, 20, seed=2, name="doc")
    engine.load_cartridge(first)
    before = ask(engine, QUESTION, "doc")
    with pytest.raises(AlreadyExists, match="doc"):
        engine.load_cartridge(second)
    assert engine.unload_cartridge("doc")
    engine.load_cartridge(second)
    after = ask(engine, QUESTION, "doc")
    fresh = load()
    fresh.load_cartridge(second)
    assert before != after == ask(fresh, QUESTION, "doc")


@pytest.mark.parametrize("pages", [28, 400])
def test_two_hundred_interleaved_requests_equal_isolated_ones(pages: int, load: Load) -> None:
    """Three cartridges and none, few questions so that prefixes are shared; the small pool preempts and evicts."""
    engine, isolated = load(pages=pages, max_running=12), load()
    made = [captured(isolated, document(53, 1), "a"), noise(isolated, 64, seed=2, name="b")]
    made.append(noise(isolated, 7, seed=3, name="c"))
    for cartridge in made:
        engine.load_cartridge(cartridge)
        isolated.load_cartridge(cartridge)
    random = np.random.default_rng(3)
    jobs = []
    for _ in range(200):
        name = [None, "a", "b", "c"][int(random.integers(4))]
        question = prompt(int(random.integers(1, 4)) * 7, seed=int(random.integers(4)))
        jobs.append((name, question, int(random.integers(1, 24))))
    requests = [engine.submit(ids, params(most), cartridge=name) for name, ids, most in jobs]
    expected: dict[tuple[str | None, tuple[int, ...], int], Trace] = {}
    for (name, ids, most), request in zip(jobs, requests, strict=True):
        key = name, tuple(ids), most
        if key not in expected:
            isolated.clear_prefix_cache()
            expected[key] = trace(isolated.submit(ids, params(most), cartridge=name).result())
        assert trace(request.result()) == expected[key], key
    assert engine.check_integrity() is None
    stats = engine.stats()
    assert (stats["preemptions"] > 0) == (pages == 28)


# -- room --------------------------------------------------------------------------------------------------------


def test_pages_of_an_unused_cartridge_are_evicted_and_come_back(load: Load) -> None:
    engine = load(pages=10)
    engine.load_cartridge(noise(engine, 70, seed=1))
    expected = ask(engine, QUESTION, "noise", 12)
    for n in range(3):
        run(engine, prompt(120, seed=n + 1), 20)
    assert engine.stats()["evictions"] > 0
    again = engine.submit(QUESTION, params(12), cartridge="noise")
    assert trace(again.result()) == expected
    assert again.cached_tokens == 0


def test_a_preempted_sequence_takes_its_cartridge_up_again(load: Load) -> None:
    engine = load(pages=12)
    engine.load_cartridge(noise(engine, 37, seed=1))
    alone = [ask(load_one(load, 37), prompt(6, seed=n), "noise", 60) for n in range(3)]
    requests = [engine.submit(prompt(6, seed=n), params(60), cartridge="noise") for n in range(3)]
    assert [trace(request.result()) for request in requests] == alone
    assert engine.stats()["preemptions"] > 0


def load_one(load: Load, tokens: int) -> Engine:
    engine = load()
    engine.load_cartridge(noise(engine, tokens, seed=1))
    return engine


def test_host_memory_is_bounded_and_what_is_used_stays(load: Load, tmp_path: Path) -> None:
    engine = load(start=False, cartridge_bytes=1)
    cartridge = noise(engine, 20, seed=1)
    with pytest.raises(ResidencyFull):
        engine.load_cartridge(cartridge)
    assert engine.cartridges.ids() == []
    room = 2 * 2 * engine.layout.page_bytes  # two pages: one of the three
    engine = load(cartridge_bytes=room)
    for n in range(3):
        engine.load_cartridge(noise(engine, 20, seed=n, name=f"c{n}"))
    expected = [ask(load_seeded(load, n), QUESTION, "noise") for n in range(3)]
    for _ in range(2):
        assert [ask(engine, QUESTION, f"c{n}") for n in range(3)] == expected
    metrics = engine.cartridges.metrics()
    assert metrics.evictions >= 5
    assert metrics.resident_bytes <= room
    engine.pause()
    requests = [engine.submit(QUESTION, params(2), cartridge="c0") for _ in range(3)]
    with pytest.raises(ResidencyFull):
        engine.submit(QUESTION, params(2), cartridge="c1")
    engine.resume()
    for request in requests:
        request.result()
    assert ask(engine, QUESTION, "c1") == expected[1]
    assert engine.cartridges.metrics().in_use == 0


def load_seeded(load: Load, seed: int) -> Engine:
    engine = load()
    engine.load_cartridge(noise(engine, 20, seed=seed))
    return engine


def test_holds_end_with_their_requests(load: Load) -> None:
    """However they end: finished, cancelled, failed, refused."""
    engine = load()
    engine.load_cartridge(noise(engine, 20, seed=1))

    def broken(event: object) -> None:
        raise RuntimeError("listener")

    engine.submit(QUESTION, params(4), cartridge="noise").result()
    cancelled = engine.submit(QUESTION, params(400), cartridge="noise")
    next(iter(cancelled))
    cancelled.cancel()
    cancelled.result()
    done = threading.Event()
    engine.submit(QUESTION, params(4), cartridge="noise", on_step=broken)
    engine.submit(QUESTION, params(4), cartridge="noise", on_step=lambda event: done.set() if event is None else None)
    assert done.wait(60)
    with pytest.raises(InvalidInput):
        engine.submit(prompt(600), params(4), cartridge="noise")
    with pytest.raises(InvalidInput):
        engine.submit(QUESTION, params(4), cartridge="noise", sequence_id="../x")
    assert engine.cartridges.metrics().in_use == 0


def test_the_length_counts_cartridge_prompt_and_one_more(load: Load) -> None:
    engine = load(max_model_len=64)
    engine.load_cartridge(noise(engine, 40, seed=1))
    assert len(ask(engine, prompt(23), "noise", 20).tokens) == 1
    with pytest.raises(InvalidInput, match=r"at most 64 tokens here, and the cartridge has 40 and the prompt has 24"):
        engine.submit(prompt(24), params(1), cartridge="noise")
    assert engine.submit(prompt(24), params(0), cartridge="noise").result() == []


# -- prompts that repeat the document ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [15, 16, 40])
def test_a_prompt_that_repeats_the_document_goes_on_after_it(length: int, load: Load) -> None:
    engine, ids = load(), document(length, 0)
    engine.load_cartridge(captured(engine, ids))
    request = engine.submit(ids + QUESTION, params(8), cartridge="doc")
    assert trace(request.result()) == run(load(), ids + QUESTION)
    assert (request.prompt_tokens, request.cached_tokens) == (length + len(QUESTION), length)
    assert request.cartridge is not None
    assert not request.cartridge.placed
    shorter = engine.submit(ids[:-1] + QUESTION, params(8), cartridge="doc")
    assert trace(shorter.result()) == run(load(), ids + ids[:-1] + QUESTION), (
        "it repeats only a part, so it is a prompt"
    )


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 48])
def test_the_document_alone_keeps_the_cartridges_last_row(
    length: int, load: Load, model_dir: Callable[..., Path]
) -> None:
    """Its last token is computed for the logits; what is kept of it is the cartridge's row, here of other last bits."""
    engine, ids = load(), document(length, 0)
    cartridge = prefilled(engine, model_dir(), ids)
    engine.load_cartridge(cartridge)
    alone = engine.submit(ids, params(20), cartridge="doc", sequence_id="alone")
    first = trace(alone.result())
    assert (alone.prompt_tokens, alone.cached_tokens) == (length, length - 1)
    longer = ids + first.tokens
    placed = engine.submit(first.tokens, params(1), cartridge="doc", sequence_id="placed")
    placed.result()
    assert page_bytes(engine, "alone")[: length // 16] == page_bytes(engine, "placed")[: length // 16]
    fresh = load()
    fresh.load_cartridge(cartridge)
    assert run(fresh, longer, 5, cartridge="doc") == run(engine, longer, 5, cartridge="doc")
    assert ask(engine, QUESTION, "doc") == ask(fresh, QUESTION, "doc")


def test_how_a_prompt_must_begin_is_the_requests_choice(load: Load) -> None:
    engine, ids = load(), document(20, 0)
    engine.load_cartridge(captured(engine, ids))
    engine.load_cartridge(noise(engine, 20, seed=1))
    names = engine.cartridges
    assert names.prefix("doc", ids + QUESTION, "virtual").placed
    assert not names.prefix("doc", ids + QUESTION, "prompt").placed
    assert not names.prefix("doc", ids + QUESTION).placed
    with pytest.raises(InvalidInput, match=r"begin with the 20 token ids .* it has 9$"):
        names.prefix("doc", QUESTION, "prompt")
    with pytest.raises(InvalidInput, match="knows no token ids"):
        names.prefix("noise", QUESTION, "prompt")
    twice = engine.submit(ids + QUESTION, params(8), cartridge=names.prefix("doc", ids + QUESTION, "virtual"))
    assert trace(twice.result()) == run(load(), ids + ids + QUESTION)


# -- refusals ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_both_values(load: Load, model_dir: Callable[..., Path]) -> None:
    engine = load()
    good = noise(engine, 20, seed=1)
    other, bf16 = load("qwen3"), load(dtype="bf16")
    with pytest.raises(LayoutMismatch, match=r"(?s)revision"):
        engine.load_cartridge(noise(other, 20, seed=1))
    with pytest.raises(LayoutMismatch, match=r"(?s)bfloat16.*float32|float32.*bfloat16"):
        engine.load_cartridge(noise(bf16, 20, seed=1))
    with pytest.raises(LayoutMismatch, match=r"position 4"):
        engine.load_cartridge(changed_model(good, first_position=4))
    with pytest.raises(LayoutMismatch, match=r"rope"):
        engine.load_cartridge(changed_model(good, rope={"rope_type": "default", "rope_theta": 5.0}))
    assert engine.cartridges.ids() == []
    with pytest.raises(UnknownCartridge, match="noise"):
        engine.submit(QUESTION, params(1), cartridge="noise")
    engine.load_cartridge(good)
    with pytest.raises(InvalidInput, match="keeps the cartridge"):
        engine.submit([], params(1), cartridge="noise", resume="x")
    with pytest.raises(InvalidInput, match="at least one token"):
        engine.submit([], params(1), cartridge="noise")
    assert run(engine, QUESTION) == run(load(), QUESTION)


def test_a_damaged_file_fails_the_request_that_needs_it_and_no_other(load: Load, tmp_path: Path) -> None:
    engine = load(cartridge_bytes=4 * 2 * load(start=False).layout.page_bytes)
    names = ("good", "bad", "other")
    for seed, name in enumerate(names):
        noise(engine, 20, seed=seed, name=name).save_pretrained(tmp_path / name)
    manifests = {name: Cartridge.from_pretrained(tmp_path / name).manifest for name in names}
    engine.cartridges.library = Library([Entry(name, tmp_path / name, manifests[name]) for name in names])
    expected = {name: ask(engine, QUESTION, name) for name in ("bad", "other", "good")}
    shard = next((tmp_path / "bad").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0x10
    shard.unlink()
    shard.write_bytes(data)
    running = engine.submit(QUESTION, params(8), cartridge="good")
    failures: list[BaseException] = []

    def fail() -> None:
        try:
            engine.submit(QUESTION, params(8), cartridge="bad")
        except DamagedCartridge as error:
            failures.append(error)

    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 4
    assert trace(running.result()) == expected["good"]
    for name in ("good", "other"):
        assert ask(engine, QUESTION, name) == expected[name]
    assert run(engine, QUESTION) == run(load(), QUESTION)


def test_removing_a_cartridge_breaks_nothing_that_runs(load: Load) -> None:
    engine = load(pages=12)
    engine.load_cartridge(noise(engine, 37, seed=1))
    alone = [ask(load_one(load, 37), prompt(6, seed=n), "noise", 60) for n in range(3)]
    engine.pause()
    requests = [engine.submit(prompt(6, seed=n), params(60), cartridge="noise") for n in range(3)]
    assert engine.unload_cartridge("noise")
    assert not engine.unload_cartridge("noise")
    engine.resume()
    assert [trace(request.result()) for request in requests] == alone
    assert engine.stats()["preemptions"] > 0
    with pytest.raises(UnknownCartridge):
        engine.submit(QUESTION, params(1), cartridge="noise")


# -- what is refused or fails costs nobody anything --------------------------------------------------------------------


def test_a_resume_never_loads_in_a_pause(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cartridge is evicted, and forgotten, just when the resume looks for it: the sequence has all its pages."""
    engine = load(cartridge_bytes=2 * 2 * load().layout.page_bytes)
    engine.load_cartridge(noise(engine, 20, 0, "c0"))
    run(engine, QUESTION, 3, cartridge="c0", sequence_id="s")
    expected = run(engine, [], 3, resume="s")
    residency = engine.cartridges._residency
    identity = engine.cartridges.find("c0").manifest.identity
    real = residency.lease

    def lease(key: object) -> object:
        found = real(key)
        engine.cartridges.remove("c0")
        residency.evict(identity)
        return found

    monkeypatch.setattr(residency, "lease", lease)
    loads = engine.cartridges.metrics().loads
    for _ in range(2):  # with the lease, and without
        assert run(engine, [], 3, resume="s") == expected
    assert engine.cartridges.metrics().loads == loads
    assert engine.cartridges.metrics().in_use == 0


def test_loading_again_what_is_loaded_changes_nothing(load: Load) -> None:
    engine = load(cartridge_bytes=2 * 2 * load().layout.page_bytes)
    first, second = noise(engine, 20, 0, "c0"), noise(engine, 20, 1, "c1")
    engine.load_cartridge(first)
    engine.load_cartridge(second)
    engine.pause()
    request = engine.submit(QUESTION, params(2), cartridge="c1")
    assert engine.load_cartridge(first) == "c0", "though there is no room for it now"
    engine.resume()
    request.result()
    assert engine.cartridges.ids() == ["c0", "c1"]
    ask(engine, QUESTION, "c0")


def test_what_is_too_long_is_refused_before_anything_is_loaded(load: Load) -> None:
    engine = load(max_model_len=64, cartridge_bytes=8 * 2 * load().layout.page_bytes)
    engine.load_cartridge(noise(engine, 20, 0, "small"))
    engine.load_cartridge(noise(engine, 100, 1, "long"))
    ask(engine, QUESTION, "small")
    before = engine.cartridges.metrics()
    with pytest.raises(InvalidInput, match="cartridge has 100 and the prompt has 9"):
        engine.submit(QUESTION, params(1), cartridge="long")
    for mode in ("prompt",):
        with pytest.raises(InvalidInput):
            engine.cartridges.prefix("long", QUESTION, mode)  # type: ignore[arg-type]
    after = engine.cartridges.metrics()
    assert (after.loads, after.evictions) == (before.loads, before.evictions)


@pytest.mark.parametrize("wrong", [5000, 2**32 - 1])
def test_a_document_that_is_not_of_the_vocabulary(wrong: int, load: Load, tmp_path: Path) -> None:
    engine = load(cartridge_bytes=2 * 2 * load().layout.page_bytes)
    engine.load_cartridge(noise(engine, 20, 0, "good"))
    layers = [noise(engine, 20, 1).layer(number) for number in range(engine.layout.n_layers)]
    bad = Cartridge.create(layers, engine.model.identity, cartridge_id="bad", token_ids=[5] * 19 + [wrong])
    saved = Entry("saved", bad.save_pretrained(tmp_path / "bad"), bad.manifest)
    engine.cartridges.library = Library([saved])
    with pytest.raises(InvalidCartridge, match=rf"got {wrong}"):
        engine.load_cartridge(bad)
    with pytest.raises(InvalidCartridge, match=rf"got {wrong}"):
        engine.submit(QUESTION, params(1), cartridge="saved")
    assert engine.cartridges.metrics().evictions == 0
    ask(engine, QUESTION, "good")


@pytest.mark.parametrize("changes", ["all of it virtual", "virtual and not placed", "too many tokens"])
def test_snapshots_that_no_engine_makes(changes: str, load: Load) -> None:
    source, target = load(), load()
    for engine in (source, target):
        engine.load_cartridge(noise(engine, 40, 1, "c"))
    run(source, QUESTION, 3, cartridge="c", sequence_id="p")
    (seq,) = HfPager(source, ["p"]).logical_seqs()
    bare = dataclasses.replace(seq, page_ixs=(), fill_in_last_page=0)
    told = seq.state["cartridge"]
    if changes == "too many tokens":
        state = seq.state | {"cartridge": told | {"tokens": 90}}
        HfPager(target).install_logical_seqs([dataclasses.replace(bare, token_ids=(5,) * 100, state=state)])
        with pytest.raises(DamagedCartridge, match="has 90 tokens, which are 6 pages, and it has 3"):
            target.submit([], params(2), resume="p")
    else:
        is_all = changes == "all of it virtual"
        state = seq.state | {"cartridge": told | {"placed": is_all}}
        crafted = dataclasses.replace(bare, state=state, token_ids=seq.token_ids[:40] if is_all else seq.token_ids)
        with pytest.raises(InvalidInput, match="must be placed before at least one"):
            HfPager(target).install_logical_seqs([crafted])
    assert ask(target, QUESTION, "c") == ask(source, QUESTION, "c")
    assert target.cartridges.metrics().in_use == 0
