"""Layout: all that must be equal for the pages of two engines to be interchangeable. Knows no bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Final, Self

from kvist.errors import InvalidInput, LayoutMismatch

DTYPE_BYTES: Final = {"bf16": 2, "f16": 2, "f32": 4, "fp8e4m3": 1}
"""Bytes of one element, by the names of `paged-batchinvariant-v1`."""

MEMORY_ORDERS: Final = ("LNHD", "LHND")
"""Order of the axes in one page half: Layers, tokens (N), KV Heads, head Dimension."""

_LEAST: Final = {"page_size_tokens": 1, "n_layers": 0, "n_heads": 0, "head_dim": 0, "tp_size": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The geometry of a page, and whose pages they are.

    The first five fields are those of `paged-batchinvariant-v1`; ``n_heads`` counts **KV** heads, since only that
    makes the page size right under grouped-query attention. The others are what the original format left out.
    Zero layers, heads or dimensions describe an engine without a cache: such a layout has no pages.

    Attributes:
        page_size_tokens: tokens in a page.
        n_layers: layers that have a KV cache.
        n_heads: KV heads a rank holds.
        head_dim: elements of one head.
        dtype: one of `DTYPE_BYTES`.
        model: the model's name, or ``None`` where nobody said.
        revision: what pins its weights (a commit, or a digest of the files), or ``None``.
        memory_order: one of `MEMORY_ORDERS`.
        tp_rank: which tensor-parallel shard these pages are.
        tp_size: of how many.
    """

    page_size_tokens: int
    n_layers: int
    n_heads: int
    head_dim: int
    dtype: str
    model: str | None = None
    revision: str | None = None
    memory_order: str = "LNHD"
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**32:
                raise InvalidInput(f"layout {name} must be an integer in [{least}, 2^32), got {value!r:.80}")
        for name in ("model", "revision"):
            text = getattr(self, name)
            if not (text is None or (isinstance(text, str) and text.isprintable())):
                raise InvalidInput(f"layout {name} must be printable text or null, got {text!r:.80}")
        if type(self.tp_rank) is not int or not 0 <= self.tp_rank < self.tp_size:
            raise InvalidInput(f"layout tp_rank must be in [0, {self.tp_size}), got {self.tp_rank!r}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            raise InvalidInput(f"layout dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.memory_order not in MEMORY_ORDERS:
            raise InvalidInput(
                f"layout memory_order must be one of {', '.join(MEMORY_ORDERS)}, got {self.memory_order!r}"
            )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page half (K, or V)."""
        return self.n_layers * self.page_size_tokens * self.n_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """``sha256:`` over the canonical JSON of all fields."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def require(self, other: Self, *, of: str, into: str) -> None:
        """Fail closed unless ``other`` is equal to this layout.

        Args:
            other: the layout of the pages on offer.
            of: what holds those pages, for the message (``"snapshot sha256:…"``).
            into: what this layout belongs to (``"the engine"``).

        Raises:
            LayoutMismatch: naming every field that differs, both values side by side.
        """
        differences = [
            f"{field.name} {getattr(other, field.name)!r} there, {getattr(self, field.name)!r} here"
            for field in dataclasses.fields(self)
            if getattr(other, field.name) != getattr(self, field.name)
        ]
        if differences:
            raise LayoutMismatch(f"{of} does not fit {into}: {'; '.join(differences)}")
