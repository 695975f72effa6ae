"""The Starlette application of one mock engine: vLLM's routes."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any, Final

from anyio import CapacityLimiter, to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

import kvist
from kvist.engines.mock import MockEngine
from kvist.server.delivery import deliver, require_consistent
from kvist.server.errors import BadRequest
from kvist.server.mock.bodies import MockBody, MockChatBody, MockCompletionBody, decode_mock_body, read_mock_body
from kvist.server.mock.errors import vllm_envelope
from kvist.server.mock.generation import MockChatAnswer, MockCompletionAnswer, MockGeneration
from kvist.server.mock.metrics import Metrics
from kvist.server.mock.speech import Speech, Voice, make_speech
from kvist.server.prompts import prompts_of
from kvist.server.routing import Table, application, version
from kvist.server.schema import BODY_MAX, parse_object, read_bytes
from kvist.server.wire import json_response

_THREADS: Final = 4
"""In which prompts are made ready; all of them want the one interpreter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One mock engine and how it speaks.

    Attributes:
        engine: runs on the loop of the application.
        voice: what it says.
        metrics: observes it.
        body_max: largest body, in bytes.
    """

    engine: MockEngine
    voice: Voice
    metrics: Metrics
    body_max: int = BODY_MAX


def create_app(served: Served) -> Starlette:
    """The application. Who owns the engine runs and closes it."""
    api = _Api(served)
    table: Table = [
        ("GET", "/health", api.health),
        ("GET", "/ping", api.health),
        ("GET", "/version", version),
        ("GET", "/metrics", api.metrics),
        ("GET", "/v1/models", api.models),
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/mock/held", api.held),
    ]
    return application(table, form=vllm_envelope)


class _Api:
    """The endpoints."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._created = int(time.time())
        self._limiter: CapacityLimiter | None = None

    async def health(self, _: Request) -> Response:
        """``GET /health``: an empty answer, as vLLM's."""
        return Response()

    async def metrics(self, _: Request) -> Response:
        """``GET /metrics``."""
        return Response(self._served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _: Request) -> Response:
        """``GET /v1/models``."""
        name = self._served.voice.name
        about = {"id": name, "object": "model", "created": self._created, "owned_by": "kvist", "root": name}
        card = about | {"parent": None, "max_model_len": self._served.engine.max_model_len}
        return json_response({"object": "list", "data": [card]})

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = await read_mock_body(request, MockCompletionBody, self._served.body_max)
        return await self._answer(request, body, "cmpl-")

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        body = await read_mock_body(request, MockChatBody, self._served.body_max)
        return await self._answer(request, body, "chatcmpl-")

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``: the ids of a prompt or of a chat."""
        ids = await self._prompt(request)
        longest = self._served.engine.max_model_len
        return json_response({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": None})

    async def held(self, request: Request) -> Response:
        """``POST /mock/held``: how much of a prompt is in the cache now."""
        ids = await self._prompt(request)
        blocks, size = self._served.engine.num_held(ids), self._served.engine.config.block_size
        return json_response({"blocks": blocks, "tokens": blocks * size, "block_size": size})

    async def _prompt(self, request: Request) -> list[int]:
        """Ids of the one prompt in a body."""
        document = parse_object(await read_bytes(request, self._served.body_max))
        kind: type[Any] = MockChatBody if "messages" in document else MockCompletionBody
        body: MockBody = decode_mock_body(document, kind)
        prompts = prompts_of(self._served.voice.tokenizer, body)
        if len(prompts) != 1 or not prompts[0]:
            raise BadRequest("prompt: expected one prompt that is not empty", param="prompt")
        return prompts[0]

    async def _answer(self, request: Request, body: MockBody, prefix: str) -> Response:
        require_consistent(body)
        served = self._served
        if self._limiter is None:
            self._limiter = CapacityLimiter(_THREADS)
        speech = await to_thread.run_sync(make_speech, served.voice, served.engine, body, limiter=self._limiter)
        client_id = request.headers.get("x-request-id")
        request_id = f"{prefix}{client_id or uuid.uuid4().hex}"
        generation = MockGeneration(served.engine, speech, served.voice.vocabulary, _tops(body))
        answer = self._shape(request_id, body, speech)
        headers = {"X-Request-Id": client_id or request_id}
        return await deliver(request, body, answer, generation, speech.prompts, headers, vllm_envelope)

    def _shape(self, request_id: str, body: MockBody, speech: Speech) -> MockChatAnswer | MockCompletionAnswer:
        voice = self._served.voice
        prompts = [choice.prompt for choice in speech.choices]
        echo = [voice.text(ids) for ids in prompts] if isinstance(body, MockCompletionBody) and body.echo else ()
        shape = (MockChatAnswer if isinstance(body, MockChatBody) else MockCompletionAnswer)(
            id=request_id,
            created=int(time.time()),
            model=voice.name,
            fingerprint=f"kvist-{kvist.__version__}-mock",
            tokenizer=voice.tokenizer,
            prompts=prompts,
            logprobs=body.logprobs is not None and body.logprobs is not False,
            token_ids=bool(body.return_token_ids),
            echo=echo,
        )
        shape.said = speech.choices
        return shape


def _tops(body: MockBody) -> int:
    """Likeliest tokens that the client wants to be told with each."""
    if isinstance(body, MockChatBody):
        return body.top_logprobs or 0 if body.logprobs else 0
    return body.logprobs or 0
