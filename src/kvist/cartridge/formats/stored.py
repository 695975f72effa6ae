"""Tensors that a file holds, described but not read: what every container gives and every family takes.

Knows shapes and data types by name. Must not know files or families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvist.cartridge.model import DTYPES

READABLE: Final[Mapping[str, torch.dtype]] = {name: getattr(torch, name) for name in (*DTYPES, "float64")}
"""Data types that can become a cartridge's, by torch's names. ``float64`` can only be converted."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that was found in a file and not read yet.

    Attributes:
        dtype: by torch's name; may be none of `READABLE`.
        shape: no axis is negative, and there are no more elements than the file has bytes for.
        read: reads the bytes; the tensor is the caller's own to keep, and not to be written to. To be called once: a
            container refuses, by `InvalidCartridge`, to give more bytes than it has.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
