"""Memory orders: which axis of one half of a page comes after which. Pure; the one table of what can be read.

A memory order that is not here is its engine's own: pages in it are captured and restored whole, and nobody else can
take a token out of them.
"""

from __future__ import annotations

from typing import Final

from kvist.errors import UnsupportedModel
from kvist.layout import Layout

AXES: Final = {
    "LNHD": ("LNHD", "LNHD"),
    "LHND": ("LHND", "LHND"),
    "vllm-cpu-vec": ("LHDN", "LHND"),
    "vllm-cpu-vec16": ("LHDN", "LHND"),
}
"""Axes of the two halves of a page, K and V, outermost first, by memory order: layers, tokens (N), KV heads, head
dimension. vLLM's CPU kernels keep K transposed (as of 0.32)."""


def axes_of(layout: Layout, of: str) -> tuple[str, str]:
    """Axes of the halves, K and V, of a layout's pages.

    Args:
        layout: whose memory order is looked up.
        of: what holds the pages, for the message.

    Raises:
        UnsupportedModel: only their engine can read pages in this order.
    """
    found = AXES.get(layout.memory_order)
    if found is None:
        raise UnsupportedModel(
            f"{of} holds pages in the order {layout.memory_order}, which only their engine can read; "
            f"expected one of {', '.join(AXES)}"
        )
    return found


def shape_of(layout: Layout, axes: str) -> tuple[int, ...]:
    """Sizes of the axes of one half."""
    sizes = {"L": layout.n_layers, "N": layout.page_size_tokens, "H": layout.n_heads, "D": layout.head_dim}
    return tuple(sizes[axis] for axis in axes)
