"""Requests that name a snapshot: looked up, checked out if need be, and given the prompt to go on from.

Pure ASGI, in front of the engine's own routes. Knows what bodies say of snapshots and of sampling; must not know
engines, nor how each body says its prompt. Whatever does not name a snapshot passes as it came, byte for byte; answers
are never touched.
"""

from __future__ import annotations

import json
import uuid
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.errors import InvalidInput
from kvist.repo import LogicalSeq
from kvist.server.access import path_of
from kvist.server.errors import BadRequest, error_response
from kvist.server.live.dialect import Dialect
from kvist.server.live.gate import Door
from kvist.server.live.passing import replayed, rewritten
from kvist.server.live.snapshots import Snapshots
from kvist.server.schema import BODY_MAX

_CARRIED: Final = (
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
"""Sampling parameters that go on as they were where a request leaves them out."""


def may_name_a_snapshot(scope: Scope, dialect: Dialect) -> bool:
    """Whether it is a request of the kind that may; cheap, and without its body."""
    if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) not in dialect.generating:
        return False
    kind = Headers(scope=scope).get("content-type", "")
    return kind.partition(";")[0].strip().lower() == "application/json"  # engines refuse all others


class Resume:
    """The middleware."""

    def __init__(self, app: ASGIApp, snapshots: Snapshots, door: Door, *, body_max: int = BODY_MAX) -> None:
        """Bodies over ``body_max`` bytes pass as they are: they are no token ids."""
        self.app, self._snapshots, self._door, self._body_max = app, snapshots, door, body_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it pass."""
        if not may_name_a_snapshot(scope, self._door.dialect):
            return await self.app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._body_max:
            return await self.app(scope, receive, send)
        messages, data = await self._read(receive)
        body = _naming_a_snapshot(data) if data is not None else None
        if body is None:
            return await self.app(scope, replayed(messages, receive), send)
        try:
            if self._door.access.tokens is None:  # else the gate has asked
                self._door.require(scope)
            scope, receive = await self._rewrite(scope, receive, body)
        except Exception as error:
            return await error_response(error)(scope, receive, send)
        return await self.app(scope, receive, send)

    async def _read(self, receive: Receive) -> tuple[list[Message], bytes | None]:
        """The messages that bring the body, and the body; ``None`` if it is too long, or the client went away."""
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or size > self._body_max:
                return messages, None
            if not message.get("more_body", False):
                return messages, b"".join(part.get("body", b"") for part in messages)

    async def _rewrite(self, scope: Scope, receive: Receive, body: dict[str, Any]) -> tuple[Scope, Receive]:
        """The request with the snapshot's full cid and sequence, the prompt, and what of the sampling goes on."""
        transfer = body["kv_transfer_params"]
        for field in ("snapshot", "sequence"):
            if not isinstance(transfer.get(field), str | None):
                raise BadRequest(
                    f"kv_transfer_params.{field}: expected text, got {transfer[field]!r:.80}",
                    param=f"kv_transfer_params.{field}",
                )
        cid, seq = await self._snapshots.sequence(transfer["snapshot"], transfer.get("sequence"))
        if not seq.token_ids:
            raise InvalidInput(f"sequence {seq.id!r} of {cid} was captured without token ids: it cannot be continued")
        body["kv_transfer_params"] = transfer | {"snapshot": cid, "sequence": seq.id}
        route = self._door.dialect.generating[path_of(scope)]
        ids = route.fill(body, seq, cid)
        _carry_sampling(body, seq, is_exact=ids == list(seq.token_ids))
        name: Any = Headers(scope=scope).get("x-request-id") or body.get("request_id")
        headers = {}
        if not isinstance(name, str):  # named here, so that its snapshots are known to continue this one
            name = headers["x-request-id"] = uuid.uuid4().hex
        self._snapshots.set_head(route.id_prefix + name, cid)
        return rewritten(scope, receive, json.dumps(body).encode(), headers)


def _naming_a_snapshot(data: bytes) -> dict[str, Any] | None:
    """The body, if it names a snapshot. One that cannot be read is left to the engine, which refuses it."""
    if b"kv_transfer_params" not in data or b"snapshot" not in data:
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    transfer = body.get("kv_transfer_params") if isinstance(body, dict) else None
    return body if isinstance(transfer, dict) and transfer.get("snapshot") is not None else None


def _carry_sampling(body: dict[str, Any], seq: LogicalSeq, *, is_exact: bool) -> None:
    """Sampling parameters that are left out go on as they were; ``min_tokens`` only exactly where the sequence stood,
    since the engine counts them from the first prompt then."""
    sampling = seq.state.get("sampling")
    if not isinstance(sampling, dict):
        return
    for name in (*_CARRIED, *(("min_tokens",) if is_exact else ())):
        if body.get(name) is None and sampling.get(name) not in (None, [], ""):
            body[name] = sampling[name]
