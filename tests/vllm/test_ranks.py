"""Two tensor-parallel ranks: each stores and loads its own pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvist.testing.scenario.requests import (
    GREEDY,
    SEEDED,
    SNAPSHOTS,
    Case,
    assert_same,
    check_out,
    go_on,
    interrupt,
    prompt,
)
from kvist.testing.vllm import VllmServer

CASES = [Case("ranks-seeded", prompt(100, seed=31), SEEDED), Case("ranks-greedy", prompt(33, seed=32), GREEDY)]
OPTIONS = ("--tensor-parallel-size", "2")
ENV = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_two_ranks(store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> None:
    server = start(model(), store, *OPTIONS, env=ENV)
    pasts = [interrupt(server, case) for case in CASES]
    assert all(len(server.get(f"{SNAPSHOTS}/{past.cid}")["manifests"]) == 2 for past in pasts)
    server.kill()
    server = start(model(), store, *OPTIONS, env=ENV)
    for past in pasts:
        check_out(server, past)
        got = go_on(server, past)
        assert_same(got.steps, past.next_steps())
        assert got.cached_tokens == past.tokens - 1
    server.kill()
