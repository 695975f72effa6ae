"""How a chunk lies in LMCache's memory, and which page it is. Knows torch and the shapes of LMCache 0.5.6.

=================  ==================================  ==========================================================
format             shape of a chunk                    when
=================  ==================================  ==========================================================
``KV_2LTD``        ``[2, layers, tokens, width]``      the default
``KV_T2D``         ``[tokens, 2, width]``              a chunk of one layer (``use_layerwise``)
``KV_2TD``         ``[2, tokens, width]``              the same, with blending
``KV_MLA_FMT``     ``[1, layers, tokens, width]``      latent attention; a page's halves are the halves of the width
=================  ==================================  ==========================================================

(``MemoryFormat.token_dim`` of 0.5.6 has the middle two the wrong way round, so it is not asked.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

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
_FILL_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """The chunks of one worker.

    Attributes:
        layout: of their pages; tokens, layers (1 for chunks of a layer), heads and dimension are a chunk's.
        dtype: of an element.
        format: name of LMCache's memory format.
    """

    layout: Layout
    dtype: torch.dtype
    format: str

    @classmethod
    def of(
        cls,
        kv_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        model: str,
        revision: str | None,
        world_size: int,
        worker_id: int,
        use_mla: bool = False,
        use_layerwise: bool = False,
        enable_blending: bool = False,
    ) -> Self:
        """The geometry that LMCache's metadata and configuration come to.

        Args:
            kv_shape: layers, 2 (1: latent attention), tokens a chunk, KV heads of this worker, head dimension.
            dtype: of the KV cache.
            model: LMCache's name of it.
            revision: of its weights, if known.
            world_size: workers; of a pipeline too, each holds its own part.
            worker_id: which of them.
            use_mla, use_layerwise, enable_blending: as LMCache has them.

        Raises:
            UnsupportedModel: a cache that the plugin cannot page, by name.
            InvalidInput: a shape that cannot be.
        """
        if len(kv_shape) != 5 or min(kv_shape) < 1:
            raise InvalidInput(f"expected the five sizes of LMCache's kv_shape, got {tuple(kv_shape)!r:.80}")
        layers, parts, tokens, heads, dim = kv_shape
        if dtype not in _DTYPES:
            raise UnsupportedModel(f"a KV cache of {dtype} cannot be paged: expected {', '.join(map(str, _DTYPES))}")
        if use_mla and use_layerwise:
            raise UnsupportedModel("latent attention with use_layerwise cannot be paged", hint="use_layerwise: false")
        if use_mla and (parts, heads, dim % 2) != (1, 1, 0):
            raise UnsupportedModel(f"latent attention of shape {tuple(kv_shape)} cannot be paged: no even width")
        if not use_mla and parts != 2:
            raise UnsupportedModel(f"expected K and V in kv_shape {tuple(kv_shape)}")
        layout = Layout(
            page_size_tokens=tokens,
            n_layers=1 if use_layerwise else layers,
            n_heads=heads,
            head_dim=dim // 2 if use_mla else dim,
            dtype=_DTYPES[dtype],
            model=model,
            revision=revision,
            tp_rank=worker_id,
            tp_size=world_size,
            attention="mla" if use_mla else "full",
        )
        layerwise = "KV_2TD" if enable_blending else "KV_T2D"
        return cls(layout, dtype, "KV_MLA_FMT" if use_mla else layerwise if use_layerwise else "KV_2LTD")

    @property
    def is_of_a_layer(self) -> bool:
        """Whether a chunk is of one layer."""
        return self.format in ("KV_T2D", "KV_2TD")

    def by_layer(self) -> Geometry:
        """That of chunks of one layer: this one, if they are."""
        if self.is_of_a_layer:
            return self
        return replace(self, layout=replace(self.layout, n_layers=1), format="KV_2TD")

    def shape(self, tokens: int) -> torch.Size:
        """Of a chunk of so many tokens."""
        layout, width = self.layout, self.layout.n_heads * self.layout.head_dim
        match self.format:
            case "KV_2LTD":
                return torch.Size([2, layout.n_layers, tokens, width])
            case "KV_MLA_FMT":
                return torch.Size([1, layout.n_layers, tokens, 2 * width])
            case "KV_T2D":
                return torch.Size([tokens, 2, width])
            case _:
                return torch.Size([2, tokens, width])

    def tokens(self, shape: Sequence[int], dtype: torch.dtype | None) -> int:
        """How many tokens a chunk of this shape has.

        Raises:
            LayoutMismatch: it is no chunk of this geometry, or holds no token, or more than a chunk does.
        """
        axis = {"KV_T2D": 0, "KV_2TD": 1}.get(self.format, 2)
        tokens = shape[axis] if len(shape) > axis else 0
        if dtype != self.dtype or tuple(shape) != tuple(self.shape(tokens)):
            expected = tuple(self.shape(self.layout.page_size_tokens))
            raise LayoutMismatch(f"expected a chunk {expected} of {self.dtype}, got {tuple(shape)} of {dtype}")
        if not 1 <= tokens <= self.layout.page_size_tokens:
            raise LayoutMismatch(f"expected 1 to {self.layout.page_size_tokens} tokens in a chunk, got {tokens}")
        return tokens

    def halves(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a chunk's K and V half, each ``[layers, tokens, width of a half]``."""
        match self.format:
            case "KV_2LTD":
                return chunk[0], chunk[1]
            case "KV_MLA_FMT":
                width = chunk.shape[-1] // 2
                return chunk[0, :, :, :width], chunk[0, :, :, width:]
            case "KV_T2D":
                return chunk[:, 0].unsqueeze(0), chunk[:, 1].unsqueeze(0)
            case _:
                return chunk[0].unsqueeze(0), chunk[1].unsqueeze(0)

    @property
    def can_be_read_in_place(self) -> bool:
        """Whether the halves of a full chunk are page halves as they lie."""
        return self.format in ("KV_2LTD", "KV_2TD")

    # -- pages ---------------------------------------------------------------------------------------------------

    def new_page(self) -> Tensor:
        """Memory for both halves of a page, ``[2, layers, tokens, width of a half]``; content undefined."""
        layout = self.layout
        return torch.empty(
            2, layout.n_layers, layout.page_size_tokens, layout.n_heads * layout.head_dim, dtype=self.dtype
        )

    def fill_page(self, page: Tensor, chunk: Tensor) -> None:
        """Copy a chunk into a page. What is left of a page is zeros, and at its very end the number of tokens."""
        halves = self.halves(chunk)
        tokens = halves[0].shape[1]
        for out, half in zip(page, halves, strict=True):
            out[:, :tokens].copy_(half)
            out[:, tokens:].zero_()
        if tokens < self.layout.page_size_tokens:
            tail = page.view(-1).view(torch.uint8)[-_FILL_BYTES:]
            tail.copy_(torch.tensor(list(tokens.to_bytes(_FILL_BYTES, "little")), dtype=torch.uint8))

    def fill_of(self, page: Tensor) -> int:
        """How many tokens a page that is not full holds.

        Raises:
            LayoutMismatch: it is no such page.
        """
        tokens = int.from_bytes(bytes(page.view(-1).view(torch.uint8)[-_FILL_BYTES:].tolist()), "little")
        if not 1 <= tokens < self.layout.page_size_tokens:
            raise LayoutMismatch(
                f"a page of {self.layout.page_size_tokens} tokens cannot hold {tokens} and be unfilled"
            )
        return tokens

    def fill_chunk(self, chunk: Tensor, page: Tensor) -> None:
        """Copy a page into a chunk, as many tokens as that has."""
        for half, out in zip(self.halves(chunk), page, strict=True):
            half.copy_(out[:, : half.shape[1]])


def views(page: Tensor) -> tuple[memoryview, memoryview]:
    """The bytes of both halves of a page, or of a chunk that can be read in place; they keep it alive."""
    array: Any = page.view(-1).view(torch.uint8).numpy()
    flat = memoryview(array)
    half = flat.nbytes // 2
    return flat[:half], flat[half:]
