"""Every route of every surface, by every kind of caller; and what a browser may be made to send."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp

from kvist.engines.hf import Engine, HfPager, SamplingParams
from kvist.errors import KvistError
from kvist.repo import Repository
from kvist.server import Tokenizer, bind, create_app
from kvist.server.access import Access, Guard, Unguarded, is_loopback
from kvist.server.cartridges import cartridge_routes
from kvist.server.mock.cluster import rule_of as mock_rule_of
from kvist.server.routes import ROUTES, find_rule
from kvist.server.seeing import Seeing
from kvist.server.tenants import TenantApps
from kvist.server.tokens import Scope, Tokens, add_token
from kvist.server.ui.app import create_ui
from kvist.server.vllm import endpoint_plugin
from kvist.server.vllm.dialect import VLLM
from kvist.store import MemoryStore

CALLERS = {
    "nobody": None,
    "read": (Scope.READ, None),
    "write": (Scope.WRITE, None),
    "admin": (Scope.ADMIN, None),
    "tenant-read": (Scope.READ, "acme"),
    "tenant-write": (Scope.WRITE, "acme"),
    "tenant-admin": (Scope.ADMIN, "acme"),
}


def routes_of(app: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Method and path of every route."""
    found: list[BaseRoute] = app.routes
    for route in found:
        if isinstance(route, Mount):
            yield from routes_of(route, prefix + route.path)
        elif isinstance(route, Route):
            yield from ((method, prefix + route.path) for method in sorted(route.methods or ()) if method != "HEAD")


async def answer(request: Request) -> Response:
    return JSONResponse({"answered": request.url.path})


def opened(app: Any) -> Starlette:
    """An application with the routes of ``app``, which does nothing."""
    return Starlette(routes=[Route(path, answer, methods=[method]) for method, path in routes_of(app)])


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[Tokens, dict[str, str]]:
    path = tmp_path / "tokens.json"
    texts = {name: add_token(path, name, who[0], tenant=who[1]) for name, who in CALLERS.items() if who is not None}
    return Tokens(path), texts


