"""What a training run is told. Must not know torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvist.errors import InvalidInput

Start = Literal["first", "spread"]
"""Where keys and values come from before training: the document's first tokens, or pieces from all over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a cartridge is trained. Construction checks the values.

    Attributes:
        tokens: of the cartridge.
        frozen_tokens: first ones that stay as the document's own: models rest their attention on them.
        start: keys and values before training.
        steps: of the optimizer.
        batch: conversations of a step.
        rows: conversations of one forward pass; a step's gradient is the sum over its passes, weighted by their tokens.
        rate: Adam's, at its peak.
        warmup: steps over which it grows to that from 0; then it falls to 0 in a straight line.
        top_k: ids of the teacher that the loss sums over; ``None``: all.
        seed: of the order of conversations, and of the pieces.
    """

    tokens: int
    frozen_tokens: int = 1
    start: Start = "first"
    steps: int = 500
    batch: int = 16
    rows: int = 8
    rate: float = 2e-2
    warmup: int = 20
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        leasts = {"tokens": 1, "steps": 1, "batch": 1, "rows": 1, "frozen_tokens": 0, "warmup": 0}
        for name, least in leasts.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InvalidInput(f"{name} must be an integer, {least} or more; got {value!r:.80}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInput(f"top_k must be 1 or more, or None; got {self.top_k!r:.80}")
        if self.frozen_tokens >= self.tokens:
            raise InvalidInput(f"frozen_tokens must be less than tokens, got {self.frozen_tokens} of {self.tokens}")
        if self.start not in get_args(Start):
            raise InvalidInput(f"start must be first or spread, got {self.start!r:.80}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise InvalidInput(f"rate must be a number above 0, got {self.rate!r:.80}")

    def rate_at(self, step: int) -> float:
        """Adam's rate at step ``step`` of ``range(steps)``."""
        rising = (step + 1) / (self.warmup + 1)
        falling = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.rate * min(1.0, rising, falling)

    def document(self) -> dict[str, Any]:
        """All values; JSON."""
        return dataclasses.asdict(self)
