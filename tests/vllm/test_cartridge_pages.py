"""Pages as vLLM's own kernels write them, made a cartridge of: the keys and values that went in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WRITE_AND_READ = """
import torch
import vllm._custom_ops as ops
from kvist.cartridge.snapshots import from_repository
from kvist.engines.vllm.pages import pages_of
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository
from kvist.store import MemoryStore

def is_same(isa, size, name, tokens):
    dtype = getattr(torch, name)
    layers, heads, dim, blocks = 2, 3, 32, 9
    dtypes = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
    layout = Layout(page_size_tokens=size, n_layers=layers, n_heads=heads, head_dim=dim, dtype=dtypes[name],
                    model="m", memory_order=f"vllm-cpu-{isa}")
    caches = [torch.zeros(blocks, heads, size, 2 * dim, dtype=dtype) for _ in range(layers)]
    k, v = torch.randn(2, layers, tokens, heads, dim).to(dtype)
    table = torch.randperm(blocks)[: -(-tokens // size)]
    slots = table[torch.arange(tokens) // size] * size + torch.arange(tokens) % size
    for cache, key, value in zip(caches, k, v):
        parts = cache.view(blocks, heads, 2 * size, dim).chunk(2, dim=2)  # as its backend does
        ops.cpu_attn_reshape_and_cache(key, value, *parts, slots, isa)
    pages = pages_of(layout, caches, blocks)
    rows = torch.zeros(len(table), pages.page_bytes, dtype=torch.uint8)
    pages.read(table.tolist(), rows, list(range(len(table)))).wait()
    with Repository.init(MemoryStore()) as repo:
        entries = []
        for number, row in enumerate(rows):
            data = memoryview(row.numpy())
            put = repo.put_pages([data[: layout.page_bytes], data[layout.page_bytes :]])
            entries.append(PageEntry(number, *put.digests))
        seq = LogicalSeq("doc", tuple(range(len(entries))), tokens % size)
        made = from_repository(repo, repo.commit([Manifest(layout, tuple(entries), (seq,))]).cid)
    return all(torch.equal(a, b) for n in range(layers) for a, b in zip(made.layer(n), (k[n], v[n])))

emit([[*case, is_same(*case)] for case in arguments])
"""


def test_what_the_kernels_write_is_read(run_offline: Callable[..., Any]) -> None:
    cases = [
        [isa, size, dtype, 2 * size + 5]
        for isa, size in (("vec", 32), ("vec", 64), ("vec16", 16), ("vec16", 48))
        for dtype in ("bfloat16", "float16", "float32")
    ]
    assert run_offline(WRITE_AND_READ, *cases) == [[*case, True] for case in cases]
