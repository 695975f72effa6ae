"""What requests do to each other around a restore: clients that leave, tenants, and host memory that is too small."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvist.testing.scenario.requests import (
    CHECKOUT,
    GREEDY,
    MORE,
    SNAPSHOT,
    STATS,
    Case,
    Past,
    assert_same,
    at_once,
    check_out,
    go_on,
    interrupt,
    prompt,
)
from kvist.testing.vllm import VllmServer

LONG = Case("long", prompt(3000, seed=70), GREEDY)
TENANT = Case("tenant", prompt(320, seed=71), GREEDY | {"cache_salt": "tenant-a"})
HOST_BYTES = 4 << 20
"""A quarter of the long request's pages: every load, preload and capture of it must share its slots."""


@pytest.fixture(scope="module")
def pasts(store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> dict[str, Past]:
    server = start(model(), store)
    pasts = {case.name: interrupt(server, case) for case in (LONG, TENANT)}
    server.kill()
    return pasts


@pytest.fixture(scope="module")
def fresh(
    pasts: dict[str, Past], store: str, model: Callable[..., Path], start: Callable[..., VllmServer]
) -> Iterator[VllmServer]:
    server = start(model(), store, settings={"host_bytes": HOST_BYTES})
    yield server
    server.kill()


def test_a_client_that_leaves_while_its_pages_come(pasts: dict[str, Past], fresh: VllmServer) -> None:
    """At whatever moment: the next one gets the same text, and nothing stays pinned."""
    before = pasts["long"]
    check_out(fresh, before)
    named = {"snapshot": before.cid, "sequence": before.sequence}
    for turn in range(12):
        stream = fresh.stream(None, kv_transfer_params=named, max_tokens=MORE, **GREEDY)
        time.sleep(0.01 * turn)
        stream.close()
    assert_same(go_on(fresh, before).steps, before.next_steps())
    deadline = time.monotonic() + 60
    while _blocks_in_use(fresh) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _blocks_in_use(fresh), "blocks of requests that were given up are still held"


def test_a_tenant_s_sequence_is_hit_by_no_other(pasts: dict[str, Past], fresh: VllmServer) -> None:
    """Its ``cache_salt`` is part of what a prompt is matched by, and of what who names the sequence must bring."""
    before = pasts["tenant"]
    check_out(fresh, before)
    params = {"max_tokens": 4, **GREEDY}
    assert fresh.complete(before.token_ids, **params).cached_tokens == 0
    assert fresh.complete(before.token_ids, cache_salt="tenant-b", **params).cached_tokens == 0
    own_blocks = (before.tokens - 1) // 32 * 32  # of the two requests above, in vLLM's own prefix cache
    assert fresh.resume(before.cid, before.sequence, **params).cached_tokens == own_blocks
    assert fresh.resume(before.cid, before.sequence, cache_salt="tenant-b", **params).cached_tokens == own_blocks
    named = fresh.resume(before.cid, before.sequence, cache_salt="tenant-a", **params)
    assert named.cached_tokens == before.tokens - 1
    own = fresh.complete(before.token_ids, cache_salt="tenant-a", **params)
    assert own.cached_tokens == before.tokens - 1
    assert_same(own.steps, before.next_steps(4))


def test_preloading_beside_a_capture_of_all(pasts: dict[str, Past], fresh: VllmServer) -> None:
    """Both want more slots of host memory than there are: neither waits for the other for ever."""
    before = pasts["long"]
    fresh.complete(prompt(3500, seed=72), max_tokens=1, **GREEDY)
    assert fresh.get(STATS)["pages_loaded"] > 0
    answers = at_once(
        [
            lambda: fresh.post(CHECKOUT, {"cid": before.cid, "preload": True}),
            lambda: fresh.post(SNAPSHOT, {"name": "all"}),
            lambda: go_on(fresh, before, 20),
        ]
    )
    assert answers[0]["ok"] is True
    assert answers[1]["cid"]
    assert answers[2].cached_tokens == before.tokens - 1
    assert_same(answers[2].steps, before.next_steps(20))


def _blocks_in_use(server: VllmServer) -> bool:
    lines = [line for line in server.http.get("/metrics").text.splitlines() if "kv_cache_usage_perc{" in line]
    assert lines
    return any(float(line.rsplit(" ", 1)[1]) > 0 for line in lines)
