"""A cartridge in the layout of one worker's cache: pages that an injection only has to copy.

Knows tensors, layouts and the attention backends' one call that writes keys and values. Must not know requests.

What a page looks like inside is the backend's own business, so its own code writes it: into a scratch cache with the
shape and the strides of the registered one, a run of blocks of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.model import LAYOUT_DTYPES
from kvist.engines.paged.matching import first_block, window_of
from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.vllm.pages import halves
from kvist.errors import LayoutMismatch
from kvist.layout import Layout
from kvist.pager.sharding import rank_heads

_CHUNK: Final = 16 << 20
"""Bytes of a scratch cache."""
_DTYPES: Final = {ours: name for name, ours in LAYOUT_DTYPES.items()}


class Writes(Protocol):
    """An attention layer, of which only this is asked."""

    impl: Any
    """Has ``do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)``."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A cartridge in memory.

    Attributes:
        rows: by group: its pages, uint8 ``[pages, page_bytes]``, as `GroupPages` copies them.
        first: by group: number of the first page; those before it no request can see, being out of the window.
    """

    rows: tuple[torch.Tensor, ...]
    first: tuple[int, ...]


class _Layer:
    """One layer of the model: where its keys and values go."""

    def __init__(self, index: int, attention: Writes, cache: torch.Tensor) -> None:
        self.index, self.attention = index, attention
        self._device, self._dtype, self._shape = cache.device, cache.dtype, cache.shape[1:]
        # A cache may be seen through strides; where a block is one run of memory, so is one of the scratch.
        self._order = sorted(range(1, cache.dim()), key=cache.stride, reverse=True)

    def scratch(self, blocks: int) -> torch.Tensor:
        """Blocks that no token has been written to, as the layer's own are laid out."""
        shape = [blocks, *(self._shape[axis - 1] for axis in self._order)]
        back = [0, *(1 + self._order.index(axis) for axis in range(1, len(shape)))]
        return torch.zeros(shape, dtype=self._dtype, device=self._device).permute(back)

    def write(self, keys: torch.Tensor, values: torch.Tensor, scratch: torch.Tensor) -> None:
        """Write ``[tokens, heads, head_dim]`` from the first slot on."""
        slots = torch.arange(len(keys), dtype=torch.int64, device=self._device)
        key, value = (half.contiguous().to(self._device) for half in (keys, values))
        self.attention.impl.do_kv_cache_update(self.attention, key, value, scratch, slots)


