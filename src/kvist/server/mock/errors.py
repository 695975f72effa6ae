"""Errors in vLLM's form, which differs from ours: the type names the class of the error, the code is the status."""

from __future__ import annotations

from typing import Any, Final

from starlette.exceptions import HTTPException

from kvist.errors import KvistError
from kvist.server.errors import status_of

_TYPES: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


def vllm_envelope(error: Exception) -> dict[str, Any]:
    """``error`` as vLLM 0.32 tells it. A bug of ours keeps its details to the log."""
    if isinstance(error, KvistError):
        status, message = status_of(error), str(error)
    elif isinstance(error, HTTPException):
        return _envelope(error.status_code, error.detail, error.detail, None)
    else:
        status, message = 500, "internal error; the server's log has the traceback"
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return _envelope(status, message, kind, getattr(error, "param", None))


def _envelope(status: int, message: str, kind: str, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
