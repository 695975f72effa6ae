"""kvist's own access in front of vLLM: tokens, tenants, and nothing open beyond this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvist.errors import Forbidden, InvalidInput, UntrustedSnapshot
from kvist.repo import Repository
from kvist.server.errors import BadRequest
from kvist.server.live import snapshots
from kvist.server.live.gate import MARK
from kvist.server.tokens import Scope, add_token
from kvist.server.vllm.bodies import tenant_body
from kvist.server.vllm.client import VllmEngine
from kvist.store import Store

from .conftest import ARGS, IDS, PATH, AsgiCall, Live, make_app
from .conftest import error_of as answered

WHO = {
    "read": (Scope.READ, None),
    "write": (Scope.WRITE, None),
    "admin": (Scope.ADMIN, None),
    "acme": (Scope.WRITE, "acme"),
    "umbrella": (Scope.WRITE, "umbrella"),
}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    return {name: add_token(tmp_path / "tokens.json", name, who[0], tenant=who[1]) for name, who in WHO.items()}


@pytest.fixture
def guarded(
    serve: Callable[..., Live], texts: dict[str, str], tmp_path: Path, runner: asyncio.Runner
) -> Iterator[Live]:
    """A vLLM whose connector names a tokens file, beyond this machine."""
    live = serve()
    live.engine.vllm_config.kv_transfer_config.kv_connector_extra_config["tokens"] = str(tmp_path / "tokens.json")
    app, plugin = make_app()
    runner.run(plugin.init_state(live.engine, app.state, SimpleNamespace(host=None)))
    live.engine.add("cmpl-a-0", IDS, sampling={"temperature": 0.5})
    yield Live(live.engine, app, runner, live.store)


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def test_every_route_asks_for_a_token(guarded: Live, texts: dict[str, str]) -> None:
    for path in (f"{PATH}/lineage", "/v1/kvist/cartridges", "/v1/completions", "/nothing"):
        answered(guarded.get(path), 401, "unauthorized")
        answered(guarded.get(path, **bearer("kvist_wrong")), 401, "unauthorized")
    assert guarded.get(f"{PATH}/lineage", **bearer(texts["read"])).status_code == 200
    answered(guarded.post(f"{PATH}/fork", {"cid": "x"}, **bearer(texts["read"])), 403, "forbidden")
    assert guarded.post("/v1/completions", {"prompt": "x"}, **bearer(texts["write"])).status_code == 200
    assert guarded.post("/v1/embeddings", {"input": "x"}, **bearer(texts["write"])).status_code == 200
    answered(guarded.post("/v1/embeddings", {"input": "x"}, **bearer(texts["acme"])), 403, "forbidden")
    answered(guarded.post("/sleep", {}, **bearer(texts["write"])), 403, "forbidden")
    assert guarded.post("/sleep", {}, **bearer(texts["admin"])).status_code == 404


def test_beside_vllms_own_key(
    serve: Callable[..., Live], texts: dict[str, str], tmp_path: Path, runner: asyncio.Runner, monkeypatch: Any
) -> None:
    monkeypatch.setenv("KVIST_TOKENS", str(tmp_path / "tokens.json"))
    live = serve(app=make_app(key="sk"))
    token = {"X-Kvist-Token": texts["read"]}
    assert live.get(f"{PATH}/lineage", **bearer("sk"), **token).status_code == 200
    assert live.get(f"{PATH}/lineage", **token).json() == {"error": "Unauthorized"}
    answered(live.get(f"{PATH}/lineage", **bearer("sk")), 401, "unauthorized")


def test_a_tokens_file_that_cannot_be_used_keeps_the_server_down(
    serve: Callable[..., Live], texts: dict[str, str], tmp_path: Path, runner: asyncio.Runner
) -> None:
    live = serve()
    live.engine.vllm_config.kv_transfer_config.kv_connector_extra_config["tokens"] = str(tmp_path / "tokens.json")
    (tmp_path / "tokens.json").chmod(0o666)
    app, plugin = make_app()
    with pytest.raises(InvalidInput, match="others can change"):
        runner.run(plugin.init_state(live.engine, app.state, ARGS))


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::", "example", "10.0.0.1"])
def test_without_tokens_its_routes_are_closed_beyond_this_machine(
    serve: Callable[..., Live], runner: asyncio.Runner, host: str | None
) -> None:
    live = serve()
    app, plugin = make_app()
    runner.run(plugin.init_state(live.engine, app.state, SimpleNamespace(host=host, api_key=None, uds=None)))
    live = Live(live.engine, app, runner, live.store)
    for path in (f"{PATH}/lineage", "/v1/kvist/cartridges"):
        assert "asks nobody who is there" in answered(live.get(path), 403, "forbidden")["message"]
    body = {"kv_transfer_params": {"snapshot": "main"}}
    answered(live.post("/v1/completions", body), 403, "forbidden")
    assert live.post("/v1/completions", {"prompt": "x"}).status_code == 200  # vLLM's own are vLLM's
    for args in ({"host": host, "api_key": ["sk"]}, {"host": host, "uds": "/run/vllm"}, {"host": "127.0.0.1"}):
        app, plugin = make_app()
        runner.run(plugin.init_state(live.engine, app.state, SimpleNamespace(**args)))
        assert Live(live.engine, app, runner, live.store).get(f"{PATH}/lineage").status_code == 200


def test_on_this_machine_other_sites_pages_are_refused(live: Live) -> None:
    answered(live.get(f"{PATH}/lineage", Host="evil.example"), 403, "forbidden")
    answered(live.post(f"{PATH}/snapshot", {}, Origin="http://evil.example"), 403, "forbidden")
    assert live.get(f"{PATH}/lineage").status_code == 200


def test_a_tenants_requests_are_salted_and_named(guarded: Live, texts: dict[str, str]) -> None:
    bodies = {}
    for who in ("acme", "umbrella", "write"):
        answer = guarded.post(
            "/v1/completions", {"prompt": "x", "request_id": "mine"}, **bearer(texts[who]), **{"X-Request-Id": "r"}
        )
        bodies[who] = answer.json()
        name = answer.headers["x-headers"]
        assert (f"{MARK}{who}.r" in name) == (who != "write")
    assert len({body.get("cache_salt") for body in bodies.values()}) == 3
    assert bodies["write"] == {"prompt": "x", "request_id": "mine"}
    assert set(bodies["acme"]) == {"prompt", "cache_salt"}
    chat = guarded.post("/v1/chat/completions", {"messages": []}, **bearer(texts["acme"])).json()
    assert chat["cache_salt"] == bodies["acme"]["cache_salt"]  # one tenant's requests share
    with Repository.open(str(guarded.store / "tenants" / "acme")) as repo:
        assert repo.config.salt and repo.config.salt not in str(bodies)


def test_a_tenant_reaches_its_own_repository_only(guarded: Live, texts: dict[str, str]) -> None:
    acme, write = bearer(texts["acme"]), bearer(texts["write"])
    made = guarded.post(f"{PATH}/snapshot", {"request_id": "cmpl-a-0", "name": "demo"}, **write)
    assert made.status_code == 200, made.text
    cid = made.json()["cid"]
    assert guarded.get(f"{PATH}/snapshots", **acme).json() == {"snapshots": [], "total": 0}
    for path in (f"{PATH}/snapshots/demo", f"{PATH}/snapshots/{cid}"):
        answered(guarded.get(path, **acme), 404, "not_found")
        assert guarded.get(path, **write).status_code == 200
    answered(guarded.post(f"{PATH}/fork", {"cid": cid}, **acme), 404, "not_found")
    assert guarded.get(f"{PATH}/lineage", **acme).json()["nodes"] == []
    for what, body in (("snapshot", {"request_id": "cmpl-a-0"}), ("checkout", {"cid": cid})):
        answered(guarded.post(f"{PATH}/{what}", body, **acme), 403, "forbidden")
    answered(guarded.get(f"{PATH}/stats", **acme), 403, "forbidden")
    for body in (
        {"kv_transfer_params": {"snapshot": cid}},
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1]}},
        {"vllm_xargs": {"kv_transfer_params": {"snapshot": cid}}},
        {"vllm_xargs": {"ec_transfer_params": "x"}},
        {"extra_body": {"kv_transfer_params": {"snapshot": cid}}},
        {"ec_transfer_params": {"x": 1}},
        {"priority": -1},
        {"session_id": "x"},
        {"a field of a later version": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "theirs"}]}]},
    ):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answered(guarded.post(path, body, **acme), 403, "forbidden")


def test_nobody_captures_what_is_a_tenants(guarded: Live, texts: dict[str, str]) -> None:
    guarded.engine.add(f"cmpl-{MARK}acme.r-0", IDS, sampling={})
    for wanted in (f"{MARK}acme.r", f"cmpl-{MARK}acme.r-0"):
        for key in ("request_id", "sequence"):
            answered(guarded.post(f"{PATH}/snapshot", {key: wanted}, **bearer(texts["admin"])), 404, "not_found")
    answered(guarded.post(f"{PATH}/snapshot", {}, **bearer(texts["write"])), 403, "forbidden")
    assert guarded.post(f"{PATH}/snapshot", {}, **bearer(texts["admin"])).status_code == 200
    headers = {**bearer(texts["write"]), "X-Request-Id": f"{MARK}acme.r"}
    answered(guarded.post("/v1/completions", {"prompt": "x"}, **headers), 400, "invalid_input")


def test_a_tenants_body() -> None:
    body = tenant_body({"prompt": "x", "cache_salt": "mine", "kv_transfer_params": {"cartridge_id": "c"}}, "salt")
    assert body["kv_transfer_params"] == {"cartridge_id": "c"}
    salts = {tenant_body({"cache_salt": own}, salt)["cache_salt"] for own in (None, "a", "b") for salt in ("x", "y")}
    assert len(salts) == 6 and not any(each == "x" or each == "a" for each in salts)
    usual = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": None, "temperature": 0.5}
    usual |= {"vllm_xargs": {"mine": 1}, "stream": True, "metadata": {"a": "b"}}
    assert tenant_body(usual | {"priority": None, "request_id": "x"}, "salt").items() >= usual.items()
    assert not tenant_body({"priority": None, "request_id": "x"}, "salt").keys() - {"cache_salt"}
    assert tenant_body({"messages": 5, "kv_transfer_params": None}, "salt")  # vLLM says what is wrong
    for wrong in ({"kv_transfer_params": []}, {"vllm_xargs": 3}, {"cache_salt": 5}):
        with pytest.raises(BadRequest):
            tenant_body(wrong, "salt")
    with pytest.raises(Forbidden):
        tenant_body({"kv_transfer_params": {"snapshot": None}}, "salt")


def test_a_tenant_that_hangs_up(guarded: Live, texts: dict[str, str]) -> None:
    async def hang_up() -> AsgiCall:
        call = AsgiCall("/v1/completions", headers={"authorization": f"Bearer {texts['acme']}"})
        call.body(b'{"prompt": ', more=True)
        call.disconnect()
        await call.start(guarded.app)
        return call

    assert guarded.runner.run(hang_up()).sent == []


def test_a_tenant_that_is_slow_to_open_holds_up_nobody(
    guarded: Live, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guarded.post("/v1/completions", {"prompt": "x"}, **bearer(texts["acme"])).status_code == 200
    opened, real = threading.Event(), snapshots.open_tenant

    def slow(store: Store, name: str, open_repository: Any) -> Repository:
        assert opened.wait(20)
        return real(store, name, open_repository)

    monkeypatch.setattr(snapshots, "open_tenant", slow)

    async def go() -> None:
        body = {"json": {"prompt": "x"}}
        waiting = asyncio.create_task(
            guarded.http.post("/v1/completions", headers=bearer(texts["umbrella"]), **body)  # type: ignore[arg-type]
        )
        await asyncio.sleep(0.1)
        known = guarded.http.post("/v1/completions", headers=bearer(texts["acme"]), **body)  # type: ignore[arg-type]
        assert (await asyncio.wait_for(known, 10)).status_code == 200
        ours = guarded.http.get(f"{PATH}/lineage", headers=bearer(texts["read"]))
        assert (await asyncio.wait_for(ours, 10)).status_code == 200
        assert not waiting.done()
        opened.set()
        assert (await waiting).status_code == 200

    guarded.runner.run(go())


@pytest.mark.parametrize("wrong", [["/srv/tokens.json"], "", 5, {}])
def test_an_option_that_is_no_text_is_not_taken_for_nothing(
    serve: Callable[..., Live], runner: asyncio.Runner, wrong: Any
) -> None:
    live = serve()
    extra = live.engine.vllm_config.kv_transfer_config.kv_connector_extra_config
    extra["tokens"] = wrong
    app, plugin = make_app()
    with pytest.raises(InvalidInput, match="tokens is text"):
        runner.run(plugin.init_state(live.engine, app.state, ARGS))
    del extra["tokens"]
    extra["trusted_keys"] = wrong
    with pytest.raises(InvalidInput, match="trusted_keys is text"):
        VllmEngine(live.engine).option("trusted_keys")
    answered(serve_again(serve, live).post(f"{PATH}/checkout", {"cid": "demo"}), 503, "store")


def test_a_policy_asks_for_signatures(serve: Callable[..., Live], tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
    from kvist.repo.signing import PrivateKey, sign

    key = PrivateKey.new()
    (tmp_path / "trusted").write_text(key.public.encode())
    (tmp_path / "trusted").chmod(0o644)
    live = serve()
    live.engine.vllm_config.kv_transfer_config.kv_connector_extra_config["trusted_keys"] = str(tmp_path / "trusted")
    live.engine.add("cmpl-a-0", IDS, sampling={})
    cid = live.ask("snapshot", request_id="cmpl-a-0", name="demo")["cid"]
    for path, body in (
        (f"{PATH}/checkout", {"cid": "demo"}),
        ("/v1/completions", {"kv_transfer_params": {"snapshot": "demo"}}),
    ):
        answered(live.post(path, body), 403, UntrustedSnapshot.kind)
    with live.repo() as repo:
        sign(repo.store, cid, key)
    assert live.ask("checkout", cid="demo")["ok"]
    (tmp_path / "trusted").unlink()
    answered(serve_again(serve, live).post(f"{PATH}/checkout", {"cid": "demo"}), 503, "store")


def serve_again(serve: Callable[..., Live], live: Live) -> Live:
    """Another server whose policy cannot be read: it checks nothing out."""
    extra = live.engine.vllm_config.kv_transfer_config.kv_connector_extra_config
    other = serve()
    other.engine.vllm_config.kv_transfer_config.kv_connector_extra_config |= {"trusted_keys": extra["trusted_keys"]}
    return other
