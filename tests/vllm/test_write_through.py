"""The durable prefix cache: what one server computed, the next one hits, without anybody taking a snapshot."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvist.repo import Repository, gc
from kvist.testing.scenario.requests import GREEDY, STATS, prompt
from kvist.testing.scenario.store import root_of
from kvist.testing.vllm import VllmServer

WRITE_THROUGH = {"mode": "write_through"}
PROMPTS = [prompt(1500, seed=700 + n) for n in range(3)]
BLOCK = 32


def settle(server: VllmServer) -> None:
    """Wait until nothing more is written in the background."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 2.0:
        now = server.get(STATS)["blocks_saved"]
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.1)


def named_bytes(store: str) -> int:
    """Bytes of the distinct page halves that branches of a store name."""
    with Repository.open(store) as repo:
        manifests = {cid for snapshot in repo.reachable().values() for cid in snapshot.manifests}
        halves = {half for cid in manifests for page in repo.manifest(cid).pages for half in (page.k, page.v)}
        return sum(repo.pages.size(half) or 0 for half in halves)


def bytes_of(store: str) -> int:
    return sum(path.stat().st_size for path in root_of(store).rglob("*") if path.is_file())


def test_across_a_restart(
    store: str, model: Callable[..., Path], start: Callable[..., VllmServer], note: Callable[[str], None]
) -> None:
    """On a model whose prefill costs, so that the cost model has every reason to load."""
    shape = model("realistic")
    options = ("--num-gpu-blocks-override", "200")
    server = start(shape, store, *options, settings=WRITE_THROUGH)
    before = [server.complete(tokens, max_tokens=4, **GREEDY) for tokens in PROMPTS]
    settle(server)
    server.kill()

    server = start(shape, store, *options, settings=WRITE_THROUGH)
    began = time.monotonic()
    unknown = server.complete(prompt(1500, seed=799), max_tokens=4, **GREEDY)
    computed_s = time.monotonic() - began
    assert unknown.cached_tokens == 0
    began = time.monotonic()
    got = server.complete(PROMPTS[0], max_tokens=4, **GREEDY)
    loaded_s = time.monotonic() - began
    note(f"write_through, 1,500 tokens: computed in {computed_s:.2f} s, loaded in {loaded_s:.2f} s")
    assert got.cached_tokens == (len(PROMPTS[0]) - 1) // BLOCK * BLOCK
    # A longer prompt with the same start, and another with half of it, hit what they share.
    longer = server.complete([*PROMPTS[1], *prompt(100, seed=790)], max_tokens=4, **GREEDY)
    assert longer.cached_tokens >= len(PROMPTS[1]) // BLOCK * BLOCK
    half = server.complete([*PROMPTS[2][:800], *prompt(100, seed=791)], max_tokens=4, **GREEDY)
    assert half.cached_tokens == 800 // BLOCK * BLOCK
    assert [step.token_id for step in got.steps][:1] == [step.token_id for step in before[0].steps][:1]
    server.kill()


@pytest.mark.slow
def test_bounded_and_damaged(store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> None:
    """The bound holds; under vLLM's policy ``recompute`` a damaged page is a miss, and under none is it text."""
    store += "-bounded"
    bound = 64 << 20
    shape = model("realistic")
    settings = WRITE_THROUGH | {"cache_bytes": bound}
    server = start(shape, store, settings=settings, deterministic=True)
    before = [server.complete(tokens, max_tokens=4, **GREEDY) for tokens in PROMPTS]
    settle(server)
    server.kill()
    assert named_bytes(store) <= bound
    with Repository.open(store) as repo:
        gc.apply(repo, gc.plan(repo, min_age=0))
    assert bytes_of(store) <= 2 * bound

    for path in root_of(store).rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 20:
            raw = bytearray(path.read_bytes())
            # Whoever attends to that says nothing like before.
            raw[len(raw) // 3 : len(raw) // 3 + 4096] = b"\x7f" * 4096
            path.chmod(0o644)
            path.write_bytes(raw)
    recompute = {"kv_load_failure_policy": "recompute"}
    server = start(shape, store, settings=settings, transfer=recompute, deterministic=True)
    for tokens, expected in zip(PROMPTS, before, strict=True):
        got = server.complete(tokens, max_tokens=1, **GREEDY)
        # A prefill that begins behind a hit rounds otherwise than a whole one: a cache promises no bits.
        assert got.steps[0].token_id == expected.steps[0].token_id
        assert got.steps[0].logprob == pytest.approx(expected.steps[0].logprob, abs=0.05)
    assert server.get(STATS)["loads_failed"] >= 1
    assert server.http.get("/health").status_code == 200
    server.kill()
