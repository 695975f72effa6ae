"""How vLLM takes kvist in: boot, authentication, the middleware for older versions, an engine without the connector."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import kvist.server.vllm
from kvist import errors
from kvist.errors import KvistError
from kvist.server import schema
from kvist.server.errors import NoConnector, status_of
from kvist.server.live import resume
from kvist.server.live.client import error_of
from kvist.server.vllm import KvistMiddleware, endpoint_plugin
from kvist.server.vllm.client import VllmEngine
from kvist.testing.vllm_core import FakeEngineClient

from .conftest import ARGS, IDS, PATH, Live, echo, make_app
from .conftest import error_of as answered

ROUTES = [
    ("POST", f"{PATH}/snapshot", {}),
    ("POST", f"{PATH}/checkout", {"cid": "demo"}),
    ("POST", f"{PATH}/fork", {"cid": "demo"}),
    ("GET", f"{PATH}/snapshots", None),
    ("GET", f"{PATH}/snapshots/demo", None),
    ("GET", f"{PATH}/lineage", None),
    ("GET", f"{PATH}/layout", None),
    ("POST", "/v1/completions", {"kv_transfer_params": {"snapshot": "demo"}}),
]
OF_CARTRIDGES: list[tuple[str, str, Any]] = [
    ("GET", "/v1/kvist/cartridges", None),
    ("POST", "/v1/kvist/cartridges", {"path": "/somewhere"}),
    ("GET", "/v1/kvist/cartridges/x", None),
    ("DELETE", "/v1/kvist/cartridges/x", None),
    ("GET", "/v1/kvist/stats", None),
]


def ask(live: Live, method: str, path: str, body: Any, **headers: str) -> Any:
    return live.run(live.http.request(method, path, json=body, headers=headers))


def test_no_module_of_it_imports_vllm() -> None:
    for path in Path(kvist.server.vllm.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "vllm" for name in names), path
    code = "import sys, kvist.server.vllm; print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_what_vllm_asks_of_a_plugin() -> None:
    plugin = endpoint_plugin()
    assert plugin.name == "kvist"
    assert plugin.required_tasks == ("generate",)
    assert asyncio.iscoroutinefunction(plugin.init_state)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route[1])
def test_an_engine_without_the_connector(serve: Callable[..., Live], route: tuple[str, str, Any]) -> None:
    for connector in (None, "OffloadingConnector"):
        message = answered(ask(serve(connector=connector), *route), 501, "no_connector")["message"]
        assert '"kv_connector_module_path": "kvist.engines.vllm.connector"' in message
        assert (connector or "no connector") in message


def test_one_of_several_connectors(serve: Callable[..., Live], tmp_path: Path) -> None:
    live = serve()
    mine = {"kv_connector": "KvistConnector", "kv_connector_extra_config": {"store": str(tmp_path / "store")}}
    transfer = live.engine.vllm_config.kv_transfer_config
    transfer.kv_connector = "MultiConnector"
    transfer.kv_connector_extra_config = {"connectors": [{"kv_connector": "Other"}, mine]}
    assert VllmEngine(live.engine).store == str(tmp_path / "store")
    transfer.kv_connector_extra_config = {"connectors": [{"kv_connector": "Other"}]}
    with pytest.raises(NoConnector):
        VllmEngine(live.engine).store  # noqa: B018


def test_an_engine_core_without_the_plugin(serve: Callable[..., Live]) -> None:
    live = serve()
    live.engine.failing["describe"] = RuntimeError("Method 'kvist' is not implemented")
    message = answered(live.post(f"{PATH}/snapshot", {}), 501, "no_connector")["message"]
    assert "VLLM_PLUGINS must name kvist" in message
    live.engine.failing.clear()
    assert live.ask("snapshot")["pages"] == 0


def test_an_engine_that_died(serve: Callable[..., Live]) -> None:
    live = serve()
    live.engine.failing["describe"] = RuntimeError("EngineCore died")
    live.engine.errored = True
    answered(live.post(f"{PATH}/snapshot", {}), 503, "engine")
    live.engine.failing = {"begin": RuntimeError("EngineCore died")}
    answered(live.post(f"{PATH}/snapshot", {}), 503, "engine")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route[1])
def test_before_the_engine_is_there(runner: asyncio.Runner, route: tuple[str, str, Any], tmp_path: Path) -> None:
    app, plugin = make_app()
    live = Live(FakeEngineClient("unused"), app, runner, tmp_path)
    answered(ask(live, *route), 503, "engine")
    runner.run(plugin.init_state(None, app.state, ARGS))
    answered(ask(live, *route), 503, "engine")


def test_an_engine_that_answers_nonsense(serve: Callable[..., Live]) -> None:
    live = serve()
    live.engine._answer = lambda op, payload: {"layouts": 3}  # type: ignore[method-assign]
    answered(live.post(f"{PATH}/snapshot", {}), 503, "engine")
    live.engine._answer = lambda op, payload: [1]  # type: ignore[method-assign, assignment, return-value]
    answered(live.post(f"{PATH}/snapshot", {}), 503, "engine")


def classes(root: type[KvistError]) -> list[type[KvistError]]:
    return [root, *(each for child in root.__subclasses__() for each in classes(child))]


def test_every_kind_of_error_comes_back_as_its_class() -> None:
    for kind in classes(errors.KvistError):
        if kind.__module__ == errors.__name__:
            error = error_of({"kind": kind.kind, "message": "m", "hint": "h"})
            assert type(error) is kind
            assert (str(error), error.hint) == ("m", "h")
    assert type(error_of({"kind": "unheard of", "message": "m"})) is errors.EngineError
    assert type(error_of({})) is errors.EngineError


@pytest.mark.parametrize(
    "kind", [kind for kind in classes(errors.KvistError) if kind.__module__ == errors.__name__], ids=lambda k: k.kind
)
def test_every_error_of_the_engine_as_an_answer(serve: Callable[..., Live], kind: type[KvistError]) -> None:
    live = serve()
    live.engine.failing["begin"] = kind("what happened", hint="what mends it")
    error = answered(live.post(f"{PATH}/snapshot", {}), status_of(kind("")), kind.kind)
    assert error["message"] == "what happened (what mends it)"


def test_bugs_stay_in_the_log(serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    live = serve()

    def bug(*_: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr("kvist.server.live.snapshots.read_parts", bug)
    named = {"kv_transfer_params": {"snapshot": "x"}}
    for path, body in ((f"{PATH}/checkout", {"cid": "x"}), ("/v1/completions", named)):
        assert "secret" not in answered(live.post(path, body), 500, "internal")["message"]


# -- the API key -----------------------------------------------------------------------------------------------------


def test_inside_vllms_authentication(serve: Callable[..., Live]) -> None:
    live = serve(app=make_app(key="s3cret"))
    live.engine.add("cmpl-a-0", IDS)
    for route in (*ROUTES, *OF_CARTRIDGES):
        assert ask(live, *route).status_code == 401
        assert ask(live, *route, authorization="Bearer wrong").status_code == 401
    assert live.engine.calls == {}
    for route in ROUTES:
        assert ask(live, *route, authorization="Bearer s3cret").status_code in (200, 404)


@pytest.fixture
def older(runner: asyncio.Runner, tmp_path: Path) -> Callable[..., Live]:
    """A server of a vLLM without endpoint plugins: the middleware is added last, so outside authentication."""

    def older(api_key: Any = None) -> Live:
        engine = FakeEngineClient(str(tmp_path / "store"))
        app = Starlette(routes=[Route("/v1/completions", echo, methods=["POST"])])
        app.state.engine_client, app.state.args = engine, SimpleNamespace(host="127.0.0.1", api_key=api_key)
        app.add_middleware(KvistMiddleware)
        return Live(engine, app, runner, tmp_path / "store")

    return older


def test_the_middleware_alone(older: Callable[..., Live]) -> None:
    live = older()
    live.engine.add("cmpl-a-0", IDS)
    cid = live.ask("snapshot", name="demo")["cid"]
    assert live.ask("checkout", cid="demo")["cid"] == cid
    assert live.complete("demo")["prompt"] == IDS
    assert live.post("/v1/completions", {"prompt": "x"}).json() == {"prompt": "x"}
    answered(live.get(f"{PATH}/nothing"), 404, "not_found")
    live.engine.close()


@pytest.mark.parametrize("key", ["s3cret", ["other", "s3cret"]])
def test_the_middleware_asks_for_the_key(older: Callable[..., Live], key: Any) -> None:
    live = older(key)
    for route in (*ROUTES, *OF_CARTRIDGES):
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"},
                      {"authorization": "s3cret"}, {"authorization": "Bearer  s3cret"}):  # fmt: skip
            answer = ask(live, *route, **given)
            if "completions" in route[1]:  # vLLM's own authentication is next; nothing was looked up
                assert answer.json() == route[2]
            else:
                assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    assert live.engine.calls == {}
    assert not live.store.exists()
    for scheme in ("Bearer", "bearer"):
        assert ask(live, *ROUTES[0], authorization=f"{scheme} s3cret").status_code == 200
    live.engine.close()


def test_the_key_of_the_environment(older: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "env")
    live = older()
    assert ask(live, *ROUTES[0]).status_code == 401
    assert ask(live, *ROUTES[0], authorization="Bearer env").status_code == 200
    assert ask(older(["cli"]), *ROUTES[0], authorization="Bearer env").status_code == 401
    live.engine.close()


def test_a_vllm_that_does_not_say(older: Callable[..., Live]) -> None:
    live = older()
    del live.app.state.args  # type: ignore[attr-defined]
    answered(ask(live, *ROUTES[0]), 503, "engine")
    answered(ask(live, *ROUTES[-1]), 503, "engine")
    assert live.post("/v1/completions", {"prompt": "x"}, **{"content-type": "text/plain"}).status_code == 200


def test_a_tokens_file_that_is_gone_lets_nobody_in(
    older: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVIST_TOKENS", str(tmp_path / "gone.json"))
    live = older()
    for path in ("/health", "/v1/completions", f"{PATH}/lineage"):
        assert "gone.json" not in answered(live.get(path), 503, "store")["message"]
    assert "there is no tokens file" in caplog.text and "gone.json" in caplog.text


def test_preflights_pass(older: Callable[..., Live]) -> None:
    assert ask(older("s3cret"), "OPTIONS", f"{PATH}/snapshot", None).status_code == 404


def test_the_reference_page() -> None:
    docs = Path(__file__).parents[3] / "docs" / "reference"
    page = (docs / "vllm.md").read_text()
    for _, path, _ in ROUTES:
        assert path.replace("/demo", "/{rev}") in page
    for field in (*schema.SnapshotBody.__struct_fields__, *schema.CheckoutBody.__struct_fields__):
        assert f"`{field}`" in page, field
    for field in resume._CARRIED:
        assert f"`{field}`" in page, field