@pytest.fixture
def surfaces(engine: Engine, model_dir: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The application of each surface, as it is served."""
    from kvist.engines.mock import MockEngine
    from kvist.server.mock import letter_tokenizer
    from kvist.server.mock.app import Served
    from kvist.server.mock.app import create_app as create_mock
    from kvist.server.mock.letters import sayable
    from kvist.server.mock.metrics import Metrics
    from kvist.server.mock.speech import Voice
    from kvist.sim.config import EngineConfig

    with Repository.init(MemoryStore()) as repo:
        served = create_app(
            engine, repo, pager=HfPager, params=SamplingParams, tokenizer=Tokenizer.load(model_dir),
            seeing=Seeing(may_write=True),
        )  # fmt: skip
        served.router.routes += cartridge_routes(lambda: None)  # type: ignore[arg-type,return-value]
        served.router.routes.append(Route("/v1/kvist/stats", answer))
        words = letter_tokenizer()
        voice = Voice(name="mock", tokenizer=words, vocabulary=sayable(words), seed=0, mean_tokens=None)
        metrics = Metrics("mock")
        mock = create_mock(Served(engine=MockEngine(EngineConfig(), observer=metrics), voice=voice, metrics=metrics))
        vllm = Starlette(routes=[Route(path, answer, methods=["POST"]) for path in VLLM_ROUTES])
        endpoint_plugin().attach_router(vllm)
        yield {"serve": served, "ui": create_ui(repo, Seeing(may_write=True)), "mock": mock, "vllm": vllm}


VLLM_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/sleep", "/collective_rpc")


def expected(rule: Any, who: tuple[Scope, str | None] | None) -> int | None:
    """Which refusal a caller must get; ``None``: none."""
    if rule.scope is Scope.OPEN:
        return None
    if who is None:
        return 401
    return 403 if who[0] < rule.scope or (who[1] is not None and not rule.for_tenants) else None


def fill(path: str) -> str:
    return re.sub(r"{[^}]*}", "x", path)


def ask(app: ASGIApp, *requests: tuple[str, str, dict[str, str]]) -> list[httpx2.Response]:
    async def go() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return [await http.request(method, path, headers=headers) for method, path, headers in requests]

    return asyncio.run(go())


@pytest.mark.parametrize("surface", ["serve", "ui", "mock", "vllm"])
def test_every_route_by_every_scope(
    surface: str, surfaces: dict[str, Any], tokens: tuple[Tokens, dict[str, str]]
) -> None:
    app, (file, texts) = surfaces[surface], tokens
    rules: Callable[[str, str], Any] = {"vllm": VLLM.rule_of, "mock": mock_rule_of}.get(surface, find_rule)
    found = sorted(set(routes_of(app)))
    assert len(found) > 3
    if surface != "vllm":
        undeclared = [route for route in found if route not in ROUTES]
        assert not undeclared, "declare the scope of these routes in kvist.server.routes"
    guard = Guard(opened(app), Access(file), rules=rules)
    table = []
    for method, path in found:
        rule = rules(method, fill(path))
        for name, who in CALLERS.items():
            given = {"Authorization": f"Bearer {texts[name]}"} if who is not None else {}
            (got,) = ask(guard, (method, fill(path), given))
            refusal = expected(rule, who)
            assert got.status_code == (refusal or 200), (method, path, name, got.text)
            if refusal is not None:
                assert set(got.json()["error"]) == {"message", "type", "param", "code"}
                assert got.json()["error"]["code"] == {401: "unauthorized", 403: "forbidden"}[refusal]
                assert ("www-authenticate" in got.headers) == (refusal == 401)
                assert not any(text in got.text for text in texts.values())
            table.append((method, path, name, got.status_code))
            if surface == "mock" and rule.scope is not Scope.OPEN and name.startswith("tenant"):
                assert got.status_code == 403  # its engines keep no caches apart
    assert {status for *_, status in table} >= {200, 401}


def test_what_a_scope_lets_one_do() -> None:
    """The table, by hand, for the routes that matter most."""
    for (method, path), scope in {
        ("GET", "/v1/processfork/lineage"): Scope.READ,
        ("GET", "/v1/processfork/snapshots/main"): Scope.READ,
        ("POST", "/v1/completions"): Scope.WRITE,
        ("POST", "/v1/processfork/snapshot"): Scope.WRITE,
        ("DELETE", "/v1/processfork/sequences/a/b"): Scope.WRITE,
        ("POST", "/v1/kvist/cartridges"): Scope.ADMIN,
        ("DELETE", "/v1/kvist/cartridges/a"): Scope.ADMIN,
        ("GET", "/health"): Scope.OPEN,
    }.items():
        rule = find_rule(method, path)
        assert rule is not None and rule.scope is scope
    for method, path in [("GET", "/metrics"), ("POST", "/v1/kvist/cartridges"), ("GET", "/v1/kvist/stats")]:
        rule = find_rule(method, path)
        assert rule is not None and not rule.for_tenants
    mutating = [(key, rule) for key, rule in ROUTES.items() if key[0] != "GET" and rule.scope < Scope.WRITE]
    assert {path for (_, path), _ in mutating} == {
        "/ui/login", "/ui/logout", "/ui/theme", "/tokenize", "/detokenize", "/mock/held",
    }  # fmt: skip
    for method, path in [("POST", "/sleep"), ("GET", "/x"), ("POST", "/ping"), ("PUT", "/v1/models/x")]:
        assert VLLM.rule_of(method, path).scope is Scope.ADMIN  # of vLLM's, what we do not know
    assert VLLM.rule_of("PUT", "/v1/processfork/snapshot").scope is Scope.READ  # ours says 405


def test_a_route_that_nobody_declared_is_answered_to_nobody(tokens: tuple[Tokens, dict[str, str]]) -> None:
    file, texts = tokens
    guard = Guard(Starlette(routes=[Route("/secret", answer)]), Access(file))
    got = ask(guard, ("GET", "/secret", {}), ("GET", "/secret", {"Authorization": f"Bearer {texts['admin']}"}))
    assert [each.status_code for each in got] == [401, 404]
    assert [each.status_code for each in ask(Guard(opened(guard._app), Access()), ("GET", "/secret", {}))] == [404]


def test_how_a_token_may_come(tokens: tuple[Tokens, dict[str, str]]) -> None:
    file, texts = tokens
    app = Guard(Starlette(routes=[Route("/", answer), Route("/version", answer)]), Access(file))
    text = texts["read"]
    for path, headers, status in [
        ("/version", {"Authorization": f"bearer {text}"}, 200),
        ("/version", {"Authorization": f"Basic {text}"}, 401),
        ("/version", {"Authorization": text}, 401),
        ("/version", {"X-Kvist-Token": text, "Authorization": "Bearer another"}, 200),
        ("/version", {"X-Kvist-Token": "wrong", "Authorization": f"Bearer {text}"}, 401),
        ("/", {"Cookie": f"kvist_login_None={text}"}, 401),  # a cookie holds no token (but a word: test_views.py)
        ("/", {"Cookie": "=; ;;\x7f"}, 401),
        ("/", {"Authorization": f"Bearer {text}"}, 200),
        (f"/version?token={text}", {}, 401),
    ]:
        (got,) = ask(app, ("GET", path, headers))
        assert got.status_code == status, (path, headers)
    (got,) = ask(app, ("GET", "/?x=1", {"Accept": "text/html,*/*"}))
    assert (got.status_code, got.headers["location"]) == (303, "/ui/login?next=%2F%3Fx%3D1")


def test_no_websocket_is_let_through() -> None:
    sent: list[Any] = []

    async def never(*_: Any) -> None:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(never, Access())({"type": "websocket", "path": "/"}, never, send))  # type: ignore[arg-type]
    assert sent[0]["type"] == "websocket.close"


# -- browsers ------------------------------------------------------------------------------------------------------


def test_a_name_led_to_this_machine_reads_nothing() -> None:
    app = Guard(Starlette(routes=[Route("/version", answer)]), Access())
    good = ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "a.localhost:1", "127.9.9.9"]
    bad = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "[::]",
           "192.168.1.5:8000", "10.0.0.1", "notlocalhost", "evil:127.0.0.1"]  # fmt: skip
    got = ask(app, *[("GET", "/version", {"Host": host}) for host in good + bad])
    assert [each.status_code for each in got] == [200] * len(good) + [403] * len(bad)


def test_another_sites_page_changes_nothing(tokens: tuple[Tokens, dict[str, str]]) -> None:
    file, texts = tokens
    bearer = {"Authorization": f"Bearer {texts['write']}"}
    for access, own, more in ((Access(), "127.0.0.1:8000", {}), (Access(file), "kv.example", bearer)):
        app = Guard(Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])]), access)
        for headers, status in [
            ({}, 200),
            ({"Origin": f"http://{own}"}, 200),
            ({"Origin": f"https://{own.upper()}"}, 200),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": f"http://{own}.evil.example"}, 403),
            ({"Origin": ""}, 403),
            ({"Origin": "http://["}, 403),
            ({"Origin": "http://[::1"}, 403),
            ({"Sec-Fetch-Site": "same-origin"}, 200),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-site"}, 403),
        ]:
            (got,) = ask(app, ("POST", "/v1/completions", {"Host": own, **headers, **more}))
            assert got.status_code == status, (headers, got.text)


# -- listening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_tokens_it_listens_on_this_machine_only(host: str) -> None:
    with pytest.raises(Unguarded, match="without tokens") as refused:
        bind(host, 0)
    assert refused.value.kind == "unguarded" and "kvist token add" in (refused.value.hint or "")
    try:
        listener = bind(host, 0, guarded=True)
    except KvistError as error:  # a machine without IPv6
        assert host == "::" and not isinstance(error, Unguarded)
    else:
        listener.close()


def test_this_machine_by_any_name() -> None:
    for host in ("127.0.0.1", "localhost"):
        bind(host, 0).close()
    assert [is_loopback(host) for host in ("::1", "[::1]", "::ffff:127.0.0.1", "localhost.", "127.1.2.3")] == [True] * 5
    assert [is_loopback(host) for host in ("", "0.0.0.0", "::", "example", "::ffff:8.8.8.8", "128.0.0.1")] == [
        False
    ] * 6


# -- tenants' applications -----------------------------------------------------------------------------------------


def test_each_tenant_has_its_own_application(tokens: tuple[Tokens, dict[str, str]]) -> None:
    file, texts = tokens
    made = []

    def app_called(name: str) -> ASGIApp:
        async def tell(_: Request) -> Response:
            return JSONResponse(name)

        return Starlette(routes=[Route("/version", tell), Route("/health", tell)])

    def make(name: str) -> ASGIApp:
        made.append(name)
        return app_called(name)

    guard = Guard(TenantApps(app_called("default"), make), Access(file))
    read, tenant = ({"Authorization": f"Bearer {texts[name]}"} for name in ("read", "tenant-read"))
    got = ask(
        guard,
        ("GET", "/version", read),
        ("GET", "/version", tenant),
        ("GET", "/version", tenant),
        ("GET", "/health", tenant),
    )
    assert [each.json() for each in got] == ["default", "acme", "acme", "default"]
    assert made == ["acme"]


def test_the_description_tells_of_every_route_and_body(surfaces: dict[str, Any]) -> None:
    (got,) = ask(surfaces["serve"], ("GET", "/openapi.json", {}))
    document = got.json()
    assert document["openapi"] == "3.1.0"
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert ("POST", "/v1/completions") in told and ("DELETE", "/v1/processfork/sequences/{id}") in told
    assert ("GET", "/v1/kvist/cartridges") not in told  # this server had none when it was made
    schemas = document["components"]["schemas"]
    assert {"CompletionBody", "ChatBody", "SnapshotBody", "ForkBody", "CheckoutBody", "Error"} <= schemas.keys()
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(document)):
        assert name in schemas
    assert document["paths"]["/health"]["get"]["security"] == []
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"token": ["write"]}]
