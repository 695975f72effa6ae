"""A generation's pieces to the client: in one document, or as a stream. Knows HTTP; must not know who generates."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from kvist.server.answers import Answer
from kvist.server.errors import BadRequest, Envelope, envelope
from kvist.server.generation import Piece
from kvist.server.schema import ChatBody, CompletionBody, GenerationBody
from kvist.server.wire import CLIENT_GONE, ClientGone, EventStream, json_response, while_connected


class Generating(Protocol):
    """The choices of one HTTP request, under way."""

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """Every choice's pieces as they come, until all choices have finished."""

    def cancel(self) -> None:
        """End whatever still runs."""

    def usage(self, prompts: int) -> dict[str, Any]:
        """OpenAI's token counts so far."""


def require_consistent(body: GenerationBody) -> None:
    """Refuse options of a stream where none is asked for."""
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options: only with stream: true", param="stream_options")


async def deliver(
    request: Request,
    body: CompletionBody | ChatBody,
    answer: Answer,
    generation: Generating,
    prompts: int,
    headers: dict[str, str],
    form: Envelope = envelope,
) -> Response:
    """The response to a request whose choices are submitted; they are cancelled when the client goes away.

    Args:
        request: of the client.
        body: its body.
        answer: the shape of what is sent.
        generation: what comes.
        prompts: how many prompts it has; their choices lie together.
        headers: of the response.
        form: of an error that comes when the stream has begun.

    Raises:
        Exception: what the generation raised before its first piece.
    """
    pieces = generation.pieces()
    try:
        # The first piece is awaited before the status is sent: most failures come before it.
        first = await while_connected(request, pieces.__anext__)
        if body.stream:
            events = _events(first, pieces, answer, generation, prompts, body)
            return EventStream(events, headers, generation.cancel, form)
        choices = await while_connected(request, lambda: _collect(first, pieces, len(answer.prompts)))
    except ClientGone:
        generation.cancel()
        return Response(status_code=CLIENT_GONE)
    except BaseException:
        generation.cancel()
        raise
    document = answer.document([answer.choice(piece, stream=False) for piece in choices], generation.usage(prompts))
    if body.return_token_ids and isinstance(body, ChatBody):
        document["prompt_token_ids"] = list(answer.prompts[0])
    return json_response(document, headers)


async def _events(
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    answer: Answer,
    generation: Generating,
    prompts: int,
    body: GenerationBody,
) -> AsyncGenerator[dict[str, Any], None]:
    usage: dict[str, Any] = {"usage": None} if body.include_usage else {}
    try:
        async for piece in _chain(first, pieces):
            if answer.is_worth_sending(piece):
                yield answer.chunk([answer.choice(piece, stream=True)], **usage)
        if body.include_usage:
            yield answer.chunk([], usage=generation.usage(prompts))
    finally:
        await pieces.aclose()


async def _chain(first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in pieces:
        yield piece


async def _collect(first: Piece, pieces: AsyncIterator[Piece], count: int) -> list[Piece]:
    """Whole choices, in order."""
    choices = [Piece(index) for index in range(count)]
    async for piece in _chain(first, pieces):
        choices[piece.index].add(piece)
    return choices
