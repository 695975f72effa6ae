"""The `transformers.Cache` that writes one tile into the pool and gathers the context from it.

Knows the pool's tensor and the table of the tile in hand. Must not know sequences, scheduling or sampling.

Written against transformers 5.23, the only version it was run with: a model asks ``get_query_offset`` and
``get_mask_sizes`` to build its masks (full, sliding and chunked alike), then each attention layer calls ``update``
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class PagedCache(Cache):  # type: ignore[misc]
    """One tile's view of the pool. Reused for every tile; `aim` it before each forward pass."""

    def __init__(self, data: Tensor) -> None:
        """``data`` is the pool, ``[slots, 2, layers, tokens, heads, head_dim]``, contiguous; it is not copied."""
        self.data = data
        self.page = 0
        self.rows = slice(0, 0)
        self.slot = 0
        self.halves = torch.empty(0, dtype=torch.long)
        super().__init__(layers=[_PagedLayer(self, n) for n in range(data.shape[2])])

    def aim(self, slots: Sequence[int], rows: slice) -> None:
        """Point at the last page of ``slots``, of which ``rows`` are to be computed.

        Args:
            slots: the sequence's slots in token order, up to and including the page in hand.
            rows: rows of that page whose keys and values are stored; the tile's other rows are dropped.
        """
        layers = self.data.shape[2]
        table = torch.tensor(slots, dtype=torch.long, device=self.data.device) * (2 * layers)
        self.page, self.rows, self.slot = len(slots) - 1, rows, slots[-1]
        self.halves = torch.cat((table, table + layers))


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of `PagedCache`. Sliding-window layers keep all their keys too: the mask leaves out the far ones."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self.cache, self.index, self.is_initialized = cache, index, True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the aimed rows, then return all of the context as the pool holds it.

        Args:
            keys: ``[1, heads, tokens a page, head_dim]``, as ``values``.

        Returns:
            keys and values, each ``[1, heads, (page + 1) * tokens a page, head_dim]``. Rows that were not computed
            are zeros; the causal mask hides them.
        """
        cache, data = self.cache, self.cache.data
        half = data[cache.slot, :, self.index, cache.rows]
        half[0] = keys[0, :, cache.rows].transpose(0, 1)
        half[1] = values[0, :, cache.rows].transpose(0, 1)
        size, heads, width = data.shape[3:]
        # Rows of one (slot, half, layer) are contiguous, so this gather is a run of plain copies.
        context = data.view(-1, size * heads * width).index_select(0, cache.halves + self.index)
        both = context.view(2, 1, (cache.page + 1) * size, heads, width).transpose(2, 3)
        return both[0], both[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `update` returns, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the tile."""
        return self.cache.page * int(self.cache.data.shape[3])

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pool is there from the start."""
