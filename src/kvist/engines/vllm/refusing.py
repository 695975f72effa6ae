"""kvist's errors as those of vLLM that its servers answer with a status. Knows both; must not know who raises them."""

from __future__ import annotations

from typing import Final

import vllm.exceptions
from vllm.exceptions import VLLMNotFoundError, VLLMServerError, VLLMValidationError

from kvist.errors import CartridgeNotReady, InvalidInput, KvistError, LayoutMismatch, NotFound

_RetryableRequestError: Final[type[Exception] | None] = getattr(vllm.exceptions, "RetryableRequestError", None)
"""503; older vLLM has none, and says 500."""


def refusal(error: KvistError) -> Exception:
    """``error`` as vLLM's servers tell it: 404, 400, 503 or 500."""
    message = f"{error} ({error.hint})" if error.hint else str(error)
    kind: type[Exception] = VLLMServerError
    if isinstance(error, NotFound):
        kind = VLLMNotFoundError
    elif isinstance(error, InvalidInput | LayoutMismatch):
        kind = VLLMValidationError
    elif isinstance(error, CartridgeNotReady) and _RetryableRequestError is not None:
        kind = _RetryableRequestError
    return kind(message)
