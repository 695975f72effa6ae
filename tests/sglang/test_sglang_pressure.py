"""A server of SGLang with little room, or that puts requests back: who goes on from a snapshot keeps nobody out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from sglang_servers import needs_server, serve

from kvist.testing.models import make_shape
from kvist.testing.scenario.requests import GREEDY, SNAPSHOT, at_once, prompt
from kvist.testing.sglang import SglangServer

pytestmark = [needs_server, pytest.mark.timeout(1800)]

TOKENS = 640
HUGE = 4000
"""More than the pool holds, less than the model takes: SGLang cuts it to what there is room for."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    root = tmp_path_factory.mktemp("pressure")
    model = make_shape(root / "model", "tiny")
    running = serve(model, (root / "store").as_uri(), page_size=16, tokens=TOKENS)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def named(server: SglangServer) -> list[dict[str, Any]]:
    """Two snapshots, each of nearly half of the pool; its prefix cache is empty again."""
    found = []
    for seed in (1, 2):
        done = server.complete(prompt(265, seed=seed), name=f"half{seed}", max_tokens=20, **GREEDY)
        answer = server.post(SNAPSHOT, {"request_id": done.id, "name": f"half{seed}"})
        found.append({"snapshot": answer["cid"], "sequence": answer["sequences"][0]["id"]})
    assert server.http.post("/flush_cache").status_code == 200
    return found


def test_alone_with_all_that_the_pool_holds(server: SglangServer, named: list[dict[str, Any]]) -> None:
    """It may generate until the pool is full: the partly filled page is no reason to wait for ever."""
    got = server.complete(None, kv_transfer_params=named[0], max_tokens=HUGE, **GREEDY)
    assert len(got.steps) > 250
    assert got.cached_tokens >= 256


def test_two_that_do_not_fit_in_at_once(server: SglangServer, named: list[dict[str, Any]]) -> None:
    """Nor beside a third that goes on from nothing: one after the other, all of them come to their end."""
    assert server.http.post("/flush_cache").status_code == 200
    asked = [partial(server.complete, None, kv_transfer_params=each, max_tokens=200, **GREEDY) for each in named]
    plain = partial(server.complete, prompt(300, seed=3), max_tokens=200, **GREEDY)
    for got in at_once([*asked, plain]):
        assert len(got.steps) == 200


def test_one_that_sglang_puts_back_keeps_its_salt(server: SglangServer, named: list[dict[str, Any]]) -> None:
    """A pause that retracts queues it anew; it was asked under no salt still, and its snapshot can be continued."""
    stream = server.stream(None, kv_transfer_params=named[0], max_tokens=150, name="back", **GREEDY)
    stream.wait(10)
    assert server.http.post("/pause_generation", json={"mode": "retract"}).status_code == 200
    assert server.http.post("/continue_generation", json={}).status_code == 200
    stream.wait(60)
    answer = server.post(SNAPSHOT, {"request_id": "back"})
    assert len(stream.result().steps) == 150
    (kept,) = answer["sequences"]
    again = {"snapshot": answer["cid"], "sequence": kept["id"]}
    got = server.complete(None, kv_transfer_params=again, max_tokens=5, **GREEDY)
    assert got.cached_tokens == kept["tokens"] - 1


def test_a_request_that_was_refused_is_no_sequence(server: SglangServer) -> None:
    """SGLang computes one token in its place; the one of that name that ended well is still there."""
    done = server.complete(prompt(40, seed=4), name="asked", max_tokens=5, **GREEDY)
    refused = server.http.post(
        "/v1/completions", json={"prompt": prompt(TOKENS + 100, seed=4)}, headers={"X-Request-Id": "asked"}
    )
    assert refused.status_code == 400
    (kept,) = server.post(SNAPSHOT, {"request_id": "asked"})["sequences"]
    assert kept["tokens"] == 40 + len(done.steps)