class Packer:
    """Packs cartridges for one worker.

    Attributes:
        layouts: of this rank, by group.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        groups: Sequence[GroupPages],
        layers: Sequence[Sequence[tuple[int, Writes, torch.Tensor]]],
    ) -> None:
        """Keep what pages look like.

        Args:
            layouts: of this rank, by group.
            groups: the same groups' pages.
            layers: by group, in the order of its pages: number in the model, attention layer, and registered cache.

        Raises:
            LayoutMismatch: a layer of the model has no cache of its own, or its cache is none of keys and values.
        """
        self.layouts, self._groups = list(layouts), list(groups)
        self._layers = [[_Layer(*layer) for layer in group] for group in layers]
        self._size = layouts[0].page_size_tokens
        self._on_device = any(cache.device.type != "cpu" for group in layers for _, _, cache in group)
        numbers = sorted(layer.index for group in self._layers for layer in group)
        if numbers != list(range(len(numbers))):
            raise LayoutMismatch(
                f"expected each layer of the model to have a KV cache of its own, got those of {numbers}"
            )
        if any(layout.attention == "mla" for layout in layouts):
            raise LayoutMismatch("a latent cache (MLA) has no keys and values that a cartridge could hold")

    def size_of(self, manifest: CartridgeManifest) -> int:
        """Bytes that a cartridge takes once it is packed."""
        pages = zip(self._groups, self._spans(manifest.num_tokens_raw), strict=True)
        return sum(group.page_bytes * (end - first) for group, (first, end) in pages)

    def check(self, manifest: CartridgeManifest) -> None:
        """Whether a cartridge fits this worker's cache.

        Raises:
            LayoutMismatch: it does not; every difference is named.
        """
        count = sum(map(len, self._layers))
        differ = [] if manifest.num_layers == count else [f"layers: {manifest.num_layers} there, {count} here"]
        if manifest.first_position:
            differ.append(f"first position: {manifest.first_position} there, 0 here")
        for layout in self.layouts:
            heads = len(self._heads(manifest, layout))
            here = {"heads a rank": layout.n_heads, "head_dim": layout.head_dim, "dtype": _DTYPES[layout.dtype]}
            there = {"heads a rank": heads, "head_dim": manifest.head_dim, "dtype": manifest.dtype}
            differ += [f"{name}: {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
        if differ:
            raise LayoutMismatch(
                f"cartridge {manifest.cartridge_id} does not fit this engine: {'; '.join(dict.fromkeys(differ))}"
            )

    def _heads(self, manifest: CartridgeManifest, layout: Layout) -> range:
        return rank_heads(manifest.num_kv_heads, layout.tp_size, layout.tp_rank)

    def _spans(self, tokens: int) -> list[tuple[int, int]]:
        """By group: first page that a request may see, and the end. A prompt that is the document takes one less."""
        end = -(-tokens // self._size)
        return [(min(first_block(tokens - 1, window_of(layout), self._size), end - 1), end) for layout in self.layouts]

    def pack(self, manifest: CartridgeManifest, layers: Iterable[tuple[int, torch.Tensor, torch.Tensor]]) -> Packed:
        """A cartridge's pages in host memory, page-locked if the cache is on an accelerator.

        Args:
            manifest: of the cartridge.
            layers: each one's number, keys and values, ``[tokens, heads, head_dim]`` of the whole model; in any order,
                and each only valid until the next one is asked for.

        Raises:
            LayoutMismatch: see `check`.
        """
        self.check(manifest)
        spans = self._spans(manifest.num_tokens_raw)
        rows = tuple(
            torch.empty((end - first, group.page_bytes), dtype=torch.uint8, pin_memory=self._on_device)
            for group, (first, end) in zip(self._groups, spans, strict=True)
        )
        pages = [group.as_pages(mine) for group, mine in zip(self._groups, rows, strict=True)]
        places = {layer.index: (n, place) for n, group in enumerate(self._layers) for place, layer in enumerate(group)}
        for index, keys, values in layers:
            number, place = places[index]
            heads = self._heads(manifest, self.layouts[number])
            pair = [half[:, heads.start : heads.stop] for half in (keys, values)]
            with self._groups[number].beside():
                self._pack_layer(number, place, pair, pages[number][:, :, place], spans[number])
                Done(self._on_device).wait()
        return Packed(rows, tuple(first for first, _ in spans))

    def _pack_layer(
        self, number: int, place: int, pair: Sequence[torch.Tensor], pages: torch.Tensor, span: tuple[int, int]
    ) -> None:
        """One layer of a group, of this rank's heads, into its part of the group's pages."""
        layer, layout = self._layers[number][place], self.layouts[number]
        keys, values = pair
        most = max(1, _CHUNK // (2 * layout.page_bytes // layout.n_layers))
        for start, end in _chunks(*span, most):
            tokens = slice(start * self._size, end * self._size)
            scratch = layer.scratch(end - start)
            layer.write(keys[tokens], values[tokens], scratch)
            pages[start - span[0] : end - span[0]].copy_(halves(scratch, layout, end - start), non_blocking=True)


def _chunks(first: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    for start in range(first, end, most):
        yield start, min(start + most, end)


def layers_of(
    names: Sequence[Sequence[str]], caches: Mapping[str, torch.Tensor], attention: Mapping[str, Any]
) -> list[list[tuple[int, Writes, torch.Tensor]]]:
    """What `Packer` wants to know of each layer, by group.

    Args:
        names: of the layers of each group.
        caches: registered ones, by layer.
        attention: vLLM's attention layers by the same names.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    return [[(extract_layer_index(name), attention[name], caches[name]) for name in group] for group in names]
