"""Whatever uses which cartridge in whatever order, each request is as if it were alone."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.cartridge.cartridge import Cartridge
from kvist.engines.hf import Engine
from kvist.engines.hf.model import Model

from .cartridges import noise
from .driving import Trace, params, trace

IDS = st.integers(3, 4)
"""Two ids, so that prompts, documents and tails agree by chance."""


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[tuple[int, list[int] | None]], list[tuple[int, list[int], int]], int]:
    """Cartridges (seed, and the document's ids or ``None``), requests (which, prompt, tokens), and pages."""
    made: list[tuple[int, list[int] | None]] = []
    lengths: list[int] = []
    for seed in range(draw(st.integers(1, 3))):
        lengths.append(draw(st.integers(1, 14)))
        ids = draw(st.none() | st.lists(IDS, min_size=lengths[-1], max_size=lengths[-1]))
        made.append((100 * lengths[-1] + seed, ids))
    jobs = []
    for _ in range(draw(st.integers(1, 8))):
        which = draw(st.integers(-1, len(made) - 1))
        prompt = draw(st.lists(IDS, min_size=1, max_size=10))
        document = made[which][1] if which >= 0 else None
        if document is not None and draw(st.booleans()):
            prompt = document + prompt[: draw(st.integers(0, len(prompt)))]
        jobs.append((which, prompt, draw(st.integers(0, 6))))
    return made, jobs, draw(st.integers(12, 40))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scene=scenes(), in_turn=st.booleans())
def test_requests_do_not_know_of_each_other(
    scene: tuple[list[tuple[int, list[int] | None]], list[tuple[int, list[int], int]], int],
    in_turn: bool,
    model: Callable[..., Model],
) -> None:
    made, jobs, pages = scene
    tiny = model("llama", None, 4)

    def engine_with(wanted: int | None, pages: int) -> Engine:
        engine = Engine(tiny, pages=pages, max_running=4)
        for number, (seed, ids) in enumerate(made):
            if wanted is None or wanted == number:
                layers = [noise(engine, seed // 100, seed).layer(n) for n in range(2)]
                engine.load_cartridge(
                    Cartridge.create(layers, tiny.identity, cartridge_id=f"c{number}", token_ids=ids, block_size=4)
                )
        return engine

    def name(which: int) -> str | None:
        return None if which < 0 else f"c{which}"

    alone: dict[tuple[int, tuple[int, ...], int], Trace] = {}
    for which, prompt, tokens in jobs:
        key = which, tuple(prompt), tokens
        if key not in alone:
            with engine_with(which, 40) as engine:
                alone[key] = trace(engine.submit(prompt, params(tokens), cartridge=name(which)).result())
    with engine_with(None, pages) as engine:
        requests = []
        for which, prompt, tokens in jobs:
            requests.append(engine.submit(prompt, params(tokens), cartridge=name(which)))
            if in_turn:
                requests[-1].result()
                requests[-1] = engine.submit(prompt, params(tokens), cartridge=name(which))
        for (which, prompt, tokens), request in zip(jobs, requests, strict=True):
            assert trace(request.result()) == alone[which, tuple(prompt), tokens]
        engine.check_integrity()
        assert engine.cartridges.metrics().in_use == 0
