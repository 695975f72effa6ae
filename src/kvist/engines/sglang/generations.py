"""How often each page of SGLang's pool was handed out: while that stays, so do the bytes of its filled tokens.

Knows SGLang's allocators of single slots and of pages (0.5.23). Must not know who holds a page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Generations:
    """Counts on the pool's device, so that nobody waits for it."""

    def __init__(self, allocator: Any, pages: int) -> None:
        """Watch an allocator from now on.

        Args:
            allocator: SGLang's.
            pages: of its pool, the one that nobody gets (number 0) included.
        """
        self._size = allocator.page_size
        self._counts = torch.zeros(pages, dtype=torch.int64, device=allocator.device)
        for name in ("alloc", "alloc_extend", "alloc_decode"):
            if hasattr(allocator, name):
                setattr(allocator, name, self._counted(getattr(allocator, name)))
        clear = allocator.clear

        def cleared() -> None:
            clear()
            self._counts += 1

        allocator.clear = cleared

    def _counted(self, hand_out: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            slots = hand_out(*args, **kwargs)
            if slots is not None and len(slots):
                # a page that is handed out is filled from its first slot on
                self._counts.index_add_(0, slots // self._size, (slots % self._size == 0).to(torch.int64))
            return slots

        return counted

    def of(self, pages: torch.Tensor) -> torch.Tensor:
        """The counts of some pages, as they are now: a copy."""
        return self._counts[pages]
