"""What the plugin sees of LMCache, without LMCache: keys, chunks, an allocator, a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvist.engines.lmcache import KvistStorage
from kvist.layout import Layout

CHUNK, LAYERS, HEADS, DIM = 4, 3, 2, 4
LAYOUT = Layout(page_size_tokens=4, n_layers=2, n_heads=1, head_dim=2, dtype="bf16", model="m")


@dataclass(frozen=True)
class Key:
    """``lmcache.utils.CacheEngineKey``."""

    chunk_hash: int | bytes = 7
    tags: tuple[tuple[str, Any], ...] | None = None
    model_name: str = "org/model"
    world_size: int = 1
    worker_id: int = 0
    dtype: Any = torch.bfloat16


@dataclass(frozen=True)
class LayerKey(Key):
    """``lmcache.utils.LayerCacheEngineKey``."""

    layer_id: int = 0


@dataclass
class Chunk:
    """``lmcache.v1.memory_management.MemoryObj``."""

    tensor: Tensor
    refs: int = 1

    def get_shapes(self) -> list[torch.Size]:
        return [self.tensor.shape]

    def get_shape(self) -> torch.Size:
        return self.tensor.shape

    def get_dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def ref_count_down(self) -> None:
        self.refs -= 1


@dataclass
class Memory:
    """``LocalCPUBackend``: so many chunks at once."""

    room: int = 1000
    given: list[Chunk] = field(default_factory=list)

    def allocate(self, shape: Any, dtype: torch.dtype, fmt: Any = None, busy_loop: bool = True) -> Chunk | None:
        if sum(chunk.refs > 0 for chunk in self.given) >= self.room:
            return None
        self.given.append(Chunk(torch.full(tuple(shape), 9.0, dtype=dtype)))
        return self.given[-1]


def plugin(url: str, memory: Memory | None = None, **options: Any) -> KvistStorage:
    """The plugin, made as LMCache makes it."""
    config = SimpleNamespace(
        storage_plugins=["other", "mine"],
        extra_config={
            "storage_plugin.mine.module_path": "kvist.engines.lmcache",
            "storage_plugin.mine.class_name": "KvistStorage",
            "storage_plugin.other.module_path": "lmcache.v1.storage_backend.plugins.dax_backend",
            "storage_plugin.mine.store": url,
            **{f"storage_plugin.mine.{name}": value for name, value in options.items()},
        },
        chunk_size=CHUNK,
        use_layerwise=False,
        enable_blending=False,
        pre_caching_hash_algorithm="builtin",
        pin_timeout_sec=300,
    )
    metadata = SimpleNamespace(
        model_name="org/model",
        world_size=1,
        worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, CHUNK, HEADS, DIM),
        use_mla=False,
    )
    return KvistStorage(config=config, dst_device="cpu", metadata=metadata, local_cpu_backend=memory, loop=None)


def chunk_of(seed: int, tokens: int = CHUNK) -> Chunk:
    """A chunk with numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    return Chunk(torch.randn(2, LAYERS, tokens, HEADS * DIM, generator=generator).to(torch.bfloat16))
