"""Request bodies of the mock server: as vLLM takes them, so that a client meant for vLLM need not be changed.

What a mock engine has no use for (temperature, penalties, response formats) is passed over. Tools and tool calls become
text of the prompt: they are part of what real engines cache.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, TypeVar

from msgspec import Meta
from starlette.requests import Request

from kvist.server.schema import ChatBody, CompletionBody, convert, parse_object, read_bytes

_Least = Annotated[int, Meta(ge=0, lt=2**31)]
_NOT_OURS: Final = frozenset({"kv_transfer_params", "kvist"})
_OF_MESSAGES: Final = frozenset({"role", "content", "name"})


class MockCompletionBody(CompletionBody, kw_only=True):
    """``POST /v1/completions``."""

    min_tokens: _Least = 0


class MockChatBody(ChatBody, kw_only=True):
    """``POST /v1/chat/completions``."""

    min_tokens: _Least = 0


MockBody = MockCompletionBody | MockChatBody
_Body = TypeVar("_Body", MockCompletionBody, MockChatBody)


async def read_mock_body(request: Request, body: type[_Body], limit: int) -> _Body:
    """Read a body, passing over what is not known.

    Raises:
        BodyTooLarge: over ``limit`` bytes.
        BadRequest: not JSON, or a known field that cannot be right; names it.
    """
    return decode_mock_body(parse_object(await read_bytes(request, limit)), body)


def decode_mock_body(document: dict[str, Any], body: type[_Body]) -> _Body:
    """See `read_mock_body`."""
    known = {
        name: value
        for name, value in document.items()
        if name in body.__struct_fields__ and name not in _NOT_OURS and not (name == "min_tokens" and value is None)
    }
    if issubclass(body, ChatBody) and isinstance(document.get("messages"), list):
        plain: list[Any] = [_message(entry) for entry in document["messages"]]
        tools = document.get("tools")
        known["messages"] = [{"role": "system", "content": _json(tools)}, *plain] if tools else plain
    return convert(known, body)


def _message(entry: Any) -> Any:
    """A message with what it holds beside its text as more text."""
    if not isinstance(entry, dict):
        return entry
    message = {name: value for name, value in entry.items() if name in _OF_MESSAGES}
    more = {
        name: value for name, value in entry.items() if name not in _OF_MESSAGES and value not in (None, "", [], {})
    }
    if not more:
        return message
    content = message.get("content")
    if isinstance(content, list):
        return message | {"content": [*content, {"type": "text", "text": _json(more)}]}
    return message | {"content": f"{content or ''}{_json(more)}" if isinstance(content, str | None) else content}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
