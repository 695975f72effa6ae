"""What a mock engine answers: tokens drawn from a seed and the prompt. Equal arguments give equal tokens, for ever.

The answer to a longer request begins with the answer to a shorter one. Knows token ids; must not know text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from blake3 import blake3

from kvist.errors import InvalidInput
from kvist.hashing.digests import little_endian, words

_HEAD = 8  # bytes of the digest that decide the length


def draw_answer(
    prompt: Sequence[int],
    vocabulary: Sequence[int],
    *,
    seed: int,
    limit: int,
    mean: float | None = None,
    least: int = 0,
    end: int | None = None,
) -> list[int]:
    """Tokens of an answer.

    Args:
        prompt: token ids.
        vocabulary: what tokens are drawn from, each as likely as the others.
        seed: any integer.
        limit: tokens at most.
        mean: expected length of answers that end by themselves; ``None``: none does.
        least: no answer ends by itself before so many tokens.
        end: the token with which answers end by themselves; it counts as one.

    Raises:
        InvalidInput: an empty vocabulary, a mean below 1, a prompt with an id outside [0, 2^32).
    """
    if not vocabulary:
        raise InvalidInput("vocabulary must hold at least one token, got none")
    if mean is not None and not 1 <= mean < math.inf:
        raise InvalidInput(f"mean must be a number, 1 or more; got {mean}")
    source = blake3(f"kvist mock answer v1/{seed}/".encode())
    source.update(little_endian(words("I", prompt, "token ids")))
    length = limit + 1
    if mean is not None and end is not None:
        part = int.from_bytes(source.digest(_HEAD), "little") / 2.0 ** (8 * _HEAD)
        drawn = 1 if mean == 1 else 1 + int(math.log(max(part, 1e-300)) / math.log1p(-1 / mean))
        length = max(drawn, least)
    count = min(limit, length)
    draws = np.frombuffer(source.digest(_HEAD + 4 * count)[_HEAD:], dtype="<u4") % len(vocabulary)
    tokens: list[int] = np.asarray(vocabulary)[draws].tolist()
    if end is not None and length <= limit:
        tokens[-1] = end
    return tokens
