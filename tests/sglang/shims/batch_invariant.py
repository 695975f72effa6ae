"""The CPU's half of `--enable-deterministic-inference`: what a token computes does not depend on the others beside it.

SGLang's own batch invariant kernels are Triton's, for accelerators. On the CPU a matrix product of one row goes another
way than one of many, with other last bits, and so does attention. Here every product is made row by row, and every
token attends by itself. Slow, and enough for tiny models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_library: torch.library.Library | None = None


def enable(enable_bmm: bool = True) -> None:
    """Take the place of `sglang.srt.batch_invariant_ops.enable_batch_invariant_mode`. Idempotent."""
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        for name, product in (("linear", _linear), ("mm", _mm), ("addmm", _addmm), ("bmm", _bmm)):
            _library.impl(f"aten::{name}", product, "CPU")


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if not len(left):
        return left.new_empty(0, right.shape[1])
    across = right.t()
    return torch.stack([torch.mv(across, row) for row in left])


def _addmm(
    bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return beta * bias + alpha * _mm(left, right)


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    flat = _mm(rows.reshape(-1, rows.shape[-1]), weight.t()).reshape(*rows.shape[:-1], len(weight))
    return flat if bias is None else flat + bias


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([_mm(one, other) for one, other in zip(left, right, strict=True)])


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool = False, **how: Any
) -> torch.Tensor:
    """As torch's, on ``[1, heads, tokens, width]``; a prompt's tokens one by one, as when they are generated."""
    if _library is None or not is_causal:
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal, **how)
    rows = [
        scaled_dot_product_attention(query[:, :, row : row + 1], key[:, :, : row + 1], value[:, :, : row + 1], **how)
        for row in range(query.shape[2])
    ]
    return torch.cat(rows, dim=2)
