"""How vLLM takes kvist in: its endpoint plugin, and a middleware for versions that know no such plugins.

Knows how vLLM's API server is put together (0.28 to 0.32); duck-typed, without vllm. Puts `kvist.server.live` together.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from typing import Any, Final

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvist.errors import EngineError, KvistError
from kvist.server.access import path_of
from kvist.server.cartridges import cartridge_routes
from kvist.server.errors import NoConnector, error_response
from kvist.server.live.api import routes
from kvist.server.live.gate import Door, Gate, Listening
from kvist.server.live.metrics import metered
from kvist.server.live.resume import Resume, may_name_a_snapshot
from kvist.server.live.snapshots import Snapshots
from kvist.server.routing import application
from kvist.server.schema import BODY_MAX
from kvist.server.tokens import FILE as TOKENS
from kvist.server.tokens import closed
from kvist.server.vllm.cartridges import Cartridges
from kvist.server.vllm.client import EngineClient, VllmEngine
from kvist.server.vllm.dialect import VLLM
from kvist.server.wire import json_response

log = logging.getLogger("kvist.server")

PREFIX: Final = "/v1/processfork"
CARTRIDGES_PREFIX: Final = "/v1/kvist"


class EndpointPlugin:
    """vLLM's ``EndpointPlugin`` (from 0.26): the routes and the middleware, inside its authentication.

    Attributes:
        name: must be named in ``VLLM_PLUGINS``.
        required_tasks: without these there is nothing to snapshot.
    """

    name = "kvist"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._snapshots = Snapshots()
        self._cartridges = Cartridges()
        self._door = Door(VLLM)
        self._opening: asyncio.Task[None] | None = None

    def attach_router(self, app: Any) -> None:
        """Add routes and middleware to vLLM's FastAPI application.

        What is added now comes to lie inside all middleware that vLLM adds later, authentication among it.
        """
        self._door.configure(os.environ.get(TOKENS), None)
        app.mount(PREFIX, metered(routes(self._snapshots), prefix=PREFIX))
        app.mount(CARTRIDGES_PREFIX, metered(routes_of_cartridges(self._cartridges), prefix=CARTRIDGES_PREFIX))
        app.add_middleware(Resume, snapshots=self._snapshots, door=self._door)
        app.add_middleware(Gate, door=self._door, salt_of=self._snapshots.salt_of)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Any) -> None:
        """Take the engine, and begin to open the repository. A store out of reach does not keep the server down.

        Raises:
            KvistError: there is to be a tokens file, and it cannot be used; the server does not start.
        """
        self._door.configure(_tokens_file(engine_client), _listening(args))
        if self._door.refusal is not None:
            log.warning("%s", self._door.refusal)
        self._snapshots.attach(_engine(engine_client))
        self._cartridges.attach(engine_client)
        if engine_client is not None:
            self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        try:
            await self._snapshots.open()
        except KvistError as error:
            hint = f" ({error.hint})" if error.hint else ""
            is_meant = isinstance(error, NoConnector) and self._cartridges.is_served
            log.log(logging.DEBUG if is_meant else logging.WARNING, "snapshots are not available: %s%s", error, hint)
        except Exception:  # the end of a background task: nobody else would tell of it; the next request tries again
            log.exception("snapshots are not available yet")


def endpoint_plugin() -> EndpointPlugin:
    """Entry point ``vllm.endpoint_plugins: kvist``."""
    return EndpointPlugin()


class KvistMiddleware:
    """The same as ASGI middleware, ``--middleware kvist.server.vllm.KvistMiddleware``, for older vLLM.

    Middleware that is added so lies outside vLLM's authentication: it asks for the API key itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._snapshots = Snapshots()
        self._cartridges = Cartridges()
        self._routes = metered(routes(self._snapshots, prefix=PREFIX))
        self._routes_of_cartridges = metered(routes_of_cartridges(self._cartridges, prefix=CARTRIDGES_PREFIX))
        self._door = Door(VLLM)
        self._resume = Resume(app, self._snapshots, self._door)
        self._gate = Gate(self._inside, self._door, self._snapshots.salt_of)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it pass."""
        if scope["type"] in ("http", "websocket"):
            state = scope["app"].state
            try:
                tokens = _tokens_file(getattr(state, "engine_client", None))
                self._door.configure(tokens, _listening(getattr(state, "args", None)))
            except KvistError as error:
                return await error_response(closed(error))(scope, receive, send)
        return await self._gate(scope, receive, send)

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return await self.app(scope, receive, send)
        path = path_of(scope)
        is_cartridges = path.startswith(f"{CARTRIDGES_PREFIX}/")
        is_ours = is_cartridges or path.startswith(f"{PREFIX}/")
        if not is_ours and not may_name_a_snapshot(scope, VLLM):
            return await self.app(scope, receive, send)
        state = scope["app"].state
        try:
            is_allowed = _has_key(Headers(scope=scope), _tokens(state))
        except KvistError as error:
            return await error_response(error)(scope, receive, send)
        if not is_allowed:  # vLLM says so itself of its own routes
            refusal: ASGIApp = JSONResponse({"error": "Unauthorized"}, 401) if is_ours else self.app
            return await refusal(scope, receive, send)
        engine = getattr(state, "engine_client", None)
        self._snapshots.attach(_engine(engine))
        self._cartridges.attach(engine)
        ours = self._routes_of_cartridges if is_cartridges else self._routes
        return await (ours if is_ours else self._resume)(dict(scope), receive, send)


def routes_of_cartridges(cartridges: Cartridges, *, prefix: str = "", body_max: int = BODY_MAX) -> Starlette:
    """The routes for cartridges, below ``prefix``."""

    async def stats(request: Request) -> Response:
        return json_response(await cartridges.stats())

    more = cartridge_routes(
        cartridges.library, prefix=f"{prefix}/cartridges", body_max=body_max, admit=cartridges.admit
    )
    return application([("GET", f"{prefix}/stats", stats)], more=more)


def _tokens_file(engine: EngineClient | None) -> str | None:
    """The tokens file that is configured."""
    return (VllmEngine(engine).option("tokens") if engine is not None else None) or os.environ.get(TOKENS)


def _engine(client: EngineClient | None) -> VllmEngine | None:
    return None if client is None else VllmEngine(client)


def _listening(args: Any) -> Listening | None:
    """What vLLM's arguments say of where it listens; ``None``: there are none yet."""
    if args is None:
        return None
    host = getattr(args, "host", None)
    has_key = bool(getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY"))
    return Listening(host if isinstance(host, str) else None, bool(getattr(args, "uds", None)), has_key)


# -- the API key -------------------------------------------------------------------------------------------------


def _tokens(state: Any) -> list[bytes]:
    """Digests of the keys that vLLM accepts; none: it asks for none.

    Raises:
        EngineError: it cannot be told.
    """
    args = getattr(state, "args", None)
    if args is None:
        raise EngineError("this version of vLLM does not say whether it asks for an API key")
    keys = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY")
    keys = [keys] if isinstance(keys, str) else keys or []
    return [hashlib.sha256(key.encode()).digest() for key in keys if key]


def _has_key(headers: Headers, tokens: list[bytes]) -> bool:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.encode()).digest()
    found = False
    for token in tokens:  # all of them, so that the time tells nothing
        found |= secrets.compare_digest(digest, token)
    return not tokens or (found and scheme.lower() == "bearer")
