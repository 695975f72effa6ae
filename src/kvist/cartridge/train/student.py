"""The student: keys and values that are trained, in front of a model that is not.

Knows torch. Must not know transformers, data or files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import torch

from kvist.cartridge.causal import CausalModel, Layers
from kvist.cartridge.train.settings import Start
from kvist.errors import InvalidInput

_PIECE: Final = 64


class Student:
    """A prefix whose first tokens stay as they are, and whose others are parameters.

    The parameters are float32 whatever the model computes in: a step is far smaller than a value, and would round away.

    Attributes:
        parameters: keys and values of each layer in turn, ``[tokens - frozen, KV heads, head dimension]``.
    """

    def __init__(self, layers: Layers, frozen: int) -> None:
        """Begin with a copy of ``layers``.

        Raises:
            InvalidInput: no token is left to train.
        """
        tokens = layers[0][0].shape[0]
        if not 0 <= frozen < tokens:
            raise InvalidInput(f"frozen tokens must be in [0, {tokens}), as {tokens} tokens are kept; got {frozen}")
        whole = [tensor.detach().float() for layer in layers for tensor in layer]
        self._frozen = [tensor[:frozen].clone() for tensor in whole]
        self.parameters = [tensor[frozen:].clone().contiguous().requires_grad_() for tensor in whole]

    def layers(self, dtype: torch.dtype) -> Layers:
        """The prefix as the model reads it; gradients flow to the parameters."""
        whole = [torch.cat(parts).to(dtype) for parts in zip(self._frozen, self.parameters, strict=True)]
        return list(zip(whole[::2], whole[1::2], strict=True))


def start_of(model: CausalModel, document: Sequence[int], tokens: int, start: Start, seed: int) -> Layers:
    """Keys and values to begin with: ``tokens`` of them, from position 0.

    Args:
        model: the teacher.
        document: ids.
        tokens: fewer than the document has, or as many.
        start: ``"first"``: the document's first tokens. ``"spread"``: its first tokens, then pieces of 64 from all over
            it in their order, computed as one text.
        seed: of which pieces.

    Raises:
        InvalidInput: more tokens than the document has, or none.
    """
    if not 1 <= tokens <= len(document):
        raise InvalidInput(f"tokens must be in [1, {len(document)}], the document's length; got {tokens}")
    if start == "first":
        return model.prefill(document[:tokens])
    return model.prefill([document[place] for place in _spread(len(document), tokens, seed)])


def _spread(length: int, tokens: int, seed: int) -> list[int]:
    """Places of a document: its first piece, and others that do not overlap, drawn from the rest."""
    piece = max(1, min(_PIECE, tokens // 4))
    needed = -(-tokens // piece)
    grid = range(piece, length - piece + 1, piece)
    chosen = sorted(random.Random(seed).sample(grid, min(needed - 1, len(grid))))
    places = [start + offset for start in (0, *chosen) for offset in range(piece)]
    rest = (place for place in range(length) if place not in set(places))
    while len(places) < tokens:  # the grid ends before the document does
        places.append(next(rest))
    return sorted(places)[:tokens]
