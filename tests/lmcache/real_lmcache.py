"""A real LMCache engine on a CPU, and the paged memory of a model that it serves. Imports LMCache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmcache.utils import mock_up_broadcast_fn, mock_up_broadcast_object_fn
from lmcache.v1.cache_engine import LMCacheEngine, LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface, SGLangLayerwiseGPUConnector
from lmcache.v1.metadata import LMCacheMetadata
from torch import Tensor

from kvist.engines.lmcache import KvistStorage

CHUNK, LAYERS, HEADS, DIM = 8, 3, 2, 4
MODEL = "org/model"
_names = (f"engine-{i}" for i in itertools.count())
_running: list[str] = []


class PagedMemory(GPUConnectorInterface):
    """KV of one sequence, ``[2, layers, tokens, heads * dim]``, and its way from and to LMCache's chunks."""

    def __init__(self, layers: int = LAYERS, width: int = HEADS * DIM) -> None:
        self.layers, self.width = layers, width
        self.kv = torch.zeros(2, layers, 0, width, dtype=torch.bfloat16)

    def fill(self, tokens: Sequence[int]) -> Tensor:
        """Take what a model would compute: a function of all tokens before."""
        generator = torch.Generator()
        rows = []
        for end in range(1, len(tokens) + 1):
            generator.manual_seed(hash(tuple(tokens[:end])) % 2**63)
            rows.append(torch.randn(2, self.layers, self.width, generator=generator))
        self.kv = torch.stack(rows, 2).to(torch.bfloat16)
        return self.kv.clone()

    def forget(self, tokens: int) -> None:
        self.kv = torch.zeros(2, self.layers, tokens, self.width, dtype=torch.bfloat16)

    def from_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
        memory_obj.tensor.copy_(self.kv[:, :, start:end])

    def to_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
        self.kv[:, :, start:end].copy_(memory_obj.tensor)

    def batched_from_gpu(self, memory_objs: Any, starts: list[int], ends: list[int], **_: Any) -> None:
        for chunk, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(chunk, start, end)

    def batched_to_gpu(self, memory_objs: Any, starts: list[int], ends: list[int], **_: Any) -> None:
        for chunk, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(chunk, start, end)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, self.layers, num_tokens, self.width])

    def initialize_kvcaches_ptr(self, **_: Any) -> None:
        pass


class LayerMemory(PagedMemory, SGLangLayerwiseGPUConnector):
    """The same, layer by layer, as LMCache's layerwise connectors: generators that are fed a layer at a time.

    (LMCache insists on its own classes here. Of this one nothing is used: its constructor wants an accelerator.)
    """

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([num_tokens, 2, self.width])

    def batched_from_gpu(self, memory_objs: Any, starts: list[int], ends: list[int], **_: Any) -> Iterator[None]:
        for layer, chunks in enumerate(memory_objs):
            for chunk, start, end in zip(chunks, starts, ends, strict=True):
                chunk.tensor.copy_(self.kv[:, layer, start:end].transpose(0, 1))
            yield
        yield

    def batched_to_gpu(self, starts: list[int], ends: list[int], **_: Any) -> Iterator[None]:
        for layer in range(self.layers):
            chunks = yield
            for chunk, start, end in zip(chunks, starts, ends, strict=False):
                self.kv[:, layer, start:end].copy_(chunk.tensor.transpose(0, 1))
        yield
        yield


@dataclass
class Engine:
    """An engine, its memory, and our backend in it."""

    engine: LMCacheEngine
    memory: PagedMemory
    backend: KvistStorage
    name: str

    def compute(self, tokens: Sequence[int], **request: Any) -> Tensor:
        """Prefill, and let LMCache store it; what was computed, once it is durable."""
        kv = self.memory.fill(tokens)
        if isinstance(self.memory, LayerMemory):
            for _ in self.engine.store_layer(torch.tensor(tokens), req_id="s", **request):
                pass
        else:
            self.engine.store(list(tokens), **request)
        self.backend.chunks.flush()
        return kv

    def load(self, tokens: Sequence[int], **request: Any) -> tuple[int, Tensor]:
        """Retrieve into empty memory: how many tokens, and what is there."""
        self.memory.forget(len(tokens))
        if isinstance(self.memory, LayerMemory):
            mask = list(self.engine.retrieve_layer(torch.tensor(tokens), req_id="r", **request))[-1]
        else:
            mask = self.engine.retrieve(list(tokens), **request)
        return int(mask.sum()), self.memory.kv

    def keys(self, tokens: Sequence[int], **request: Any) -> list[Any]:
        """LMCache's keys of the chunks."""
        return [key for _, _, key in self.engine.token_database.process_tokens(tokens=list(tokens), **request)]

    def stop(self) -> None:
        if self.name in _running:
            _stop(self.name)


def start(url: str, *, options: dict[str, Any] | None = None, memory_gb: float = 0.01, **config: Any) -> Engine:
    """An engine whose only cache beside its memory pool is the plugin."""
    prefix = "storage_plugin.kvist."
    plugin = {"module_path": "kvist.engines.lmcache", "class_name": "KvistStorage", "store": url, "refresh_s": 0.0}
    settings = {"chunk_size": CHUNK, "local_cpu": False, "max_local_cpu_size": memory_gb} | config
    extra = {prefix + name: value for name, value in (plugin | (options or {})).items()}
    conf = LMCacheEngineConfig.from_defaults(storage_plugins=["kvist"], extra_config=extra, **settings)
    metadata = LMCacheMetadata(
        model_name=MODEL,
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, CHUNK, HEADS, DIM),
    )
    memory = LayerMemory() if config.get("use_layerwise") else PagedMemory()
    name = next(_names)
    engine = LMCacheEngineBuilder.get_or_create(
        name, conf, metadata, memory, mock_up_broadcast_fn, mock_up_broadcast_object_fn
    )
    _running.append(name)
    engine.post_init()
    backend = engine.storage_manager.storage_backends["kvist"]
    return Engine(engine, memory, backend, name)


def stop_all() -> None:
    """Stop every engine that still runs."""
    while _running:
        _stop(_running[0])


def _stop(name: str) -> None:
    """Stop an engine. Its storage manager ends the thread of its event loop, and leaves the loop open: whichever test
    ran when that was collected would fail of a warning."""
    manager = LMCacheEngineBuilder.get(name).storage_manager
    _running.remove(name)
    LMCacheEngineBuilder.destroy(name)
    assert not manager.thread.is_alive()
    manager.loop.close()
