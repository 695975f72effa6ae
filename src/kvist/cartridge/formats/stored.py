"""Tensors that a file holds, described but not read: what every container gives and every family takes.

Knows shapes and data types by name. Must not know files or families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

READABLE: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Data types that can become a cartridge's, by torch's names. ``float64`` can only be converted."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that was found in a file and not read yet.

    Attributes:
        dtype: by torch's name; may be none of `READABLE`.
        shape: no axis is negative, and there are no more elements than the file has bytes for.
        read: reads the bytes, at each call; the tensor is the caller's own to keep, and not to be written to.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements. Only for a data type of `READABLE`."""
        return math.prod(self.shape) * READABLE[self.dtype].itemsize
