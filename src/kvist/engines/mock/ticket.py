"""What a mock engine is asked for, and what the caller holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was decided before it is given.

    Attributes:
        prompt_tokens: tokens before it.
        tokens: its own.
        finish_reason: ``"stop"`` or ``"length"``.
        sequence: prompt and answer, without the last token: what is computed.
        hashes: of the full blocks of that; none where nothing is cached.
    """

    prompt_tokens: int
    tokens: Sequence[int]
    finish_reason: str
    sequence: Sequence[int]
    hashes: Sequence[bytes]


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the engine. The engine writes it; times are nanoseconds of its clock.

    Attributes:
        answer: what it gets.
        came: when it was submitted.
        generated: tokens that it got so far.
        cached_tokens: prompt tokens found in the cache when it was first admitted.
        admissions: times that it came to run.
        queued: time from then to its first admission.
        first: when the first token came.
        last: when the last one so far came.
        error: why it ended before its time.
    """

    answer: Answer
    came: int
    deliver: Callable[[Ticket], None]
    withdraw: Callable[[Ticket], None]
    generated: int = 0
    cached_tokens: int = 0
    admissions: int = 0
    queued: int = 0
    first: int = 0
    last: int = 0
    error: Exception | None = None
    is_cancelled: bool = False

    @property
    def is_done(self) -> bool:
        """Whether it has all of its tokens."""
        return self.generated == len(self.answer.tokens)

    @property
    def is_over(self) -> bool:
        """Whether nothing comes any more."""
        return self.is_done or self.is_cancelled or self.error is not None

    def cancel(self) -> None:
        """Nobody wants the rest; what it computed stays in the cache. Of one that is over: nothing."""
        if not self.is_over:
            self.is_cancelled = True
            self.withdraw(self)
