"""Requests that name a snapshot: looked up, checked out if need be, and given the prompt to go on from.

Pure ASGI, in front of vLLM's own routes. Knows what completions bodies say of prompts; must not know engines. Whatever
does not name a snapshot passes as it came, byte for byte; answers are never touched.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.errors import InvalidInput
from kvist.repo import LogicalSeq
from kvist.server.access import path_of
from kvist.server.errors import BadRequest, error_response
from kvist.server.schema import BODY_MAX
from kvist.server.vllm.gate import Door
from kvist.server.vllm.snapshots import Snapshots

_PREFIXES: Final = {"/v1/completions": "cmpl-", "/v1/chat/completions": "chatcmpl-"}
"""The routes, and what vLLM puts before a request's name to make its id."""
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


def may_name_a_snapshot(scope: Scope) -> bool:
    """Whether it is a request of the kind that may; cheap, and without its body."""
    if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) not in _PREFIXES:
        return False
    kind = Headers(scope=scope).get("content-type", "")
    return kind.partition(";")[0].strip().lower() == "application/json"  # vLLM refuses all others


class Resume:
    """The middleware."""

    def __init__(self, app: ASGIApp, snapshots: Snapshots, door: Door, *, body_max: int = BODY_MAX) -> None:
        """Bodies over ``body_max`` bytes pass as they are: they are no token ids."""
        self.app, self._snapshots, self._door, self._body_max = app, snapshots, door, body_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it pass."""
        if not may_name_a_snapshot(scope):
            return await self.app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._body_max:
            return await self.app(scope, receive, send)
        messages, data = await self._read(receive)
        body = _naming_a_snapshot(data) if data is not None else None
        if body is None:
            return await self.app(scope, _replay(messages, receive), send)
        try:
            if self._door.access.tokens is None:  # else the gate has asked
                self._door.require(scope)
            scope, data = await self._rewrite(scope, body)
        except Exception as error:
            return await error_response(error)(scope, receive, send)
        whole: Message = {"type": "http.request", "body": data, "more_body": False}
        return await self.app(scope, _replay([whole], receive), send)

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

    async def _rewrite(self, scope: Scope, body: dict[str, Any]) -> tuple[Scope, bytes]:
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
        body["kv_transfer_params"] = transfer = transfer | {"snapshot": cid, "sequence": seq.id}
        path = path_of(scope)
        ids = _fill_chat(body, transfer, seq, cid) if "chat" in path else _fill_completion(body, seq, cid)
        if body.get("truncate_prompt_tokens") is not None:
            raise BadRequest(
                "truncate_prompt_tokens: must be left out where a snapshot is named", param="truncate_prompt_tokens"
            )
        _carry_sampling(body, seq, is_exact=ids == list(seq.token_ids))
        data = json.dumps(body).encode()
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        if "content-length" in headers:
            headers["content-length"] = str(len(data))
        name: Any = headers.get("x-request-id") or body.get("request_id")
        if not isinstance(name, str):  # named here, so that its snapshots are known to continue this one
            name = headers["x-request-id"] = uuid.uuid4().hex
        self._snapshots.set_head(_PREFIXES[path] + name, cid)
        return scope, data


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """What brings ``messages``, and then whatever comes."""
    waiting = iter(messages)

    async def replay() -> Message:
        message = next(waiting, None)
        return message if message is not None else await receive()

    return replay


def _naming_a_snapshot(data: bytes) -> dict[str, Any] | None:
    """The body, if it names a snapshot. One that cannot be read is left to vLLM, which refuses it."""
    if b"kv_transfer_params" not in data or b"snapshot" not in data:
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    transfer = body.get("kv_transfer_params") if isinstance(body, dict) else None
    return body if isinstance(transfer, dict) and transfer.get("snapshot") is not None else None


# -- prompts -----------------------------------------------------------------------------------------------------


def _fill_completion(body: dict[str, Any], seq: LogicalSeq, cid: str) -> list[int] | None:
    """Put the prompt in, or check it. The ids of the one prompt; ``None``: there are several."""
    if body.get("prompt_embeds") is not None:
        raise BadRequest("prompt_embeds: must be left out where a snapshot is named", param="prompt_embeds")
    prompt = body.get("prompt")
    if prompt is None or prompt == "" or prompt == []:
        body["prompt"] = list(seq.token_ids)
        return list(seq.token_ids)
    if _is_ids(prompt):
        _require_start(prompt, seq, cid, "prompt")
        return list(prompt)
    if isinstance(prompt, list) and all(_is_ids(each) for each in prompt):
        for each in prompt:
            _require_start(each, seq, cid, "prompt")
        return list(prompt[0]) if len(prompt) == 1 else None
    raise BadRequest(
        "prompt: where a snapshot is named, expected nothing or token ids that start with the snapshot's, got text; "
        "after a checkout, a text whose tokens start so goes on from it without naming it",
        param="prompt",
    )


def _fill_chat(body: dict[str, Any], transfer: dict[str, Any], seq: LogicalSeq, cid: str) -> list[int]:
    """Put the prompt's ids where vLLM takes them instead of rendering the messages, or check them."""
    messages = body.get("messages")
    ids = transfer.get("prompt_token_ids")
    texts = messages if isinstance(messages, list) else []
    if ids is None and messages:
        raise BadRequest(
            "messages: must be left out or empty where a snapshot is named without kv_transfer_params.prompt_token_ids;"
            " after a checkout, a chat whose tokens start with the snapshot's goes on from it without naming it",
            param="messages",
        )
    if body.get("echo") or any(not isinstance(message, dict) or _has_more_than_text(message) for message in texts):
        raise BadRequest(  # vLLM would render the messages after all
            "messages: only texts, and no echo, where a snapshot is named", param="messages"
        )
    if not messages:
        body["messages"] = [{"role": "user", "content": ""}]  # never rendered; vLLM asks for one
    if ids is None:
        ids = transfer["prompt_token_ids"] = list(seq.token_ids)
    elif not _is_ids(ids):
        raise BadRequest(
            f"kv_transfer_params.prompt_token_ids: expected token ids, got {ids!r:.80}",
            param="kv_transfer_params.prompt_token_ids",
        )
    _require_start(ids, seq, cid, "kv_transfer_params.prompt_token_ids")
    return list(ids)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _has_more_than_text(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return any(not isinstance(part, str | dict) or (isinstance(part, dict) and "text" not in part) for part in parts)


def _require_start(ids: Sequence[int], seq: LogicalSeq, cid: str, param: str) -> None:
    known = seq.token_ids
    if tuple(ids[: len(known)]) == known:
        return
    same = next((n for n, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids)))
    raise BadRequest(
        f"{param}: must be left out, or start with the {len(known)} token ids of sequence {seq.id!r} of {cid}; it has "
        f"{len(ids)} ids, and {same} of them agree",
        param=param,
    )


def _carry_sampling(body: dict[str, Any], seq: LogicalSeq, *, is_exact: bool) -> None:
    """Sampling parameters that are left out go on as they were; ``min_tokens`` only exactly where the sequence stood,
    since the engine counts them from the first prompt then."""
    sampling = seq.state.get("sampling")
    if not isinstance(sampling, dict):
        return
    for name in (*_CARRIED, *(("min_tokens",) if is_exact else ())):
        if body.get(name) is None and sampling.get(name) not in (None, [], ""):
            body[name] = sampling[name]
