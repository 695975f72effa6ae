"""vLLM's policy ``recompute``: what cannot be loaded is prefilled anew; under deterministic settings, the same text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvist.testing.scenario.requests import (
    GREEDY,
    MORE,
    Case,
    assert_same,
    baseline,
    check_out,
    go_on,
    interrupt,
    prompt,
)
from kvist.testing.scenario.store import root_of
from kvist.testing.vllm import VllmServer

pytestmark = pytest.mark.slow
CASE = Case("case", prompt(300, seed=900), GREEDY)


def test_recomputed(store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> None:
    server = start(model(), store, deterministic=True)
    whole = baseline(server, CASE)
    before = interrupt(server, CASE)
    assert_same(before.whole.steps, whole.steps)
    server.kill()  # or its host memory would still hold the pages
    server = start(model(), store, deterministic=True, transfer={"kv_load_failure_policy": "recompute"})
    check_out(server, before)
    shutil.rmtree(root_of(store) / "segments")
    got = go_on(server, before)
    prefilled = server.complete(before.token_ids, cache_salt="prefilled", max_tokens=MORE, **CASE.params)
    assert_same(got.steps, prefilled.steps)
    assert got.cached_tokens < before.tokens - 1
    assert server.http.get("/health").status_code == 200
    server.kill()
