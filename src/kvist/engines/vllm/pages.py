"""Pages in a worker's cache: out of it into host memory, and back. Knows tensors; must not know requests or stores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch

from kvist.errors import UnsupportedModel
from kvist.layout import Layout

_STAGING: Final = 64 << 20
"""Bytes that a copy to or from an accelerator takes there, at most."""
_WORDS: Final = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""What bytes are copied as: indexed copies on the CPU go element by element, so wide ones are near a plain copy."""


class GroupPages:
    """The pages of one KV cache group.

    A page in host memory is its K half and then its V half, each ``[layers, heads, tokens, head_dim]`` in the order
    that the layout's ``memory_order`` names. On an accelerator, copies go through one staging tensor: a gather a layer
    there, and a copy a run of slots between it and the host; `Done` says when they are through.

    Attributes:
        layout: of every page.
    """

    def __init__(self, layout: Layout, caches: Sequence[torch.Tensor], blocks: int) -> None:
        self.layout = layout
        self._layers = [halves(cache, layout, blocks) for cache in caches]
        self._dtype, self._device = caches[0].dtype, caches[0].device
        self._page = (2, len(caches), *self._layers[0].shape[2:])
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._most = blocks if self._stream is None else max(1, _STAGING // self.page_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of both halves."""
        return 2 * self.layout.page_bytes

    def read(self, blocks: Sequence[int], rows: torch.Tensor, slots: Sequence[int]) -> Done:
        """Copy the pages of ``blocks`` into ``slots`` of ``rows``, in the order of the caller's stream.

        The cache may be written again at once; ``rows`` is filled when the result says so.
        """
        ids = torch.tensor(blocks, device=self._device)
        word, layers = self._as_words(rows)
        for start, count in _runs(slots, self._most):
            out = self._host(rows, slots[start], count, word)
            part = ids[start : start + count]
            staging = out if self._stream is None else torch.empty_like(out, device=self._device)
            for number, layer in enumerate(layers):
                torch.index_select(layer, 0, part, out=staging[:, :, number])
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
        word, layers = self._as_words(rows)
        with self.beside():
            after.order()
            for start, count in _runs(slots, self._most):
                pages = self._host(rows, slots[start], count, word)
                part = ids[start : start + count]
                staging = pages.to(self._device, non_blocking=True)
                for number, layer in enumerate(layers):
                    layer.index_copy_(0, part, staging[:, :, number])
            return Done(self._stream is not None)

    def beside(self) -> Any:
        """A context in which work goes beside whatever the engine computes; see `Done`."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def as_pages(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of bytes as ``[rows, 2, layers, heads, …]``, as `halves` has a layer's blocks; a view."""
        return rows[:, : self.page_bytes].view(self._dtype).view(len(rows), *self._page)

    def _as_words(self, rows: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
        """The widest word that pages here and in ``rows`` are whole runs of, in bytes, and the layers as such."""
        layers = self._layers
        steps = [step * layer.element_size() for layer in layers for step in layer.stride()[:-1]]
        starts = [tensor.data_ptr() for tensor in (*layers, rows)]
        run = layers[0].shape[-1] * layers[0].element_size() if layers[0].stride(-1) == 1 else layers[0].element_size()
        word = math.gcd(16, run, rows.stride(0), *steps, *starts)
        return word, [layer.view(_WORDS[word]) if word != layer.element_size() else layer for layer in layers]

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


def _runs(slots: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Start and length of each run of up to ``most`` consecutive numbers in ``slots``."""
    start = 0
    for place in range(1, len(slots) + 1):
        if place == len(slots) or place - start == most or slots[place] != slots[place - 1] + 1:
            yield start, place - start
            start = place
