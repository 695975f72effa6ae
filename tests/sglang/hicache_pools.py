"""Host pools and configurations as SGLang makes them: its own where it is installed, else what is seen of them.

So the same tests say both that the backend does what it promises and that the stand-ins are like the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from hicache_real import HAS_SGLANG, load
from torch import Tensor

from kvist.engines.sglang.hicache import KvistHiCache

Open = Callable[..., KvistHiCache]
"""Opens a backend: see hicache_fixtures.py."""
LAYERS, HEADS, DIM, LATENT = 3, 2, 4, 10
PAGES = 24
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")

if HAS_SGLANG:
    HiCacheStorageConfig = load("mem_cache.hicache_storage").HiCacheStorageConfig
    device_pools = load("mem_cache.memory_pool")
    MHATokenToKVPoolHost = load("mem_cache.pool_host.mha").MHATokenToKVPoolHost
    MLATokenToKVPoolHost = load("mem_cache.pool_host.mla").MLATokenToKVPoolHost
else:
    HiCacheStorageConfig = SimpleNamespace

    class _Pool:
        dcp_size = 1

        def __init__(self, shape: tuple[int, ...], layout: str, page_size: int, dtype: torch.dtype) -> None:
            self.layout, self.page_size, self.dtype = layout, page_size, dtype
            self.layer_num = self.target_layer_num = LAYERS
            self.start_layer, self.end_layer = 0, LAYERS
            self.page_num, self.size = PAGES, PAGES * page_size
            self.kv_buffer = torch.zeros(shape, dtype=dtype)

        def get_dummy_flat_data_page(self) -> Tensor:
            return torch.zeros_like(self.get_data_page(0))

    class MHATokenToKVPoolHost(_Pool):
        head_num, head_dim = HEADS, DIM

        def __init__(self, layout: str, page_size: int, dtype: torch.dtype) -> None:
            shape = {
                "layer_first": (2, LAYERS, PAGES * page_size, HEADS, DIM),
                "page_first": (2, PAGES * page_size, LAYERS, HEADS, DIM),
                "page_first_direct": (2, PAGES, LAYERS, page_size, HEADS, DIM),
                "page_head": (2, PAGES, HEADS, page_size, LAYERS, DIM),
            }.get(layout, (1,))
            super().__init__(shape, layout, page_size, dtype)

        def get_data_page(self, index: int, flat: bool = True) -> Tensor:
            tokens, page = slice(index, index + self.page_size), index // self.page_size
            if self.layout == "layer_first":
                found = self.kv_buffer[:, :, tokens]
            elif self.layout == "page_first":
                found = self.kv_buffer[:, tokens]
            else:
                found = self.kv_buffer[:, page : page + 1]
            return found.flatten() if flat else found

    class MLATokenToKVPoolHost(_Pool):
        kv_cache_dim = LATENT

        def __init__(self, layout: str, page_size: int, dtype: torch.dtype) -> None:
            shape = {
                "layer_first": (LAYERS, PAGES * page_size, 1, LATENT),
                "page_first": (PAGES * page_size, LAYERS, 1, LATENT),
                "page_first_direct": (PAGES, LAYERS, page_size, 1, LATENT),
            }[layout]
            super().__init__(shape, layout, page_size, dtype)

        def get_data_page(self, index: int, flat: bool = True) -> Tensor:
            tokens, page = slice(index, index + self.page_size), index // self.page_size
            if self.layout == "layer_first":
                found = self.kv_buffer[:, tokens]
            else:
                found = self.kv_buffer[tokens] if self.layout == "page_first" else self.kv_buffer[page : page + 1]
            return found.flatten() if flat else found


def mha(layout: str = "layer_first", page_size: int = 4, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A host pool of K and V."""
    if not HAS_SGLANG:
        return MHATokenToKVPoolHost(layout, page_size, dtype)
    device = device_pools.MHATokenToKVPool(PAGES * page_size, page_size, dtype, HEADS, DIM, LAYERS, "cpu", False)
    return MHATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        page_size,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=device.start_layer,
        end_layer=device.end_layer,
        host_token_capacity=PAGES * page_size,
    )


def mla(layout: str = "layer_first", page_size: int = 4, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A host pool of latent vectors."""
    if not HAS_SGLANG:
        return MLATokenToKVPoolHost(layout, page_size, dtype)
    device = device_pools.MLATokenToKVPool(PAGES * page_size, page_size, dtype, LATENT - 2, 2, LAYERS, "cpu", False)
    return MLATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        page_size,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=device.start_layer,
        end_layer=device.end_layer,
        target_layer_num=LAYERS,
        host_token_capacity=PAGES * page_size,
    )


def config(url: str, *, is_mla: bool = False, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """What SGLang tells a backend; ``extra`` are its options."""
    given = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": is_mla,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "org/model",
        "tp_lcm_size": None,
        "should_split_heads": False,
        "dcp_size": 1,
        "dcp_rank": 0,
        "extra_config": {
            "backend_name": "kvist",
            "module_path": "kvist.engines.sglang.hicache",
            "class_name": "KvistHiCache",
            "interface_v1": 1,
            "store": url,
            "revision": "r1",
            "refresh_s": 0,
        }
        | (extra or {}),
    }
    return HiCacheStorageConfig(**given | fields)


def backend(url: str, pool: Any, **how: Any) -> KvistHiCache:
    """The backend over ``pool``, made as SGLang makes it."""
    made = KvistHiCache(config(url, is_mla=hasattr(pool, "kv_cache_dim"), **how), {})
    try:
        made.register_mem_pool_host(pool)
        made.register_mem_host_pool_v2(pool, "kv")
    except BaseException:
        made.close()
        raise
    return made


def fill(pool: Any, page: int, seed: int) -> Tensor:
    """Write a page's content into the pool; returns it, as `read` gives it."""
    view = pool.get_data_page(page * pool.page_size, flat=False)
    view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(seed)).to(pool.dtype))
    return read(pool, page)


def read(pool: Any, page: int) -> Tensor:
    """A copy of a page of the pool, flat."""
    return pool.get_data_page(page * pool.page_size, flat=True).clone()


def slots(pool: Any, *pages: int) -> Tensor:
    """The slots of all tokens of these pages."""
    return torch.cat([torch.arange(page * pool.page_size, (page + 1) * pool.page_size) for page in pages])


def canonical(pool: Any, page: int) -> Tensor:
    """A page token by token, layer by layer, whatever the pool's order: ``[tokens, layers, values]``."""
    flat, size = read(pool, page), pool.page_size
    if hasattr(pool, "kv_cache_dim"):
        if pool.layout == "page_first":
            return flat.view(size, LAYERS, LATENT)
        return flat.view(LAYERS, size, LATENT).transpose(0, 1)
    axes = {"layer_first": "LNHD", "page_first": "NLHD", "page_first_direct": "LNHD", "page_head": "HNLD"}[pool.layout]
    sizes = {"L": LAYERS, "N": size, "H": HEADS, "D": DIM}
    halves = flat.view(2, *(sizes[axis] for axis in axes))
    return torch.cat([half.permute([axes.index(a) for a in "NLHD"]).reshape(size, LAYERS, -1) for half in halves], -1)
