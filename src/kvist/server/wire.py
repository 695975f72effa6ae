"""JSON and server-sent events onto the wire, and what to do when a client goes away.

Knows ASGI; must not know what is sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, TypeVar

import anyio
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvist.server.errors import Envelope, envelope, error_response

_T = TypeVar("_T")
_DONE: Final = b"data: [DONE]\n\n"
CLIENT_GONE: Final = 499
"""Status, by nginx's convention, of an answer that nobody is there to get."""


Endpoint = Callable[[Request], Awaitable[Response]]


def guarded(endpoint: Endpoint, form: Envelope = envelope) -> Endpoint:
    """``endpoint``, with whatever it raises as an answer of this form."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:  # while its body was read; nobody sees the answer
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            return error_response(error, form)

    return answer


def json_response(document: Any, headers: dict[str, str] | None = None) -> Response:
    """``document`` with status 200."""
    return Response(msgspec.json.encode(document), 200, headers, "application/json")


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


async def while_connected(request: Request, work: Callable[[], Awaitable[_T]]) -> _T:
    """The result of ``work``, which is cancelled if the client goes away.

    Raises:
        ClientGone: it did.
        Exception: whatever ``work`` raises.
    """
    result: list[_T] = []
    failure: list[Exception] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            await _disconnected(request.receive)
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result.append(await work())
        except Exception as error:  # kept, so that the task group does not wrap it
            failure.append(error)
        group.cancel_scope.cancel()
    if failure:
        raise failure[0]
    if not result:
        raise ClientGone
    return result[0]


class EventStream(Response):
    """Sends JSON documents as server-sent events, then ``[DONE]``; calls ``close`` at the end, or when the client goes.

    The status is long sent when something fails on the way: the error then is an event of its own.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        headers: dict[str, str],
        close: Callable[[], None],
        form: Envelope = envelope,
    ) -> None:
        super().__init__(None, 200, headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._form = events, close, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await _disconnected(receive)
                group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._send_events(send)
            finally:
                self._close()
                with anyio.CancelScope(shield=True):
                    await self._events.aclose()
                group.cancel_scope.cancel()

    async def _send_events(self, send: Send) -> None:
        async def event(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async for document in self._events:
                await event(b"data: " + msgspec.json.encode(document) + b"\n\n")
        except Exception as error:
            error_response(error)  # for its log
            await event(b"data: " + msgspec.json.encode(self._form(error)) + b"\n\n")
        await event(_DONE, more=False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
