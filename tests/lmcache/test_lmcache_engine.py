"""The plugin under the engine of a real LMCache: what is stored comes back bit for bit, or not at all."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.repo.repository import Repository

pytestmark = pytest.mark.lmcache
Start = Callable[..., Any]

TOKENS = list(range(100, 137))  # four full chunks of 8, and 5


def test_lmcache_loads_it_beside_its_own_memory(engine: Start) -> None:
    found = engine()
    assert found.engine.storage_manager.list_backends() == {
        "LocalCPUBackend": "LocalCPUBackend",
        "kvist": "KvistStorage",
    }


def test_what_was_stored_is_found_by_a_later_process(engine: Start) -> None:
    first = engine()
    kv = first.compute(TOKENS)
    first.stop()
    second = engine()
    assert second.engine.lookup(TOKENS) == 32
    tokens, got = second.load(TOKENS)
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])


def test_what_was_stored_survives_kill_9(engine: Start, url: str) -> None:
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import real_lmcache\n"
        f"made = real_lmcache.start({url!r}); made.compute({TOKENS!r})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    found = engine()
    kv = found.memory.fill(TOKENS)  # the same function of the same tokens
    tokens, got = found.load(TOKENS)
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])


def test_only_the_common_prefix_is_found(engine: Start) -> None:
    found = engine()
    kv = found.compute(TOKENS)
    other = [*TOKENS[:20], 7, *TOKENS[21:]]
    assert found.engine.lookup(other) == 16
    tokens, got = found.load(other)
    assert tokens == 16
    assert torch.equal(got[:, :, :16], kv[:, :, :16])
    assert not got[:, :, 16:].any()


def test_chunks_that_are_not_full_keep_their_length(engine: Start) -> None:
    found = engine(save_unfull_chunk=True)
    kv = found.compute(TOKENS)
    assert found.engine.lookup(TOKENS) == 37
    tokens, got = found.load(TOKENS)
    assert tokens == 37
    assert torch.equal(got, kv)


def test_chunks_of_a_layer(engine: Start) -> None:
    first = engine(use_layerwise=True)
    kv = first.compute(TOKENS)
    first.stop()
    second = engine(use_layerwise=True)
    assert second.engine.lookup(TOKENS) == 32
    tokens, got = second.load(TOKENS)
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])


def test_equal_content_is_stored_once(engine: Start, url: str) -> None:
    found = engine()
    kv = found.memory.fill(TOKENS[:8])
    found.engine.store(TOKENS[:8])
    found.memory.kv = kv  # the same bytes for other tokens
    found.engine.store(TOKENS[8:16])
    found.backend.chunks.flush()
    assert found.engine.lookup(TOKENS[:8]) == found.engine.lookup(TOKENS[8:16]) == 8
    assert found.backend.chunks.metrics.bytes_stored == kv.nbytes


def test_a_damaged_page_is_a_miss_and_is_healed_by_the_next_store(engine: Start, url: str, tmp_path: Path) -> None:
    first = engine()
    kv = first.compute(TOKENS)
    first.stop()
    segment = max((tmp_path / "store").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    data = bytearray(segment.read_bytes())
    place = data.find(kv[1, :, 8:16].contiguous().view(torch.uint8).numpy().tobytes())
    assert place >= 0
    data[place + 5] ^= 1
    segment.chmod(0o600)
    segment.write_bytes(data)
    second = engine()
    tokens, got = second.load(TOKENS)
    assert tokens == 8
    assert torch.equal(got[:, :, :8], kv[:, :, :8])
    assert not got[:, :, 8:].any()
    assert second.backend.chunks.metrics.damaged == 1
    second.backend.chunks.flush()
    assert second.engine.lookup(TOKENS) == 8
    second.compute(TOKENS)
    tokens, got = second.load(TOKENS)
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])


def test_damage_fails_a_layerwise_retrieval_rather_than_answer_wrongly(engine: Start) -> None:
    from kvist.errors import DamagedPage

    found = engine(use_layerwise=True)
    found.compute(TOKENS)
    for key in found.keys(TOKENS[:16])[1].split_layers(3)[1:2]:
        assert found.backend.remove(key)
    with pytest.raises(DamagedPage, match="expected 4 chunks of a layer"):
        found.load(TOKENS)
    assert found.engine.storage_manager.allocator_backend.memory_allocator.memcheck()


def test_the_bound_holds_and_pinned_chunks_stay(engine: Start) -> None:
    chunk = 2 * 3 * 8 * 2 * 4 * 2
    found = engine(options={"max_bytes": 6 * chunk})
    pinned = TOKENS[:16]
    kv = found.compute(pinned)
    assert found.engine.lookup(pinned, lookup_id="a", pin=True) == 16
    for start in range(1000, 2000, 100):
        found.compute(list(range(start, start + 24)))
        assert found.backend.chunks.nbytes <= 6 * chunk
    assert found.backend.chunks.metrics.evicted >= 20
    tokens, got = found.load(pinned)
    assert tokens == 16
    assert torch.equal(got, kv)
    found.engine.lookup_unpin("a")
    for start in range(2000, 3000, 100):
        found.compute(list(range(start, start + 24)))
    assert found.engine.lookup(pinned) == 0


def test_where_everything_is_pinned_nothing_new_is_taken(engine: Start) -> None:
    chunk = 2 * 3 * 8 * 2 * 4 * 2
    found = engine(options={"max_bytes": 4 * chunk})
    kv = found.compute(TOKENS[:32])
    assert found.engine.lookup(TOKENS[:32], lookup_id="a", pin=True) == 32
    found.compute(list(range(24)))
    assert found.engine.lookup(list(range(24))) == 0
    assert found.backend.chunks.metrics.dropped == 3
    tokens, got = found.load(TOKENS[:32])
    assert tokens == 32
    assert torch.equal(got, kv)


def test_clear_of_some_tokens_and_of_all(engine: Start) -> None:
    found = engine()
    found.compute(TOKENS)
    other = list(range(40))
    found.compute(other)
    assert found.engine.clear(tokens=TOKENS) == 4
    assert found.engine.lookup(TOKENS) == 0
    assert found.engine.lookup(other) == 40
    found.backend.chunks.flush()
    found.stop()
    again = engine()
    assert again.engine.lookup(TOKENS) == 0
    assert again.engine.lookup(other) == 40
    assert again.engine.clear() == 40
    assert again.engine.lookup(other) == 0


def test_another_servers_chunks_are_found(engine: Start) -> None:
    first, second = engine(), engine()
    kv = first.compute(TOKENS)
    second.engine.lookup(TOKENS)  # a miss, which asks the repository anew
    second.backend.chunks.flush()
    tokens, got = second.load(TOKENS)
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])


def test_other_weights_share_nothing(engine: Start) -> None:
    engine(options={"revision": "one"}).compute(TOKENS)
    assert engine(options={"revision": "two"}).engine.lookup(TOKENS) == 0
    assert engine(options={"revision": "one"}).engine.lookup(TOKENS) == 32


def test_tags_keep_requests_apart(engine: Start) -> None:
    found = engine()
    kv = found.compute(TOKENS, request_configs={"lmcache.tag.tenant": "a"})
    for configs in (None, {"lmcache.tag.tenant": "b"}, {"lmcache.tag.t": "enant%a"}):
        assert found.engine.lookup(TOKENS, request_configs=configs) == 0
    tokens, got = found.load(TOKENS, request_configs={"lmcache.tag.tenant": "a"})
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])


def test_asynchronous_lookups_give_back_their_pins(engine: Start) -> None:
    found = engine(enable_async_loading=True)
    kv = found.compute(TOKENS)
    manager = found.engine.storage_manager
    answers: list[tuple[str, int]] = []
    answered = threading.Event()

    class Server:
        def send_response_to_scheduler(self, lookup_id: str, tokens: int) -> None:
            answers.append((lookup_id, tokens))
            answered.set()

    manager.async_lookup_server = Server()
    found.engine.async_lookup_and_prefetch("r1", tokens=TOKENS, pin=True)
    assert answered.wait(60)
    assert answers == [("r1", 32)]
    tokens, got = found.load(TOKENS, req_id="r1")
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])
    assert not found.backend.chunks.pins.held()


def test_asynchronous_gets_stop_at_the_first_miss(engine: Start) -> None:
    found = engine()
    found.compute(TOKENS)
    keys = found.keys(TOKENS[:32])
    found.backend.remove(keys[2])
    got = asyncio.run_coroutine_threadsafe(
        found.backend.batched_get_non_blocking("x", keys), found.engine.storage_manager.loop
    ).result()
    assert len(got) == 2
    for chunk in got:
        chunk.ref_count_down()
    assert found.engine.storage_manager.allocator_backend.memory_allocator.memcheck()


def test_memory_of_chunks_comes_back(engine: Start) -> None:
    found = engine()
    kv = found.compute(TOKENS)
    allocator = found.engine.storage_manager.allocator_backend.memory_allocator
    for _ in range(200):  # of 10 MB, which would be full after some thousand chunks; a leak would grow
        found.load(TOKENS)
    assert allocator.memcheck()
    held = getattr(allocator, "num_active_allocations", None)
    if held is None:
        held = allocator.pin_allocator.num_active_allocations
    assert held == 0
    assert torch.equal(found.memory.kv[:, :, :32], kv[:, :, :32])


def test_closing_keeps_what_was_put_a_moment_ago(engine: Start) -> None:
    first = engine()
    kv = first.memory.fill(TOKENS)
    first.engine.store(TOKENS)  # LMCache frees the memory of its chunks before it closes the plugin
    first.stop()
    second = engine()
    tokens, got = second.load(TOKENS)
    assert tokens == 32
    assert torch.equal(got[:, :, :32], kv[:, :, :32])


def test_a_store_that_fails_is_a_miss(engine: Start, tmp_path: Path, url: str) -> None:
    found = engine()
    found.compute(TOKENS)
    (tmp_path / "store").rename(tmp_path / "away")
    tokens, _ = found.load(TOKENS)
    assert tokens == 0
    found.compute(list(range(8)))
    assert found.backend.chunks.metrics.dropped == 1
    (tmp_path / "away").rename(tmp_path / "store")
    assert found.load(list(range(8)))[0] == 0
    found.compute(list(range(8)))
    assert found.load(list(range(8)))[0] == 8


def test_completion_is_told_once_a_chunk_is_durable(engine: Start, url: str) -> None:
    found = engine()
    found.memory.fill(TOKENS[:16])
    keys = found.keys(TOKENS[:16])
    manager = found.engine.storage_manager
    told: list[Any] = []
    chunks = [manager.allocate(found.memory.get_shape(8), torch.bfloat16) for _ in keys]
    for index, chunk in enumerate(chunks):
        found.memory.from_gpu(chunk, 8 * index, 8 * index + 8)
    futures = found.backend.batched_submit_put_task(keys, chunks, on_complete_callback=told.append)
    assert sum(future.result() for future in futures) == 2
    assert told == keys
    assert found.backend.batched_submit_put_task(keys, chunks, on_complete_callback=told.append)[0].result() == 0
    assert told == keys
    assert [found.backend.exists_in_put_tasks(key) for key in keys] == [False, False]
    for chunk in chunks:
        chunk.ref_count_down()
    with Repository.open(url) as repo:
        assert len(repo.log()) == 1


def test_what_is_no_chunk_of_the_model_is_not_stored(engine: Start) -> None:
    found = engine()
    (key,) = found.keys(TOKENS[:8])
    manager = found.engine.storage_manager
    for shape, dtype in (
        (torch.Size([2, 3, 8, 9]), torch.bfloat16),
        (torch.Size([2, 2, 8, 8]), torch.bfloat16),
        (torch.Size([2, 3, 8, 8]), torch.float16),
        ([torch.Size([2, 3, 8, 8])] * 2, [torch.bfloat16] * 2),
    ):
        chunk = manager.allocate(shape, dtype)
        assert found.backend.batched_submit_put_task([key], [chunk]) is None
        chunk.ref_count_down()
    assert not found.backend.contains(key)


@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo"])
def test_many_threads_against_one_small_backend(engine: Start, policy: str) -> None:
    chunk = 2 * 3 * 8 * 2 * 4 * 2
    found = engine(options={"max_bytes": 12 * chunk, "policy": policy})
    manager, backend, memory = found.engine.storage_manager, found.backend, found.memory
    prompts = [list(range(1000 * i, 1000 * i + 16)) for i in range(12)]
    wanted = [memory.fill(prompt) for prompt in prompts]
    keys = [found.keys(prompt) for prompt in prompts]
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            which = draw.randrange(len(prompts))
            kv = wanted[which]
            act = draw.choice(["put", "get", "get", "remove", "pin"])
            if act == "put":
                held = [manager.allocate(memory.get_shape(8), torch.bfloat16) for _ in keys[which]]
                for index, each in enumerate(held):
                    each.tensor.copy_(kv[:, :, 8 * index : 8 * index + 8])
                backend.batched_submit_put_task(keys[which], held)
                for each in held:
                    each.tensor.zero_()  # ours again
                    each.ref_count_down()
            elif act == "get":
                for index, each in enumerate(backend.batched_get_blocking(keys[which])):
                    if each is not None:
                        if not torch.equal(each.tensor, kv[:, :, 8 * index : 8 * index + 8]):
                            wrong.append(f"prompt {which} chunk {index}")
                        each.ref_count_down()
            elif act == "remove":
                backend.remove(keys[which][1], force=draw.random() < 0.5)
            elif backend.contains(keys[which][0], pin=True):
                backend.unpin(keys[which][0])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.chunks.flush()
    assert not wrong
    assert backend.chunks.nbytes <= 12 * chunk
    assert backend.chunks.metrics.read > 0
    assert not backend.chunks.pins.held()
