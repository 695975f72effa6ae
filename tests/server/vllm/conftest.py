"""A stand-in for vLLM's API server: the plugin on a Starlette application, over a fake engine and a real repository."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.repo import Repository
from kvist.server.vllm import endpoint_plugin
from kvist.testing.vllm_core import FakeEngineClient
from server.conftest import error_of

PATH = "/v1/processfork"
ARGS = SimpleNamespace(host="127.0.0.1", api_key=None, uds=None)
IDS = [7, 1, 4, 9, 2, 6, 5, 3, 8, 11, 12]


class Authentication:
    """As vLLM's: added after plugins, so outside them."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path.startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if given != f"Bearer {self.key}".encode():
                return await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        return await self.app(scope, receive, send)


async def echo(request: Request) -> Response:
    """Stands for vLLM's own routes: answers with what reached them."""
    body = await request.body()
    about = {"x-body-length": str(len(body)), "x-headers": json.dumps(dict(request.headers))}
    return Response(body, headers=about, media_type="application/octet-stream")


def make_app(*routes: Route, key: str | None = None) -> tuple[Starlette, Any]:
    """vLLM's application with the plugin in it, put together in vLLM's order."""
    app = Starlette(
        routes=[
            *routes,
            Route("/v1/completions", echo, methods=["POST"]),
            Route("/v1/chat/completions", echo, methods=["POST"]),
            Route("/v1/embeddings", echo, methods=["POST"]),
        ]
    )
    plugin = endpoint_plugin()
    plugin.attach_router(app)
    if key is not None:
        app.add_middleware(Authentication, key=key)
    return app, plugin


class Live:
    """One server: its engine, its repository, and a client. Synchronous; `run` steps its event loop."""

    def __init__(self, engine: FakeEngineClient, app: ASGIApp, runner: asyncio.Runner, store: Path) -> None:
        self.engine, self.app, self.runner, self.store = engine, app, runner, store
        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1")

    def run(self, work: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await work

        return self.runner.run(wait())

    def post(self, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        return self.run(self.http.post(path, json=body, headers=headers))

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.run(self.http.get(path, headers=headers))

    def ask(self, what: str, **body: Any) -> Any:
        """The answer to a call that must succeed."""
        answer = self.post(f"{PATH}/{what}", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def complete(self, snapshot: str, *, chat: bool = False, **body: Any) -> Any:
        """What reaches vLLM of a request that names a snapshot."""
        transfer = {"snapshot": snapshot, **body.pop("transfer", {})}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        answer = self.post(path, {"model": "m", "kv_transfer_params": transfer, **body})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-body-length"] == str(len(answer.content))
        return answer.json()

    def settle(self) -> None:
        """Let what runs in the background come to its end."""

        async def wait() -> None:
            me = asyncio.current_task()
            while others := [task for task in asyncio.all_tasks() if task is not me]:
                await asyncio.wait(others)

        self.runner.run(wait())

    def repo(self) -> Repository:
        return Repository.open(str(self.store), create=True)


class AsgiCall:
    """One request driven by hand: bodies in pieces, disconnects, streams."""

    def __init__(self, path: str, *, method: str = "POST", headers: dict[str, str] | None = None) -> None:
        given = {"content-type": "application/json"} | (headers or {})
        self.scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1), "server": ("vllm", 80),
        }  # fmt: skip
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []

    def body(self, data: bytes, *, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def disconnect(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def start(self, app: ASGIApp) -> asyncio.Task[None]:
        call: Coroutine[Any, Any, None] = app(self.scope, self.incoming.get, self.send)  # type: ignore[assignment]
        return asyncio.create_task(call)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def data(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def serve(runner: asyncio.Runner, tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Starts a server; several in one test share the store."""
    engines = []

    def serve(*args: Any, app: tuple[Starlette, Any] | None = None, store: Path | None = None, **settings: Any) -> Live:
        place = store or tmp_path / "store"
        engine = FakeEngineClient(str(place), *args, **settings)
        engines.append(engine)
        made, plugin = app or make_app()
        runner.run(plugin.init_state(engine, made.state, ARGS))
        return Live(engine, made, runner, place)

    yield serve
    for engine in engines:
        engine.close()


@pytest.fixture
def live(serve: Callable[..., Live]) -> Live:
    """One server with a finished request ``cmpl-a-0``, which has `IDS`."""
    live = serve()
    live.engine.add("cmpl-a-0", IDS, sampling={"temperature": 0.5, "seed": 3, "stop": [], "min_tokens": 20})
    return live


__all__ = ["IDS", "PATH", "AsgiCall", "Live", "error_of", "make_app"]
