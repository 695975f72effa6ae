"""Real SGLang servers over one repository: what one stored before its SIGKILL, the next prefetches, bit for bit.

`hicache_server.py` says what had to be put in the place of an accelerator.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hicache_real import HAS_SGLANG

from kvist.errors import EngineError
from kvist.repo.repository import Repository
from kvist.testing.live import LiveServer
from kvist.testing.models import make_shape
from kvist.testing.processes import free_port

PYTHON = os.environ.get("KVIST_SGLANG_PYTHON", sys.executable if HAS_SGLANG else None)
PAGE, PROMPT, TOKENS = 16, 300, 40
WHOLE = PROMPT // PAGE * PAGE
HERE, SOURCE = Path(__file__).parent, Path(__file__).parents[2] / "src"

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="sglang is not installed here, and KVIST_SGLANG_PYTHON names no interpreter that has it"
)


def options(store: Path, **more: Any) -> str:
    """What the backend is told."""
    return json.dumps(
        {
            "backend_name": "kvist",
            "module_path": "kvist.engines.sglang.hicache",
            "class_name": "KvistHiCache",
            "store": store.as_uri(),
            "prefetch_threshold": PAGE,
            **more,
        }
    )


class HiCacheServer(LiveServer):
    """SGLang with HiCache over a repository."""

    called = "SGLang"

    def __init__(self, model: Path, layout: str, extra: str) -> None:
        port = free_port()
        flags = {
            "model-path": model,
            "port": port,
            "device": "cpu",
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "grammar-backend": "none",
            "page-size": PAGE,
            "max-total-tokens": 4096,
            "hicache-ratio": 2,
            "hicache-io-backend": "direct",
            "hicache-mem-layout": layout,
            "hicache-write-policy": "write_through",
            "hicache-storage-prefetch-policy": "wait_complete",
            "hicache-storage-backend": "dynamic",
            "hicache-storage-backend-extra-config": extra,
            "admin-api-key": "admin",
        }
        words = ["disable-cuda-graph", "enable-hierarchical-cache", "skip-server-warmup", "enable-metrics"]
        super().__init__(
            [
                str(PYTHON),
                str(HERE / "hicache_server.py"),
                *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
                *(f"--{word}" for word in words),
            ],
            port=port,
            env={
                "PYTHONPATH": f"{HERE / 'shims'}:{SOURCE}",
                "SGLANG_USE_CPU_ENGINE": "1",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
            api_key="admin",
        )


class Answer(NamedTuple):
    ids: list[int]
    logprobs: list[float]
    cached: int
    stored: int


def ask(server: LiveServer, prompt: list[int]) -> Answer:
    """Greedy tokens, with how many of the prompt's were cached, and how many of these came from the store."""
    sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    meta = server.post("/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})[
        "meta_info"
    ]
    told = meta["output_token_logprobs"]
    details = meta["cached_tokens_details"] or {"storage": 0}
    return Answer([each[1] for each in told], [each[0] for each in told], meta["cached_tokens"], details["storage"])


def flush(server: LiveServer) -> None:
    """Empty the device's pool and the host's."""
    assert server.http.post("/flush_cache", params={"timeout": 60}).status_code == 200


def stored(store: Path) -> int:
    """How many pages a repository's one prefix cache names."""
    if not (store / "kvist.json").exists():
        return 0
    with Repository.open(store.as_uri()) as repo:
        count = 0
        for ref in repo.refs.all():
            cid = ref.cid
            while cid is not None:
                snapshot = repo.objects.snapshot(cid)
                count += sum(len(repo.manifest(manifest).pages) for manifest in snapshot.manifests)
                cid = snapshot.parents[0] if snapshot.parents else None
        return count


def wait_for(store: Path, pages: int) -> None:
    """Until so many pages are durable: the servers store behind their answers."""
    while stored(store) < pages:
        time.sleep(0.05)


