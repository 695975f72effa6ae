"""Bodies of requests, in a server of vLLM: what they say of cartridges, where it would get lost or come too late.

Besides `kvist.engines.vllm.intake`, which sees every request, and reaches into vLLM as `kvist.engines.vllm.internals`
does, on the same versions.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from vllm.exceptions import VLLMValidationError

from kvist.engines.vllm.cartridges.fields import PREFIX_KEY, wanted_mode
from kvist.engines.vllm.refusing import refusal
from kvist.errors import CartridgeNotReady, KvistError

if TYPE_CHECKING:
    from kvist.engines.vllm.cartridges.frontend import Frontend

Opened = Callable[[], "list[Frontend]"]
"""The front ends of this process that are open."""

_PATIENCE: Final = 5.0
"""Seconds that a server lets a request wait for a cartridge that is being opened."""
_MOMENT: Final = 0.02
_BODIES: Final = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
    ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
)
"""Bodies of requests, by their modules."""


def watch(opened: Opened) -> None:
    """Let front ends see the bodies of this process's requests, if it is a server. Idempotent."""
    _watch_bodies(opened)
    _watch_tokens(opened)
    _let_wait(opened)


def _watch_bodies(opened: Opened) -> None:
    """Look at bodies where what they say would get lost on its way to `generate`, or come there too late.

    Beam search makes requests of its own, which name no cartridge; `/v1/responses` asks the engine when its answer has
    begun; and what raw HTTP nests in ``extra_body``, as only OpenAI's client may, vLLM drops. Only in an API server are
    these modules there, and only there are they needed.
    """
    for module, name in _BODIES:
        body = getattr(sys.modules.get(module), name, None)
        if body is None or hasattr(body.to_sampling_params, "watched"):
            continue
        body.to_sampling_params = _watched(body.to_sampling_params, opened)
        if hasattr(body, "to_beam_search_params"):
            body.to_beam_search_params = _without_cartridge(body.to_beam_search_params, opened)


def _watched(convert: Callable[..., Any], opened: Opened) -> Callable[..., Any]:
    @functools.wraps(convert)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        _unnest(self)
        params = convert(self, *args, **kwargs)
        for frontend in opened():
            _find(frontend, params.extra_args)
        return params

    to_sampling_params.watched = True  # type: ignore[attr-defined]
    return to_sampling_params


def _without_cartridge(convert: Callable[..., Any], opened: Opened) -> Callable[..., Any]:
    @functools.wraps(convert)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        _unnest(self)
        extra = _extra_of(self)
        for frontend in opened():
            if (entry := _find(frontend, extra)) is None:
                continue
            # one that every request uses is found again in each request that the search makes; how it stands is lost
            if _find(frontend, None) != entry:
                raise VLLMValidationError(f"cartridge {entry.cartridge_id!r}: cannot be named in a beam search")
            if wanted_mode(extra) is not None:
                raise VLLMValidationError(f"{PREFIX_KEY}: cannot be said in a beam search")
        return convert(self, *args, **kwargs)

    return to_beam_search_params


def _watch_tokens(opened: Opened) -> None:
    """Let `/inference/v1/generate` tell the engine what its body says, as 0.28 does not, and wait as other routes."""
    if _BODIES[0][0] not in sys.modules:  # not in a server
        return
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    inner = ServingTokens.serve_tokens
    if hasattr(inner, "watched"):
        return

    @functools.wraps(inner)
    async def serve_tokens(self: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
        params = body.sampling_params
        if body.kv_transfer_params is not None:
            params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": body.kv_transfer_params}
        for frontend in opened():
            await _look(frontend, params.extra_args)
        return await inner(self, body, *args, **kwargs)

    serve_tokens.watched = True  # type: ignore[attr-defined]
    ServingTokens.serve_tokens = serve_tokens


def _let_wait(opened: Opened) -> None:
    """Let servers wait a little for what is being opened, where nothing is answered yet and other requests go on.

    Older vLLM has no such place: there, and after `_PATIENCE`, a request is refused and may be sent again.
    """
    if _BODIES[0][0] not in sys.modules:  # not in a server
        return
    try:
        from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    except ImportError:
        return
    inner = getattr(GenerateBaseServing, "_with_kv_transfer_rejection_cleanup", None)
    if inner is None or hasattr(inner, "waits"):
        return

    async def looked(body: Any, answer: Any) -> Any:
        try:
            _unnest(body)
            for frontend in opened():
                await _look(frontend, _extra_of(body))
        except BaseException:
            answer.close()
            raise
        return await answer

    @functools.wraps(inner)
    async def waiting(self: Any, awaitable: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        return await inner(self, looked(request, awaitable), request, *args, **kwargs)

    waiting.waits = True  # type: ignore[attr-defined]
    GenerateBaseServing._with_kv_transfer_rejection_cleanup = waiting


async def _look(frontend: Frontend, extra_args: Mapping[str, Any] | None) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return frontend.look(extra_args)
        except CartridgeNotReady as error:
            if time.monotonic() > deadline:
                raise refusal(error) from error
        except KvistError as error:
            raise refusal(error) from error
        await asyncio.sleep(_MOMENT)


def _find(frontend: Frontend, extra_args: Mapping[str, Any] | None) -> Any:
    try:
        return frontend.find(extra_args)
    except KvistError as error:
        raise refusal(error) from error


def _extra_of(body: Any) -> dict[str, Any]:
    """What a body says besides its prompt, as its sampling parameters will."""
    return {**(getattr(body, "vllm_xargs", None) or {}), "kv_transfer_params": body.kv_transfer_params}


def _unnest(body: Any) -> None:
    nested = (body.model_extra or {}).get("extra_body")
    params = nested.get("kv_transfer_params") if isinstance(nested, dict) else None
    if body.kv_transfer_params is None and isinstance(params, dict):
        body.kv_transfer_params = params
