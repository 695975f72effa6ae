"""How a page lies in a host pool of HiCache, and which kvist page it is. Knows torch and the shapes of SGLang 0.5.23.

===========================  ========================  ====================================
``--hicache-mem-layout``     page of an MHA pool       page of an MLA pool
===========================  ========================  ====================================
``layer_first``              ``[2, L, N, H, D]``       ``[L, N, 1, W]``
``page_first``               ``[2, N, L, H, D]``       ``[N, L, 1, W]``
``page_first_direct``        ``[2, L, N, H, D]``       ``[L, N, 1, W]``
``page_head``                ``[2, H, N, L, D]``
===========================  ========================  ====================================

L layers, N tokens, H KV heads of this rank, D the head dimension, W the width of a latent vector. A kvist page has its
halves in the order LNHD, so pages of one model can be read into any of these; those of an MLA pool are the halves of W.
Where the halves lie like that in the pool they are read and written in place, elsewhere through a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self, cast

import torch
from torch import Tensor

from kvist.errors import InvalidInput, LayoutMismatch, UnsupportedModel
from kvist.layout import Layout

_DTYPES: Final = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "fp8e4m3",
}
_POOLS: Final = {"MHATokenToKVPoolHost": "full", "MLATokenToKVPoolHost": "mla"}
"""Classes of pools whose pages are known, and their attention. Not those derived of them: these hold more, or less."""
_ORDERS: Final = {
    ("layer_first", "full"): "LNHD",
    ("page_first", "full"): "NLHD",
    ("page_first_direct", "full"): "LNHD",
    ("page_head", "full"): "HNLD",
    ("layer_first", "mla"): "LNHD",
    ("page_first", "mla"): "NLHD",
    ("page_first_direct", "mla"): "LNHD",
}


@dataclass(frozen=True, slots=True)
class HostPages:
    """The pages of one host pool.

    Attributes:
        layout: of the kvist pages.
        pool: SGLang's.
        order: of the axes of a page in the pool.
    """

    layout: Layout
    pool: Any
    order: str

    @classmethod
    def of(
        cls,
        pool: Any,
        *,
        model: str | None,
        revision: str,
        tp_rank: int,
        tp_size: int,
        kv_cache_dtype: str | None = None,
    ) -> Self:
        """The pages of SGLang's ``pool``.

        Args:
            pool: of the KV itself.
            model: SGLang's name of the model.
            revision: what pins its KV.
            tp_rank, tp_size: whose pages they are.
            kv_cache_dtype: what the bytes of a pool of ``uint8`` are, in SGLang's words.

        Raises:
            UnsupportedModel: a pool that cannot be paged, by name.
        """
        attention = _POOLS.get(type(pool).__name__)
        if attention is None:
            raise UnsupportedModel(
                f"a host pool {type(pool).__name__} cannot be stored: expected {' or '.join(_POOLS)}"
            )
        order = _ORDERS.get((pool.layout, attention))
        if order is None:
            names = ", ".join(name for name, kind in _ORDERS if kind == attention)
            raise UnsupportedModel(
                f"--hicache-mem-layout {pool.layout} of a {type(pool).__name__} cannot be stored: expected {names}"
            )
        if pool.layer_num != pool.target_layer_num:
            raise UnsupportedModel(
                f"{pool.layer_num - pool.target_layer_num} layers of a draft model in a host pool cannot be stored: "
                "nothing pins that model"
            )
        if pool.kv_buffer is None:  # of a rank that takes latent vectors from another one's host memory
            raise UnsupportedModel("a host pool without memory of its own cannot be stored")
        if pool.dcp_size != 1:
            raise UnsupportedModel(f"pages shared by dcp_size {pool.dcp_size} cannot be stored: expected 1")
        width = pool.kv_cache_dim if attention == "mla" else 2 * pool.head_dim
        if width % 2:
            raise UnsupportedModel(f"latent vectors of {width} elements cannot be halved")
        layout = Layout(
            page_size_tokens=pool.page_size,
            n_layers=pool.layer_num,
            n_heads=1 if attention == "mla" else pool.head_num,
            head_dim=width // 2,
            dtype=_dtype(pool.dtype, kv_cache_dtype),
            model=model,
            revision=revision,
            tp_rank=tp_rank,
            tp_size=tp_size,
            attention=attention,
        )
        return cls(layout, pool, order)

    def at(self, index: int) -> Tensor:
        """The page whose first slot in the pool is ``index``: its memory, not a copy.

        Raises:
            InvalidInput: there is no such page.
        """
        if index % self.pool.page_size or not 0 <= index < self.pool.size:
            raise InvalidInput(
                f"expected the first slot of a page of {self.pool.page_size} in a host pool of {self.pool.size}, "
                f"got {index}"
            )
        return cast(Tensor, self.pool.get_data_page(index, flat=False))

    def halves(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the K and V half of a page in the pool's order, each ``[layers, tokens, heads, dim]``.

        Args:
            page: of `at`, or memory of its size in that order.

        Raises:
            LayoutMismatch: no such page.
        """
        layout, pool = self.layout, self.pool
        is_mla = layout.attention == "mla"
        sizes = {"L": layout.n_layers, "N": layout.page_size_tokens, "H": layout.n_heads, "D": layout.head_dim}
        if is_mla:
            sizes["D"] *= 2
        shape = [*(() if is_mla else (2,)), *(sizes[axis] for axis in self.order)]
        expected = 2 * layout.page_bytes // pool.dtype.itemsize
        if page.dtype != pool.dtype or page.numel() != expected or page.device.type != "cpu":
            raise LayoutMismatch(
                f"expected a page of {expected} elements {pool.dtype} in host memory, "
                f"got {page.numel()} {page.dtype} on {page.device}"
            )
        whole = page.view(shape)
        axes = [self.order.index(axis) for axis in "LNHD"]
        if is_mla:
            latent = whole.permute(axes)
            return latent[..., : layout.head_dim], latent[..., layout.head_dim :]
        return whole[0].permute(axes), whole[1].permute(axes)


def views(halves: tuple[Tensor, Tensor]) -> tuple[memoryview, memoryview]:
    """The bytes of two contiguous halves; they keep them alive."""
    return _view(halves[0]), _view(halves[1])


def _view(half: Tensor) -> memoryview:
    array: Any = half.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _dtype(dtype: torch.dtype, kv_cache_dtype: str | None) -> str:
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype == torch.uint8 and kv_cache_dtype == "fp8_e4m3":
        return "fp8e4m3"
    named = f"{dtype}, --kv-cache-dtype {kv_cache_dtype}" if dtype == torch.uint8 else str(dtype)
    raise UnsupportedModel(
        f"a KV cache of {named} cannot be stored: expected {', '.join(map(str, _DTYPES))}, or fp8_e4m3 kept as uint8"
    )
