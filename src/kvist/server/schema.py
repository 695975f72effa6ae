"""Request bodies: what may be asked, and the refusal of everything else by name.

Knows JSON and field names. Must not know engines or repositories.

A field that would change the output and that nobody here obeys is refused, never ignored. It passes only with the
value that asks for nothing (``presence_penalty: 0``). A few fields that cannot change the output pass with any value.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request

from kvist.server.errors import BadRequest, BodyTooLarge

BODY_MAX: Final = 32 * 1024 * 1024
"""Default for the largest body, in bytes."""

HARMLESS: Final = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "priority", "request_id",
    }
)  # fmt: skip
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that we know and do not obey, with the values that ask for nothing; ``null`` always does."""

_MESSAGE_NEUTRAL: Final = frozenset(
    {"annotations", "audio", "function_call", "parsed", "reasoning", "reasoning_content", "refusal", "tool_calls"}
)
"""Fields of messages that we know and do not obey. Clients send back empty what an answer brought them empty."""

_Count = Annotated[int, Meta(ge=1, le=128)]
_Length = Annotated[int, Meta(ge=0, lt=2**31)]
_Tops = Annotated[int, Meta(ge=0, le=20)]
_Id = Annotated[int, Meta(ge=0, lt=2**32)]
_Stop = Annotated[str, Meta(min_length=1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class Transfer(Struct, forbid_unknown_fields=True):
    """What to begin with: a sequence of a snapshot, or a cartridge.

    Attributes:
        snapshot: to continue.
        sequence: of the snapshot; may be left out where there is only one.
        cartridge_id: of the cartridge to use; a number is taken for its digits.
        cartridge_label: of the cartridge to use, where the server's router goes by a label.
        cartridge_prefix: see `kvist.cartridge.placing.PrefixMode`.
        others: what else it says, by field: what the server's router may go by.
    """

    snapshot: str | None = None
    sequence: str | None = None
    cartridge_id: str | int | None = None
    cartridge_label: str | int | None = None
    cartridge_prefix: str | None = None
    others: dict[str, str | int] = {}

    def chosen(self) -> dict[str, str | int]:
        """By what it chooses a cartridge: each field that a router may read, and that says something."""
        own = {"cartridge_id": self.cartridge_id, "cartridge_label": self.cartridge_label}
        return {name: value for name, value in (own | self.others).items() if value is not None}


class Extensions(Struct, forbid_unknown_fields=True):
    """What only kvist offers."""

    logits: bool = False


class GenerationBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat completions have in common; ``None``: not given."""

    model: str | None = None
    n: _Count | None = None
    max_tokens: _Length | None = None
    temperature: Annotated[float, Meta(ge=0, lt=1e4)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=64)] | None = None
    stop_token_ids: list[_Id] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    kv_transfer_params: Transfer | None = None
    kvist: Extensions | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings, none to many."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_logits(self) -> bool:
        """Whether every row of logits is to be sent."""
        return self.kvist is not None and self.kvist.logits


class CompletionBody(GenerationBody, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | _Id | list[_Id]] | None = None
    echo: bool | None = None
    logprobs: _Tops | None = None
    add_special_tokens: bool | None = None


class TextPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message; only text has a meaning here."""

    text: str


class Message(Struct, forbid_unknown_fields=True):
    """One message of a chat."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """Its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class ChatBody(GenerationBody, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    max_completion_tokens: _Length | None = None
    logprobs: bool | None = None
    top_logprobs: _Tops | None = None


class SnapshotBody(Struct, forbid_unknown_fields=True):
    """``POST /v1/processfork/snapshot``."""

    name: str | None = None
    request_id: str | None = None
    sequence: str | None = None
    message: str = ""
    branch: str | None = None
    parents: list[str] | None = None


class ForkBody(Struct, forbid_unknown_fields=True):
    """``POST /v1/processfork/fork``."""

    cid: str
    n: int = 1
    name: str | None = None


class CheckoutBody(Struct, forbid_unknown_fields=True):
    """``POST /v1/processfork/checkout``.

    Attributes:
        cid: any rev.
        sequences: only these; ``None``: all.
        preload: bring the pages in now, not when a request needs them. The embedded engine always does.
        verify: read and check every page now. The embedded engine always does.
    """

    cid: str
    sequences: list[str] | None = None
    preload: bool = False
    verify: bool = True


class CartridgeBody(Struct, forbid_unknown_fields=True):
    """``POST /v1/kvist/cartridges``: where a cartridge is, and what it is called here.

    Attributes:
        cartridge_id: default its own.
        path: of a directory or a checkpoint on the server, absolute; with ``manifest_path`` the latter's sidecar.
        store: url of a repository; with ``rev`` the snapshot there.
        hub: a repository of the Hugging Face hub; with ``revision`` its commit.
        labels: for routers, beside its own.
        replace: whether another one of this id may be replaced.
    """

    cartridge_id: str | None = None
    path: str | None = None
    manifest_path: str | None = None
    store: str | None = None
    rev: str | None = None
    hub: str | None = None
    revision: str | None = None
    labels: Annotated[dict[str, str], Meta(max_length=64)] = {}
    replace: bool = False


_Body = TypeVar("_Body", bound=Struct)
_PATH: Final = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)
_FIELD: Final = re.compile(r"(?:unknown|missing required) field `([^`]*)`")


async def read_body(request: Request, body: type[_Body], limit: int) -> _Body:
    """Read and decode a request's JSON body; an empty one counts as ``{}``.

    Raises:
        BodyTooLarge: over ``limit`` bytes.
        BadRequest: not JSON, or not such a body; names the field.
    """
    return decode(await read_bytes(request, limit), body)


async def read_bytes(request: Request, limit: int) -> bytes:
    """Read a request's body.

    Raises:
        BodyTooLarge: over ``limit`` bytes.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise BodyTooLarge(f"expected a body of at most {limit} bytes, got {announced}")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise BodyTooLarge(f"expected a body of at most {limit} bytes, got more")
    return bytes(data)


def decode(data: bytes, body: type[_Body]) -> _Body:
    """Decode a body; see `read_body`."""
    document = parse_object(data)
    if issubclass(body, GenerationBody):
        document = _without_neutral(document, body.__struct_fields__)
        if isinstance(transfer := document.get("kv_transfer_params"), dict):
            document["kv_transfer_params"] = _with_others(transfer)
    if body is ChatBody and isinstance(document.get("messages"), list):
        document["messages"] = [_plain_message(place, entry) for place, entry in enumerate(document["messages"])]
    return convert(document, body)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body; an empty body is an empty one.

    Raises:
        BadRequest: it is none.
    """
    try:
        document = msgspec.json.decode(data or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(document).__name__}")
    return document


def convert(document: dict[str, Any], body: type[_Body]) -> _Body:
    """The body that a JSON object is.

    Raises:
        BadRequest: it is not such a body; names the field.
    """
    try:
        return msgspec.convert(document, body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


def _without_neutral(document: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    kept = {}
    for name, value in document.items():
        if name in known:
            kept[name] = value
        elif name in HARMLESS:
            continue
        elif name not in _NEUTRAL:
            raise BadRequest(f"unknown parameter {name!r:.200}", param=name[:200])
        elif not _asks_for_nothing(name, value):
            raise BadRequest(
                f"{name} is not supported, and changes the output: expected it to be left out, got {value!r:.120}",
                param=name,
            )
    return kept


def _with_others(transfer: dict[str, Any]) -> dict[str, Any]:
    """Put aside the fields that only a router may know. One with a value that no router reads stays, and is refused."""
    known = set(Transfer.__struct_fields__) - {"others"}
    aside = {name: value for name, value in transfer.items() if name not in known and type(value) in (str, int)}
    kept = {name: value for name, value in transfer.items() if name not in aside}
    if "others" in kept:
        raise BadRequest(
            "kv_transfer_params.others: expected text or a whole number", param="kv_transfer_params.others"
        )
    return kept | {"others": aside}


def _plain_message(place: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    for name in _MESSAGE_NEUTRAL & message.keys():
        if message[name] not in (None, "", [], {}):
            path = f"messages[{place}].{name}"
            raise BadRequest(f"{path} is not supported: expected null, got {message[name]!r:.120}", param=path)
    return {name: value for name, value in message.items() if name not in _MESSAGE_NEUTRAL}


def _asks_for_nothing(name: str, value: Any) -> bool:
    # In Python 0 == False; a field that takes numbers must not take booleans for them.
    return value is None or any(
        value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in _NEUTRAL[name]
    )


def _explain(message: str) -> BadRequest:
    path = _PATH.search(message)
    where = path[1] if path else ""
    field = _FIELD.search(message)
    param = ".".join(filter(None, (where, field[1] if field else "")))
    reason = message[: path.start()] if path else message
    return BadRequest(f"{param or 'the body'}: {reason[:1].lower()}{reason[1:]}", param=param or None)
