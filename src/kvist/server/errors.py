"""From errors to HTTP: the one table, and OpenAI's envelope. Knows error classes; must not know routes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvist.errors import (
    AccessDenied,
    AlreadyExists,
    CartridgeNotReady,
    CartridgeTooLarge,
    Conflict,
    EngineError,
    IntegrityError,
    InvalidCartridge,
    InvalidInput,
    InvalidManifest,
    KvistError,
    LayoutMismatch,
    NotFound,
    PageNameMismatch,
    PoolExhausted,
    ResidencyFull,
    StoreError,
    StoreFull,
    Unauthorized,
    UnsupportedModel,
)

log = logging.getLogger("kvist.server")


class BadRequest(InvalidInput):
    """A request that cannot be right.

    Attributes:
        param: the field concerned, as a path (``messages[0].content``), or ``None``.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLarge(InvalidInput):
    """A request body over the server's limit."""

    kind = "body_too_large"


class NoConnector(EngineError):
    """An engine that was started without kvist's connector, or without its plugin."""

    kind = "no_connector"


STATUS: Final[dict[type[KvistError], int]] = {
    InvalidInput: 400,
    BodyTooLarge: 413,
    InvalidManifest: 422,
    InvalidCartridge: 422,
    Unauthorized: 401,
    AccessDenied: 403,
    NotFound: 404,
    AlreadyExists: 409,
    Conflict: 409,
    LayoutMismatch: 409,
    PageNameMismatch: 409,
    IntegrityError: 500,
    StoreError: 503,
    StoreFull: 507,
    EngineError: 503,
    PoolExhausted: 503,
    ResidencyFull: 503,
    UnsupportedModel: 501,
    NoConnector: 501,
    KvistError: 500,
}
"""HTTP status by error class; a class that is not here has its nearest base's."""

Envelope = Callable[[Exception], dict[str, Any]]
"""How an error is told: `envelope`, or another server's form."""

_RETRY_AFTER_S: Final = "1"
_CHALLENGE: Final = 'Bearer realm="kvist"'
_HTTP_KINDS: Final = {404: "not_found", 405: "method_not_allowed"}


def status_of(error: KvistError) -> int:
    """The status of the most special class of ``error`` that the table holds."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def is_passing(error: KvistError) -> bool:
    """Whether the same request may succeed in a moment."""
    passes = isinstance(error, PoolExhausted | ResidencyFull | CartridgeNotReady)
    return passes and not isinstance(error, CartridgeTooLarge)


def envelope(error: Exception) -> dict[str, Any]:
    """``error`` in OpenAI's form. A bug of ours keeps its details to the log."""
    if isinstance(error, KvistError):
        hint = f" ({error.hint})" if error.hint else ""
        return _envelope(status_of(error), f"{error}{hint}", error.kind, getattr(error, "param", None))
    if isinstance(error, HTTPException):
        kind = _HTTP_KINDS.get(error.status_code, "http")
        return _envelope(error.status_code, error.detail, kind, None)
    return _envelope(500, "internal error; the server's log has the traceback", "internal", None)


def error_response(error: Exception, form: Envelope = envelope) -> Response:
    """The answer to a request that failed with ``error``; one that is a bug of ours is logged with its traceback."""
    headers: dict[str, str]
    if isinstance(error, KvistError):
        status = status_of(error)
        headers = {"Retry-After": _RETRY_AFTER_S} if is_passing(error) else {}
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = _CHALLENGE
        if status >= 500:
            log.warning("%s: %s", error.kind, error)
    elif isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
    else:
        status, headers = 500, {}
        log.error("a request failed", exc_info=error)
    return Response(msgspec.json.encode(form(error)), status, headers, "application/json")


def _envelope(status: int, message: str, kind: str, param: str | None) -> dict[str, Any]:
    family = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": family, "param": param, "code": kind}}
