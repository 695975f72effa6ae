"""Pages in an engine's cache: out of it into host memory, and back. Knows tensors; must not know requests or stores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

from kvist.layout import Layout

_STAGING: Final = 64 << 20
"""Bytes that a copy to or from an accelerator takes there, at most."""
_WORDS: Final = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""What bytes are copied as: indexed copies on the CPU go element by element, so wide ones are near a plain copy."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One half of a layer's blocks, or both.

    Attributes:
        layer: its number in the group.
        half: 0: K, or both; 1: V.
        cache: ``[blocks, 1 or 2, ...]``.
    """

    layer: int
    half: int
    cache: torch.Tensor

    def of(self, pages: torch.Tensor) -> torch.Tensor:
        """The same part of pages ``[pages, 2, layers, ...]``; a view."""
        return pages[:, self.half : self.half + self.cache.shape[1], self.layer]


class GroupPages:
    """The pages of one KV cache group.

    A page in host memory is its K half and then its V half, each ``[layers, heads, tokens, head_dim]`` in the order
    that the layout's ``memory_order`` names. On an accelerator, copies go through one staging tensor: a gather a layer
    there, and a copy a run of slots between it and the host; `Done` says when they are through.

    Attributes:
        layout: of every page.
    """

    def __init__(self, layout: Layout, layers: Sequence[Sequence[torch.Tensor]], blocks: int) -> None:
        """Take views of the engine's tensors.

        Args:
            layout: of every page.
            layers: by layer, both halves of each block: one tensor ``[blocks, 2, ...]``, or K's and then V's, each
                ``[blocks, 1, ...]``; ``...`` is one half in the order that the layout names.
            blocks: how many the engine counts.
        """
        self.layout = layout
        self._parts = [
            _Part(number, first, half) for number, layer in enumerate(layers) for first, half in enumerate(layer)
        ]
        first = self._parts[0].cache
        self._dtype, self._device = first.dtype, first.device
        self._page = (2, len(layers), *first.shape[2:])
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._most = blocks if self._stream is None else max(1, _STAGING // self.page_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of both halves."""
        return 2 * self.layout.page_bytes

    @property
    def on_device(self) -> bool:
        """Whether the cache is on an accelerator, where host memory should be page-locked."""
        return self._device.type != "cpu"

    def read(self, blocks: Sequence[int], rows: torch.Tensor, slots: Sequence[int]) -> Done:
        """Copy the pages of ``blocks`` into ``slots`` of ``rows``, in the order of the caller's stream.

        The cache may be written again at once; ``rows`` is filled when the result says so.
        """
        ids = torch.tensor(blocks, device=self._device)
        word, parts = self._as_words(rows)
        for start, count in _runs(slots, self._most):
            out = self._host(rows, slots[start], count, word)
            chosen = ids[start : start + count]
            staging = out if self._stream is None else torch.empty_like(out, device=self._device)
            for part in parts:
                torch.index_select(part.cache, 0, chosen, out=part.of(staging))
            if staging is not out:
                out.copy_(staging, non_blocking=True)
        return Done(self._stream is not None)

    def write(self, blocks: Sequence[int], rows: torch.Tensor, slots: Sequence[int], after: Done) -> Done:
        """Copy ``slots`` of ``rows`` into the pages of ``blocks``, beside whatever the engine computes.

        Args:
            blocks: owned by nobody who runs.
            rows, slots: as in `read`; must stay as they are until the result says so.
            after: what must have happened before: the engine's own last work on these blocks.
        """
        ids = torch.tensor(blocks, device=self._device)
        word, parts = self._as_words(rows)
        with self.beside():
            after.order()
            for start, count in _runs(slots, self._most):
                pages = self._host(rows, slots[start], count, word)
                chosen = ids[start : start + count]
                staging = pages.to(self._device, non_blocking=True)
                for part in parts:
                    part.cache.index_copy_(0, chosen, part.of(staging))
            return Done(self._stream is not None)

    def beside(self) -> Any:
        """A context in which work goes beside whatever the engine computes; see `Done`."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def as_pages(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of bytes as ``[rows, 2, layers, heads, …]``, halves as a layer's blocks have them; a view."""
        return rows[:, : self.page_bytes].view(self._dtype).view(len(rows), *self._page)

    def _as_words(self, rows: torch.Tensor) -> tuple[int, list[_Part]]:
        """The widest word that pages here and in ``rows`` are whole runs of, in bytes, and the parts as such."""
        caches = [part.cache for part in self._parts]
        steps = [step * cache.element_size() for cache in caches for step in cache.stride()[:-1]]
        starts = [tensor.data_ptr() for tensor in (*caches, rows)]
        runs = [cache.element_size() * (cache.shape[-1] if cache.stride(-1) == 1 else 1) for cache in caches]
        word = math.gcd(16, rows.stride(0), *runs, *steps, *starts)
        if word == self._dtype.itemsize:
            return word, self._parts
        return word, [_Part(part.layer, part.half, part.cache.view(_WORDS[word])) for part in self._parts]

    def _host(self, rows: torch.Tensor, first: int, count: int, word: int) -> torch.Tensor:
        *shape, run = self._page
        kind = self._dtype if word == self._dtype.itemsize else _WORDS[word]
        width = run * self._dtype.itemsize // word
        return rows[first : first + count, : self.page_bytes].view(kind).view(count, *shape, width)


class Done:
    """A moment in an accelerator's stream; on the CPU, now."""

    def __init__(self, on_device: bool = False) -> None:
        self._event = torch.cuda.Event() if on_device else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Return when it has passed."""
        if self._event is not None:
            self._event.synchronize()

    def order(self) -> None:
        """Let the current stream go on only after it."""
        if self._event is not None:
            self._event.wait()


def _runs(slots: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Start and length of each run of up to ``most`` consecutive numbers in ``slots``."""
    start = 0
    for place in range(1, len(slots) + 1):
        if place == len(slots) or place - start == most or slots[place] != slots[place - 1] + 1:
            yield start, place - start
            start = place
