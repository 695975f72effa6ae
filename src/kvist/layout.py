"""Layout: all that must be equal for the pages of two engines to be interchangeable. Knows no bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from kvist.errors import InvalidInput, LayoutMismatch

DTYPE_BYTES: Final = {"bf16": 2, "f16": 2, "f32": 4, "fp8e4m3": 1}
"""Bytes of one element, by the names of `paged-batchinvariant-v1`."""

MEMORY_ORDERS: Final = ("LNHD", "LHND")
"""Order of the axes in one page half: Layers, tokens (N), KV Heads, head Dimension."""

OPTIONAL: Final = {"attention": "full", "group": 0, "n_groups": 1}
"""Fields added to the format later, each with its default. Where one has its default it is not written, neither into a
manifest nor into the fingerprint, so layouts without it keep the names that they had."""

REPAGED: Final = frozenset({"page_size_tokens", "n_heads", "memory_order", "tp_rank", "tp_size"})
"""Fields that say how keys and values lie in pages, and not which they are: of full attention, pages of layouts that
differ in these only can be converted."""

_LEAST: Final = {"page_size_tokens": 1, "n_layers": 0, "n_heads": 0, "head_dim": 0, "tp_size": 1, "n_groups": 1}
_PRIVATE_ORDER: Final = re.compile(r"vllm-[a-z0-9.-]+")
_SLIDING: Final = re.compile(r"sliding:([1-9][0-9]{0,9})")


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
        memory_order: one of `MEMORY_ORDERS`, or an engine's private order (``vllm-`` and letters, digits, ``.``,
            ``-``), of which is only known that it is interchangeable with itself.
        tp_rank: which tensor-parallel shard these pages are.
        tp_size: of how many.
        attention: what the layers do with their KV. ``"full"``: every token sees all before it.
            ``"sliding:<window>"``: only the last ``window``, itself included. ``"mla"``: as full, over one latent
            vector a token in place of K and V; the halves of a page are the halves of it, so ``n_heads`` is 1 and
            ``head_dim`` half its width.
        group: which group of layers these pages are of. The layers of one group share a block table.
        n_groups: of how many.
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
    attention: str = "full"
    group: int = 0
    n_groups: int = 1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**32:
                raise InvalidInput(f"layout {name} must be an integer in [{least}, 2^32), got {value!r:.80}")
        for name in ("model", "revision"):
            text = getattr(self, name)
            if not (text is None or (isinstance(text, str) and text.isprintable())):
                raise InvalidInput(f"layout {name} must be printable text or null, got {text!r:.80}")
        for name, count in (("tp_rank", self.tp_size), ("group", self.n_groups)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < count:
                raise InvalidInput(f"layout {name} must be in [0, {count}), got {value!r:.80}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            raise InvalidInput(f"layout dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.memory_order not in MEMORY_ORDERS and not _matches(_PRIVATE_ORDER, self.memory_order):
            raise InvalidInput(
                f"layout memory_order must be one of {', '.join(MEMORY_ORDERS)} or like vllm-nhd, "
                f"got {self.memory_order!r:.80}"
            )
        if self.attention not in ("full", "mla") and not (
            _matches(_SLIDING, self.attention) and self.sliding_window < 2**32
        ):
            raise InvalidInput(f"layout attention must be full, mla or like sliding:4096, got {self.attention!r:.80}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The layout of which `dataclasses.asdict` gives these fields; those with a default may be missing.

        Raises:
            InvalidInput: not a mapping, an unknown or missing field, or a value out of range.
        """
        if not isinstance(fields, Mapping):
            raise InvalidInput(f"a layout must be a mapping of its fields, got {fields!r:.80}")
        known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
        if unknown := [name for name in fields if name not in known]:
            raise InvalidInput(f"a layout has no fields {unknown!r:.200}; it has {', '.join(known)}")
        if missing := [name for name, is_required in known.items() if is_required and name not in fields]:
            raise InvalidInput(f"a layout needs the fields {', '.join(missing)} too, got {sorted(fields)}")
        return cls(**fields)

    @property
    def sliding_window(self) -> int:
        """Tokens of the attention window, or 0 where attention is not sliding."""
        found = _SLIDING.fullmatch(self.attention)
        return int(found[1]) if found else 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page half (K, or V)."""
        return self.n_layers * self.page_size_tokens * self.n_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def uncommon(self) -> dict[str, Any]:
        """The fields of `OPTIONAL` that do not have their default."""
        return {name: value for name, default in OPTIONAL.items() if (value := getattr(self, name)) != default}

    @property
    def fingerprint(self) -> str:
        """``sha256:`` over the canonical JSON of all fields but those of `OPTIONAL` that have their default."""
        fields = dataclasses.asdict(self)
        written = {name: fields[name] for name in fields if name not in OPTIONAL} | self.uncommon
        text = json.dumps(written, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def require(self, other: Self, *, of: str, into: str) -> None:
        """Fail closed unless ``other`` is equal to this layout.

        Args:
            other: the layout of the pages on offer.
            of: what holds those pages, for the message (``"snapshot sha256:…"``).
            into: what this layout belongs to (``"the engine"``).

        Raises:
            LayoutMismatch: naming every field that differs, both values side by side; where the pages may be
                converted, the hint names the command.
        """
        differences = self.differences(other)
        if not differences:
            return
        told = [f"{name} {there!r} there, {here!r} here" for name, (there, here) in differences.items()]
        hint = "kvist convert REV --to-layout FILE, with what the engine answers to GET /v1/processfork/layout"
        is_repaged = {"tp_rank"} != differences.keys() <= REPAGED
        is_plain = self.attention == "full" and self.n_groups == 1 and not self.dtype.startswith("fp8")
        raise LayoutMismatch(
            f"{of} does not fit {into}: {'; '.join(told)}", hint=hint if is_repaged and is_plain else None
        )

    def differences(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """The fields in which ``other`` is not equal to this layout, in order: its value, and the value here."""
        found = {
            field.name: (getattr(other, field.name), getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        return {name: values for name, values in found.items() if values[0] != values[1]}


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
