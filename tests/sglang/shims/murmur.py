"""The one of SGLang's CPU kernels that has no path in plain torch beside it: the hash that seeded draws come from."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _rotated(value: torch.Tensor, by: int) -> torch.Tensor:
    return ((value << by) | (value >> (32 - by))) & _MASK


def _times(value: torch.Tensor, factor: int) -> torch.Tensor:
    """Modulo 2^32, in halves: the product of two 32-bit numbers does not fit a signed 64-bit one."""
    low, high = value & 0xFFFF, value >> 16
    return (low * factor + (((high * factor) & 0xFFFF) << 16)) & _MASK


def _mixed(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _times(_rotated(_times(block, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotated(state ^ block, 13) * 5 + 0xE6546B64) & _MASK


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column), as SGLang's Triton kernel computes it.

    Args:
        seed: ``[n]``, 64 bits.
        positions: ``[n]``.
        columns: ``[m]``.

    Returns:
        ``[n, m]``, uint32.
    """
    wide = seed.view(torch.int64)
    state = torch.zeros(len(seed), 1, dtype=torch.int64)
    for block in (wide & _MASK, (wide >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        state = _mixed(state, block[:, None])
    state = _mixed(state, (columns.to(torch.int64) & _MASK)[None, :]) ^ 16
    for by, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = _times(state ^ (state >> by), factor)
    return (state ^ (state >> 16)).to(torch.uint32)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
