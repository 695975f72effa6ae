"""A layer's cache as vLLM registers it, seen as halves of pages. Knows vLLM's tensors; must not know requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvist.engines.paged.pages import GroupPages
from kvist.errors import UnsupportedModel
from kvist.layout import Layout


def pages_of(layout: Layout, caches: Sequence[torch.Tensor], blocks: int) -> GroupPages:
    """The pages of one KV cache group; see `halves`.

    Args:
        layout: of the group.
        caches: of its layers.
        blocks: how many the scheduler counts.

    Raises:
        UnsupportedModel: a cache has another shape.
    """
    return GroupPages(layout, [[halves(cache, layout, blocks)] for cache in caches], blocks)


def halves(cache: torch.Tensor, layout: Layout, blocks: int) -> torch.Tensor:
    """A layer's cache as ``[blocks, 2, heads, tokens * head_dim or tokens, head_dim]``, a view: K and V apart.

    Args:
        cache: as vLLM registers it: ``[blocks, heads, tokens, width]``, or ``[blocks, tokens, width]`` for MLA.
        layout: of its group.
        blocks: how many the scheduler counts.

    Raises:
        UnsupportedModel: any other shape.
    """
    view = cache.unsqueeze(1) if cache.dim() == 3 else cache
    tokens, heads, dim = layout.page_size_tokens, layout.n_heads, layout.head_dim
    if view.dim() != 4 or tuple(view.shape) != (blocks, heads, tokens, 2 * dim):
        raise UnsupportedModel(
            f"a layer's cache has shape {tuple(cache.shape)}, expected {(blocks, heads, tokens, 2 * dim)}"
        )
    if layout.memory_order.startswith("vllm-cpu"):  # all of K, transposed, then all of V, head by head
        return view.view(blocks, heads, 2, tokens * dim).transpose(1, 2)
    return view.view(blocks, heads, tokens, 2, dim).permute(0, 3, 1, 2, 4)
