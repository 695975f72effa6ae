"""Snapshots of requests among others, continued among others; and many forks at once.

On a CPU, only under settings that make a request's numbers independent of its company. A prefill gives the same
numbers then, so that every case also proves by `cached_tokens` and by a flipped bit where they came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvist.testing.answers import Completion
from kvist.testing.scenario.requests import (
    CHECKOUT,
    FORK,
    GREEDY,
    MORE,
    SEEDED,
    STATS,
    TOTAL,
    Case,
    Past,
    assert_same,
    at_once,
    baseline,
    busy,
    cases,
    check_out,
    error_of,
    go_on,
    interrupt,
    prompt,
)
from kvist.testing.scenario.store import flip_a_bit
from kvist.testing.vllm import VllmServer

CASES = cases((1, 31, 32, 33, 500, 1900), seed=50)
NAMES = [case.name for case in CASES]
FORKED = Case("forked", prompt(450, seed=60), SEEDED)
PREFERRED = ("greedy-33", "seeded-500")


@pytest.fixture(scope="module")
def pasts(store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> dict[str, Past]:
    server = start(model(), store, "--max-model-len", "8192", deterministic=True)
    alone = {case.name: baseline(server, case) for case in CASES if case.name in PREFERRED}
    with busy(server):
        pasts = {case.name: interrupt(server, case) for case in CASES}
    with busy(server):
        pasts["forked"] = interrupt(server, FORKED)
    server.kill()
    for name, whole in alone.items():
        assert_same(pasts[name].whole.steps, whole.steps)
    return pasts


@pytest.fixture(scope="module")
def fresh(
    pasts: dict[str, Past], store: str, model: Callable[..., Path], start: Callable[..., VllmServer]
) -> Iterator[VllmServer]:
    server = start(model(), store, "--max-model-len", "8192", deterministic=True)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def continued(pasts: dict[str, Past], fresh: VllmServer) -> dict[str, Completion]:
    """All cases continued among four others; the second half of them also among each other."""
    chosen = [pasts[name] for name in NAMES]
    with busy(fresh):
        for before in chosen:
            check_out(fresh, before)
        one_by_one = [go_on(fresh, before) for before in chosen[:6]]
        together = at_once([lambda before=before: go_on(fresh, before) for before in chosen[6:]])  # type: ignore[misc]
    return dict(zip(NAMES, one_by_one + together, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_bit_for_bit_among_others(name: str, pasts: dict[str, Past], continued: dict[str, Completion]) -> None:
    assert_same(continued[name].steps, pasts[name].next_steps())
    assert continued[name].cached_tokens == pasts[name].tokens - 1


def test_twelve_forks(pasts: dict[str, Past], continued: dict[str, Completion], fresh: VllmServer) -> None:
    """The fork that samples as the original did equals it; the others go their ways; pages are loaded once."""
    before = pasts["forked"]
    forks = fresh.post(FORK, {"cid": before.cid, "n": 12})["cids"]
    assert len(set(forks)) == 12
    for cid in forks:
        fresh.post(CHECKOUT, {"cid": cid})
    counted = fresh.get(STATS)

    def run(at: int) -> Completion:
        params = before.case.params | {"seed": before.case.params["seed"] + at, "max_tokens": MORE}
        return fresh.resume(forks[at], before.sequence, **params)

    results = at_once([lambda at=at: run(at) for at in range(12)])  # type: ignore[misc]
    assert [got.cached_tokens for got in results] == [before.tokens - 1] * 12
    assert_same(results[0].steps, before.next_steps())
    assert len({tuple(got.token_ids) for got in results}) == 12

    full, fill = divmod(before.tokens - 1, 32)
    after = fresh.get(STATS)
    # Full pages are shared. The last one, which each fork goes on to write, lies in a slot of each fork's own.
    assert after["pages_loaded"] - counted["pages_loaded"] <= full + 12 * (fill > 0)
    assert after["pages_read"] - counted["pages_read"] <= full + (fill > 0)


def test_fork_of_a_fork(pasts: dict[str, Past], fresh: VllmServer) -> None:
    before = pasts["forked"]
    (fork,) = fresh.post(FORK, {"cid": before.cid})["cids"]
    (twig,) = fresh.post(FORK, {"cid": fork, "n": 1})["cids"]
    got = fresh.resume(twig, before.sequence, max_tokens=MORE, **before.case.params)
    assert_same(got.steps, before.next_steps())


def test_a_snapshot_of_a_continued_request(pasts: dict[str, Past], fresh: VllmServer) -> None:
    """Snapshot, go on, snapshot again, go on again: still the first request."""
    before = pasts["greedy-33"]
    check_out(fresh, before)
    named = {"snapshot": before.cid, "sequence": before.sequence}
    stream = fresh.stream(None, name="again", kv_transfer_params=named, max_tokens=MORE, **GREEDY)
    stream.wait(20)
    answer = fresh.post("/v1/processfork/snapshot", {"request_id": stream.id})
    assert_same(stream.result().steps, before.next_steps())
    (sequence,) = answer["sequences"]
    sampled = sequence["tokens"] - 33
    assert sampled < TOTAL - 20
    got = fresh.resume(answer["cid"], sequence["id"], max_tokens=20, **GREEDY)
    assert_same(got.steps, before.whole.steps[sampled : sampled + 20])
    assert got.cached_tokens == sequence["tokens"] - 1


@pytest.mark.parametrize("name", NAMES)
def test_zz_one_flipped_bit_fails_the_checkout(
    name: str, pasts: dict[str, Past], continued: dict[str, Completion], fresh: VllmServer, store: str
) -> None:
    """After all others in this module: it damages the store."""
    before = pasts[name]
    pages = math.ceil((before.tokens - 1) / 32)
    flip_a_bit(store, before.cid, page=pages // 2, at=7)
    message = error_of(fresh.http.post(CHECKOUT, json={"cid": before.cid}), 500, "damaged_page")
    assert "sha256:" in message or "blake3:" in message
    got = fresh.complete(before.case.prompt, max_tokens=4, **before.case.params)
    assert_same(got.steps, before.whole.steps[:4])