def damage(store: Path) -> None:
    """Flip one bit in each page that was stored first, wherever it lies."""
    with Repository.open(store.as_uri()) as repo:
        (ref,) = repo.refs.all()
        assert ref.cid is not None
        first = repo.objects.snapshot(ref.cid)
        while first.parents:
            first = repo.objects.snapshot(first.parents[0])
        (cid,) = first.manifests
        manifest = repo.manifest(cid)
        halves = [bytearray(manifest.layout.page_bytes) for _ in manifest.pages]
        repo.get_pages([page.v for page in manifest.pages], [memoryview(half) for half in halves])
    for path in (store / "segments").iterdir():
        content = bytearray(path.read_bytes())
        for half in halves:
            if (place := content.find(half)) >= 0:
                content[place + 5] ^= 4
        path.write_bytes(content)


class World(NamedTuple):
    store: Path
    prompts: list[list[int]]
    cold: list[Answer]
    warm: list[Answer]
    server: LiveServer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A second server, after a first one with another order of the host pool was killed."""
    place = tmp_path_factory.mktemp("hicache")
    store, model = place / "store", make_shape(place / "model", "tiny", dtype="bfloat16")
    draw = random.Random(7)
    prompts = [[draw.randrange(10, 250) for _ in range(PROMPT)] for _ in range(3)]
    with HiCacheServer(model, "layer_first", options(store)) as first:
        cold = [ask(first, prompt) for prompt in prompts]
        warm = [ask(first, prompt) for prompt in prompts]
        wait_for(store, 3 * WHOLE // PAGE)
        first.kill()
    (place / "hicache.json").write_text(options(store, interface_v1=1))
    with HiCacheServer(model, "page_first_direct", f"@{place / 'hicache.json'}") as second:
        yield World(store, prompts, cold, warm, second)


def test_what_was_stored_before_a_sigkill_is_prefetched_bit_for_bit(world: World) -> None:
    for prompt, cold, warm in zip(world.prompts, world.cold, world.warm, strict=True):
        assert (cold.cached, warm.cached, warm.stored) == (0, WHOLE, 0)
        got = ask(world.server, prompt)
        assert (got.cached, got.stored) == (WHOLE, WHOLE)
        assert got.ids == warm.ids == cold.ids
        assert got.logprobs == warm.logprobs
    assert "KvistHiCache" in world.server.log


def test_a_damaged_page_is_never_data(world: World) -> None:
    flush(world.server)
    damage(world.store)
    answers = [ask(world.server, prompt) for prompt in world.prompts]
    assert [answer.stored for answer in answers] == [0, WHOLE, WHOLE]
    assert [answer.ids for answer in answers] == [warm.ids for warm in world.warm]
    assert "a chunk is lost" in world.server.log
    wait_for(world.store, 3 * WHOLE // PAGE)
    while True:  # the page that was computed again is stored again, behind the answer
        flush(world.server)
        if all(ask(world.server, prompt).stored == WHOLE for prompt in world.prompts):
            break


def test_prefetched_tokens_are_counted_by_sglang(world: World) -> None:
    flush(world.server)
    ask(world.server, world.prompts[0])
    lines = world.server.http.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("sglang:prefetched_tokens_total{")]
    assert float(line.rpartition(" ")[2]) >= WHOLE


def test_options_are_refused_by_name_and_the_server_lives(world: World) -> None:
    server = world.server
    assert server.http.delete("/hicache/storage-backend").status_code == 200
    flush(server)
    assert ask(server, world.prompts[0]).cached == 0

    def attach(**more: Any) -> Any:
        body = {
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config_json": options(world.store, interface_v1=1, **more),
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_write_policy": "write_through",
        }
        return server.http.put("/hicache/storage-backend", json=body)

    refused = attach(stor="x")
    assert refused.status_code == 400
    assert "got stor" in refused.text
    assert attach().status_code == 200
    flush(server)
    assert ask(server, world.prompts[0]).stored == WHOLE


def test_clear_forgets_what_is_stored(world: World) -> None:
    flush(world.server)
    assert world.server.http.post("/hicache/storage-backend/clear").status_code == 200
    assert stored(world.store) == 0
    assert ask(world.server, world.prompts[1]).cached == 0


def test_a_start_is_refused_by_name(tmp_path: Path) -> None:
    model = make_shape(tmp_path / "model", "tiny", dtype="bfloat16")
    with pytest.raises(EngineError, match=r"expected store, max_bytes, .*got stor\b"):
        HiCacheServer(model, "layer_first", options(tmp_path / "store", stor="x")).wait()
