"""Requests passed on with another body, or as they came, after theirs was read. Knows ASGI only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope


def replayed(messages: Sequence[Message], receive: Receive) -> Receive:
    """What brings ``messages``, and then whatever comes."""
    waiting = iter(messages)

    async def replay() -> Message:
        message = next(waiting, None)
        return message if message is not None else await receive()

    return replay


def rewritten(
    scope: Scope, receive: Receive, body: bytes, headers: Mapping[str, str] | None = None
) -> tuple[Scope, Receive]:
    """A request whose body was read, with ``body`` in its place, and ``headers`` in place of those of their names."""
    scope = {**scope, "headers": list(scope["headers"])}
    mine = MutableHeaders(scope=scope)
    mine.update({"content-length": str(len(body)), **(headers or {})})
    return scope, replayed([{"type": "http.request", "body": body, "more_body": False}], receive)
