"""Sampling: from one row of logits to a token id. Knows numbers; must not know models or sequences.

Greedy takes the first of the largest logits. Otherwise draw ``n`` of a seed is a number in [0, 1) made by hashing the
two, and the token is where it falls in the cumulative distribution, computed in float64 on the CPU. So the whole state
of the generator is the pair (seed, draws): it fits in a snapshot, and a draw depends on nothing that ran beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from kvist.errors import InvalidInput

Row = NDArray[np.float32]
"""Logits or log probabilities of one position, ``[vocabulary]``."""

_CARRIED: Final = ("temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and what to say about them.

    Attributes:
        max_tokens: tokens to generate in this request; 0 computes the prompt and stops.
        temperature: 0 is greedy.
        top_p: keep the most likely ids until their probabilities sum to this; 1 keeps all.
        top_k: keep so many of the most likely ids; 0 keeps all.
        seed: of the draws, ``0 <= seed < 2**63``; ``None`` has the engine draw one.
        stop_token_ids: ids that end the sequence (they are part of it).
        ignore_eos: go on after the model's own end-of-text ids.
        logprobs: how many of the most likely ids to list at each token; ``None`` and 0 list none.
        logits: hand out the whole row of logits at each token.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logits: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.max_tokens) and self.max_tokens >= 0, "max_tokens", ">= 0", self.max_tokens)
        _require(_is_number(self.temperature) and 0 <= self.temperature < 1e4, "temperature", ">= 0", self.temperature)
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", ">= 0", self.top_k)
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63), "seed", "in [0, 2^63)", self.seed
        )
        _require(self.logprobs is None or (_is_int(self.logprobs) and self.logprobs >= 0), "logprobs", ">= 0 or None",
                 self.logprobs)  # fmt: skip
        stops = tuple(self.stop_token_ids)
        _require(all(map(_is_int, stops)), "stop_token_ids", "integers", stops)
        object.__setattr__(self, "stop_token_ids", stops)

    def state(self) -> dict[str, Any]:
        """What decides the tokens, as JSON: all but what belongs to one request (its length, what it reports)."""
        state = {name: getattr(self, name) for name in _CARRIED}
        return state | {"stop_token_ids": list(self.stop_token_ids)}

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """These parameters, where ``state`` (from `state`) says nothing else.

        Raises:
            InvalidInput: a value in ``state`` is not allowed.
        """
        known = {name: state[name] for name in _CARRIED if name in state}
        try:
            if "stop_token_ids" in known:
                known["stop_token_ids"] = tuple(known["stop_token_ids"])
            return dataclasses.replace(self, **known)
        except TypeError as error:
            raise InvalidInput(f"the sequence's sampling state cannot be read: {error}") from error


def uniform(seed: int, draw: int) -> float:
    """Draw number ``draw`` of ``seed``: uniform in [0, 1), a multiple of 2^-53."""
    words = seed.to_bytes(8, "little") + draw.to_bytes(8, "little")
    return (int.from_bytes(blake3(b"kvist draw v1\0" + words).digest()[:8], "little") >> 11) / 2**53


def choose(logits: Row, params: SamplingParams, draw: int) -> int:
    """The id that follows.

    Args:
        logits: of one position, unscaled.
        params: with a seed, unless greedy.
        draw: how many draws the sequence has made before; not used when greedy.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    assert params.seed is not None
    scaled = logits.astype(np.float64) / params.temperature
    ids: NDArray[np.intp] | None = None
    if 0 < params.top_k < len(scaled) or params.top_p < 1:
        # Stable, so that ids of equal logits keep one order whatever the library's version.
        ids = np.argsort(-scaled, kind="stable")
        if params.top_k:
            ids = ids[: params.top_k]
        scaled = scaled[ids]
    weights = np.exp(scaled - scaled.max())
    cumulative = weights.cumsum()
    if params.top_p < 1:
        kept = int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1
        cumulative = cumulative[:kept]
    point = uniform(params.seed, draw) * cumulative[-1]
    # The clamp is for a point that rounds up to the sum itself.
    index = min(int(np.searchsorted(cumulative, point, side="right")), len(cumulative) - 1)
    return int(index if ids is None else ids[index])


def log_probabilities(logits: Row) -> Row:
    """Float32 log-softmax: the model's distribution, before temperature and truncation (as OpenAI reports it)."""
    probabilities: Row = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    return probabilities


def most_likely(probabilities: Row, count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest ids with their log probabilities, best first; equal ones by id."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return tuple((int(index), float(probabilities[index])) for index in order)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise InvalidInput(f"{name} must be {expected}, got {value!r:.80}")
