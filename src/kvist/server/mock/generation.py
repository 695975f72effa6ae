"""The choices of one HTTP request in a mock engine, handed over piece by piece.

Where the client is slower than the engine, what has gathered comes as one piece. Lives on the engine's loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from kvist.engines.mock import MockEngine, Ticket
from kvist.server.answers import Answer, ChatAnswer, CompletionAnswer
from kvist.server.generation import Piece, Step
from kvist.server.mock.speech import Choice, Speech

_LN2: Final = math.log(2)


@dataclass(frozen=True, slots=True)
class MockStep:
    """A token, and probabilities that nobody computed: a half, and each next best half as likely."""

    token_id: int
    top: tuple[tuple[int, float], ...] = ()
    logprob: float = -_LN2
    logits: Any = None


class MockGeneration:
    """See the module. ``tops``: likeliest tokens to tell with each; ``vocabulary``: where the others come from."""

    def __init__(self, engine: MockEngine, speech: Speech, vocabulary: Sequence[int], tops: int) -> None:
        self._choices, self._prompts = speech.choices, speech.prompts
        self._vocabulary, self._tops = vocabulary, tops
        self._news: dict[int, None] = {}
        self._bell = asyncio.Event()
        self._tickets: list[Ticket] = []
        try:
            for index, choice in enumerate(speech.choices):
                self._tickets.append(engine.submit(choice.answer, partial(self._arrived, index)))
        except BaseException:
            self.cancel()
            raise

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Every choice's pieces as they come, until all choices have finished. Leaving early cancels the rest.

        Raises:
            EngineError: the engine could not go on.
        """
        sent = [0] * len(self._choices)
        lengths = [0] * len(self._choices)
        unfinished = len(self._choices)
        try:
            while unfinished:
                await self._bell.wait()
                self._bell.clear()
                news, self._news = self._news, {}
                for index in news:
                    ticket = self._tickets[index]
                    if ticket.error is not None:
                        raise ticket.error
                    if ticket.generated == sent[index]:  # its news came while others were handed over, and went along
                        continue
                    piece = self._piece(index, sent[index], ticket.generated, lengths[index])
                    sent[index] = ticket.generated
                    lengths[index] += len(piece.text)
                    unfinished -= piece.finish_reason is not None
                    yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End whatever still runs."""
        for ticket in self._tickets:
            ticket.cancel()

    def usage(self, prompts: int) -> dict[str, Any]:
        """OpenAI's token counts; each prompt counts once, however many choices it has."""
        firsts = self._tickets[:: len(self._tickets) // prompts]
        prompt_tokens = sum(ticket.answer.prompt_tokens for ticket in firsts)
        completion_tokens = sum(ticket.generated for ticket in self._tickets)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in firsts)},
        }

    def _arrived(self, index: int, _: Ticket) -> None:
        self._news[index] = None
        self._bell.set()

    def _piece(self, index: int, start: int, end: int, length: int) -> Piece:
        choice = self._choices[index]
        steps: list[Step] = [self._step(token) for token in choice.answer.tokens[start:end]]
        texts = choice.texts[start:end]
        offsets = []
        for text in texts:
            offsets.append(length)
            length += len(text)
        finish = choice.answer.finish_reason if end == len(choice.answer.tokens) else None
        return Piece(index, "".join(texts), steps, offsets, finish)

    def _step(self, token: int) -> MockStep:
        if not self._tops:
            return MockStep(token)
        others = [other for other in self._vocabulary[: self._tops] if other != token]
        halves = [(other, -_LN2 * (place + 2)) for place, other in enumerate(others[: self._tops - 1])]
        return MockStep(token, ((token, -_LN2), *halves))


class _Stopped(Answer):
    """vLLM tells beside the finish reason what stopped an answer.

    Attributes:
        said: the choices of the request.
    """

    said: Sequence[Choice] = ()

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        """The choice with its stop reason."""
        reason = self.said[piece.index].stop_reason if piece.finish_reason else None
        return super().choice(piece, stream=stream) | {"stop_reason": reason}


class MockCompletionAnswer(_Stopped, CompletionAnswer):
    """``text_completion``."""


class MockChatAnswer(_Stopped, ChatAnswer):
    """``chat.completion``."""
