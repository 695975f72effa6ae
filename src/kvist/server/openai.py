"""The OpenAI-compatible routes: models, completions, chat completions. Knows HTTP; puts the other modules together."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from kvist.errors import NotFound
from kvist.ids import short
from kvist.server.answers import Answer, ChatAnswer, CompletionAnswer
from kvist.server.delivery import deliver, require_consistent
from kvist.server.errors import BadRequest
from kvist.server.generation import Generation, sequence_ids
from kvist.server.lanes import Lanes
from kvist.server.plan import Plan, Served, make_plan
from kvist.server.schema import ChatBody, CompletionBody, read_body
from kvist.server.wire import json_response

_REMEMBERED: Final = 10_000
_ID_MAX: Final = 200
_RESUMES: Final = 3
"""Times to check a sequence out and submit; between the two, the engine may evict it for want of room."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A request, for those who ask for its sequences later.

    Attributes:
        sequences: what they are called in the engine.
        started: set when the engine lists them, or they have ended.
    """

    sequences: tuple[str, ...]
    started: asyncio.Event


class Requests:
    """The last requests, by our id and by the id that the client gave in ``X-Request-Id``."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Remembered] = OrderedDict()

    def remember(self, names: list[str], generation: Generation) -> None:
        """Note a request under its names; of two with one name, the later counts."""
        ids = tuple(choice.sequence_id for choice in generation.choices)
        for name in names:
            self._known[name] = Remembered(ids, generation.started)
            self._known.move_to_end(name)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def find(self, name: str) -> Remembered:
        """The request of that name, or raise `NotFound`."""
        found = self._known.get(name)
        if found is None:
            raise NotFound(f"no request {name!r:.200} is known here")
        return found


class OpenAI:
    """The endpoints, over one served engine."""

    def __init__(self, served: Served, requests: Requests) -> None:
        self._served, self._requests = served, requests
        self._created = int(time.time())
        self._lanes = Lanes()
        self._fingerprint = short(served.engine.layout.fingerprint)

    async def models(self, _: Request) -> Response:
        """``GET /v1/models``."""
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{model}``."""
        if request.path_params["model"] != self._served.name:
            raise NotFound(f"this server has no model {request.path_params['model']!r:.200}")
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        served = self._served
        about = {"id": served.name, "object": "model", "created": self._created, "owned_by": "kvist"}
        return about | {"max_model_len": served.engine.max_model_len}

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = await read_body(request, CompletionBody, self._served.body_max)
        return await self._answer(request, body, "cmpl-")

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        body = await read_body(request, ChatBody, self._served.body_max)
        return await self._answer(request, body, "chatcmpl-")

    async def _answer(self, request: Request, body: CompletionBody | ChatBody, prefix: str) -> Response:
        require_consistent(body)
        client_id = request.headers.get("x-request-id")
        if client_id is not None and len(client_id) > _ID_MAX:  # it is remembered
            raise BadRequest(f"X-Request-Id: expected at most {_ID_MAX} characters, got {len(client_id)}")
        plan, generation = await self._submit(prefix, client_id, body)
        answer = self._shape(generation.id, body, plan)
        headers = {"X-Request-Id": client_id or generation.id}
        watched = self._served.recent.watch(
            generation,
            id=generation.id,
            kind="chat" if isinstance(body, ChatBody) else "completion",
            begun_with=_begun_with(plan),
            prompts=plan.prompts,
        )
        return await deliver(request, body, answer, watched, len(plan.prompts), headers)

    async def _submit(
        self, prefix: str, client_id: str | None, body: CompletionBody | ChatBody
    ) -> tuple[Plan, Generation]:
        served = self._served
        for attempt in range(_RESUMES):
            # New names each time: copies that were cancelled may still hold theirs.
            request_id = prefix + uuid.uuid4().hex
            plan = await self._lanes.run(partial(make_plan, served, body), served.offer.lane(body.kv_transfer_params))
            if plan.session is not None:
                served.sessions.set_head(sequence_ids(request_id, len(plan.starts)), plan.session.cid)
            generation = Generation(request_id, plan.starts, served.decode, body.stops)
            self._requests.remember([request_id, *filter(None, [client_id])], generation)
            try:
                lane = None if plan.cartridge is None else plan.cartridge.identity
                await self._lanes.run(partial(generation.submit, served.engine), lane)
            except NotFound:
                if plan.session is None or attempt == _RESUMES - 1:
                    raise
            else:
                return plan, generation
        raise AssertionError("unreachable")

    def _shape(self, request_id: str, body: CompletionBody | ChatBody, plan: Plan) -> Answer:
        prompts = [start.token_ids for start in plan.starts]
        shape = ChatAnswer if isinstance(body, ChatBody) else CompletionAnswer
        return shape(
            id=request_id,
            created=int(time.time()),
            model=self._served.name,
            fingerprint=self._fingerprint,
            tokenizer=self._served.tokenizer,
            prompts=prompts,
            logprobs=body.logprobs is not None and body.logprobs is not False,
            token_ids=bool(body.return_token_ids),
            names_ids=bool(body.return_tokens_as_token_ids),
            logits=body.wants_logits,
            transfer={} if plan.cartridge is None else {"cartridge": plan.cartridge.to_dict()},
            echo=[self._echo(body, ids) for ids in prompts] if isinstance(body, CompletionBody) and body.echo else (),
        )

    def _echo(self, body: CompletionBody, ids: Any) -> str:
        return body.prompt if isinstance(body.prompt, str) and body.prompt else self._served.decode(ids)


def _begun_with(plan: Plan) -> str:
    """What a request went on from, for people."""
    if plan.session is not None:
        return short(plan.session.cid)
    return "" if plan.cartridge is None else plan.cartridge.cartridge_id
