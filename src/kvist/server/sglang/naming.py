"""Requests are called what their clients call them: X-Request-Id becomes the id that SGLang gives a request.

Pure ASGI. Knows SGLang's bodies by their field for that. Ends each name in letters of its own: SGLang aborts every
request whose id begins as the one that is to be aborted, and refuses a name that is in use.
"""

from __future__ import annotations

import json
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from kvist.engines.sglang.requests import called
from kvist.errors import KvistError
from kvist.server.access import path_of
from kvist.server.errors import error_response
from kvist.server.live.passing import rewritten
from kvist.server.schema import BODY_MAX, read_bytes

_PATHS: Final = frozenset({"/v1/completions", "/v1/chat/completions", "/generate"})


class Naming:
    """The middleware."""

    def __init__(self, app: ASGIApp, *, body_max: int = BODY_MAX) -> None:
        """Named bodies over ``body_max`` bytes are refused."""
        self._app, self._body_max = app, body_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, named if it comes with a name."""
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) not in _PATHS:
            return await self._app(scope, receive, send)
        name = Headers(scope=scope).get("x-request-id")
        if not name:
            return await self._app(scope, receive, send)
        try:
            data = await read_bytes(Request(scope, receive), self._body_max)
        except ClientDisconnect:  # nobody sees an answer
            return None
        except KvistError as error:
            return await error_response(error)(scope, receive, send)
        scope, receive = rewritten(scope, receive, _named(data, name))
        return await self._app(scope, receive, send)


def _named(data: bytes, name: str) -> bytes:
    """The body with the name; one that cannot be read, or has a name already, is left to SGLang."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(body, dict) or body.get("rid") is not None:
        return data
    return json.dumps({**body, "rid": called(name)}).encode()
