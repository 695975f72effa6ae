"""Page tiers: what one server saved, another loads from Redis, and the store gives it no page."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvist.errors import EngineError
from kvist.repo import Repository
from kvist.testing.scenario.requests import GREEDY, SNAPSHOT, STATS, prompt
from kvist.testing.tier_servers import REDIS, redis_server
from kvist.testing.vllm import VllmServer

PROMPT = prompt(500, seed=900)


def halves_of(store: str, rev: str) -> set[str]:
    """Digests of all page halves that a snapshot names."""
    with Repository.open(store) as repo:
        manifests = [repo.manifest(cid) for cid in repo.snapshot(rev).manifests]
        return {half for manifest in manifests for half in manifest.digests}


@pytest.mark.skipif(REDIS is None, reason="needs redis-server or valkey-server")
def test_two_servers_share_a_redis(
    store: str, model: Callable[..., Path], start: Callable[..., VllmServer], note: Callable[[str], None]
) -> None:
    redis = pytest.importorskip("redis")
    with redis_server() as port:
        settings = {"tiers": [f"redis://127.0.0.1:{port}/0?timeout=60"]}
        server = start(model(), store, settings=settings, deterministic=True)
        server.complete(PROMPT, name="first", max_tokens=20, **GREEDY)
        made = server.post(SNAPSHOT, {"request_id": "first"})
        halves = halves_of(store, made["cid"])
        with redis.Redis(port=port) as client:
            while client.dbsize() < len(halves):  # they come in the background
                time.sleep(0.1)
        server.kill()

        server = start(model(), store, settings=settings, deterministic=True)
        sequence = made["sequences"][0]["id"]
        more = server.resume(made["cid"], sequence, max_tokens=20, **GREEDY)
        stats = server.get(STATS)
        note(f"tiers: {stats['tier_hits']} halves, {stats['bytes_from_tiers']} bytes from Redis")
        assert more.cached_tokens >= len(PROMPT)
        assert stats["bytes_from_store"] == 0
        assert (stats["tier_hits"], stats["tier_misses"], stats["tier_bad"]) == (len(halves), 0, 0)
        assert stats["bytes_from_tiers"] > 0
        server.kill()


def test_a_wrong_tier_ends_the_start(store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> None:
    with pytest.raises(EngineError, match="a page tier's url starts with 'nfs'"):
        start(model(), store, settings={"tiers": ["nfs://somewhere"]})
