"""Cartridges that are slow to come, or cannot: who waits for them, what is told, and what else goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.registry import Registry
from kvist.cartridge.snapshots import to_repository
from kvist.engines.hf import Engine
from kvist.errors import CartridgeTooLarge, ResidencyFull, StoreError
from kvist.repo import Repository
from kvist.server.cartridges import _add
from kvist.server.schema import CartridgeBody

from .conftest import Api, error_of
from .test_cartridges import GREEDY, QUESTION, cartridges, opened, trained, using

__all__ = ["cartridges", "opened"]

ROUTE = "/v1/kvist/cartridges"
PLAIN: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 1}


def test_who_waits_for_a_cartridge_holds_up_nobody_else(
    opened: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvist.engines.hf.cartridges as module

    server, may_load, real = opened(), threading.Event(), module.pack
    server.complete(QUESTION, **GREEDY, **using("second"))

    def slow(*args: Any) -> Any:
        may_load.wait()
        return real(*args)

    monkeypatch.setattr(module, "pack", slow)
    with ThreadPoolExecutor(24) as pool:
        waiting = [pool.submit(server.post, "/v1/completions", {**PLAIN, **using("first")}) for _ in range(24)]
        try:
            while server.engine.cartridges.metrics().reserved_bytes == 0:
                time.sleep(0.005)
            for body in (PLAIN, {**PLAIN, **using("second")}) * 3:
                assert server.post("/v1/completions", body).status_code == 200
        finally:
            may_load.set()
        assert {one.result().status_code for one in waiting} == {200}


def test_a_registry_that_does_not_answer_holds_up_nobody(
    opened: Callable[..., Api], cartridges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = opened(registry=str(tmp_path / "registry.db"))
    assert server.post(ROUTE, {"path": str(cartridges / "first")}).status_code == 200
    may_fail = threading.Event()

    def hangs() -> int:
        may_fail.wait()
        raise StoreError("no route to the database")

    library = server.engine.cartridges.library
    assert library is not None
    monkeypatch.setattr(library.registry, "version", hangs)
    with ThreadPoolExecutor(20) as pool:
        asking = [pool.submit(server.post, "/v1/completions", {**PLAIN, **using("nobody")}) for _ in range(20)]
        try:
            many = {"prompt": [[5]] * 5, "max_tokens": 1}
            for body in (PLAIN, many, {**PLAIN, **using("first")}) * 2:
                assert server.post("/v1/completions", body).status_code == 200
        finally:
            may_fail.set()
        for one in asking:
            error_of(one.result(), 404, "unknown_cartridge")


@pytest.mark.parametrize("many", [1, 41])
def test_a_pipe_is_no_file(many: int, opened: Callable[..., Api], cartridges: Path, tmp_path: Path) -> None:
    """To open one would wait for a writer, for ever."""
    server = opened(registry=str(tmp_path / "registry.db"))
    pipe, shard = tmp_path / "pipe.pt", next((cartridges / "first").glob("*.safetensors"))
    os.mkfifo(pipe)
    bodies = [{"path": str(pipe)}, {"path": str(shard), "manifest_path": str(pipe)}] * many
    with ThreadPoolExecutor(41) as pool:
        for answer in pool.map(lambda body: server.post(ROUTE, body), bodies):
            assert answer.status_code in (400, 404, 422), answer.text
    assert server.get(ROUTE)["cartridges"] == []


def test_paths_and_labels_that_cannot_be(opened: Callable[..., Api], cartridges: Path, tmp_path: Path) -> None:
    server = opened(registry=str(tmp_path / "registry.db"))
    first = str(cartridges / "first")
    long = "/" + "a" * 5000
    error_of(server.post(ROUTE, {"path": long}), 404, "not_found")
    assert 400 <= server.post(ROUTE, {"path": first, "manifest_path": long}).status_code < 500
    labels = {f"k{number}": "v" for number in range(65)}
    told = error_of(server.post(ROUTE, {"path": first, "labels": labels}), 400, "invalid_input")
    assert told["param"] == "labels"
    error_of(server.post(ROUTE, {"path": first, "labels": {"k": "v" * 3000}}), 400, "invalid_input")
    for body, word in (
        ({}, "one of path, store and hub"),
        ({"path": first, "hub": "org/name"}, "one of path, store and hub"),
        ({"path": first, "rev": "x"}, "goes with store"),
        ({"store": str(tmp_path / "store")}, "a snapshot of the store"),
        ({"path": "first"}, "an absolute one"),
    ):
        assert word in error_of(server.post(ROUTE, body), 400, "invalid_input")["message"]


def test_other_content_is_registered_only_if_that_is_asked_for(
    opened: Callable[..., Api], cartridges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = opened(registry=str(tmp_path / "registry.db"))
    first, second = ({"cartridge_id": "same", "path": str(cartridges / name)} for name in ("first", "second"))
    made = server.post(ROUTE, first).json()
    assert server.post(ROUTE, {**first, "labels": {"a": "b"}}).json()["labels"] == {"a": "b", "topic": "f"}
    error_of(server.post(ROUTE, second), 409, "already_exists")
    assert server.get(f"{ROUTE}/same")["identity"] == made["identity"]
    assert server.post(ROUTE, {**second, "replace": True}).json()["tokens"] == 48
    assert server.get(f"{ROUTE}/same")["manifest"]["num_tokens_raw"] == 48

    library, at_once = server.engine.cartridges.library, threading.Barrier(2)
    assert library is not None and library.registry is not None
    real = library.registry.register

    def register(*args: Any, **said: Any) -> Any:
        if not said.get("replace", True):
            at_once.wait()
        return real(*args, **said)

    monkeypatch.setattr(library.registry, "register", register)
    results: list[str] = []

    def add(name: str) -> None:
        try:
            _add(library, CartridgeBody(cartridge_id="both", path=str(cartridges / name)))
            results.append("added")
        except Exception as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=add, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["AlreadyExists", "added"]


def test_a_branch_that_moves_is_registered_as_its_snapshot(
    opened: Callable[..., Api], cartridges: Path, tmp_path: Path
) -> None:
    server = opened(registry=str(tmp_path / "registry.db"))
    store = (tmp_path / "cartridges").as_uri() + "?durable=0"
    with Repository.init(store) as repo:
        to_repository(Cartridge.from_pretrained(cartridges / "first"), repo, name="law")
        cid = repo.resolve("cartridge/law")
    assert server.post(ROUTE, {"store": store, "rev": "cartridge/law"}).status_code == 200
    library = server.engine.cartridges.library
    assert library is not None and library.registry is not None
    (registered,) = library.registry.list_all()
    assert cid in registered.location


def test_a_list_opens_nothing(
    opened: Callable[..., Api], cartridges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = opened(registry=str(tmp_path / "registry.db"))
    manifest = Cartridge.from_pretrained(cartridges / "first").manifest
    with Registry(tmp_path / "registry.db") as registry:
        registry.register(manifest, '{"hub": "org/far"}')
        registry.register(trained(server.engine, 8, 3, "gone").manifest, str(tmp_path / "gone"))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("opened")

    with monkeypatch.context() as patched:
        patched.setattr("kvist.cartridge.library.open_source", never)
        records = server.get(ROUTE)["cartridges"]
    assert [(one["id"], one["tokens"]) for one in records] == [("first", 40), ("gone", 8)]
    assert not any("error" in one for one in records)
    error_of(server.post("/v1/completions", {**PLAIN, **using("gone")}), 404, "not_found")
    assert [one.get("error", {}).get("code") for one in server.get(ROUTE)["cartridges"]] == [None, "not_found"]


def test_the_routers_own_fields(opened: Callable[..., Api], cartridges: Path) -> None:
    label = {"type": "label", "label_key": "topic", "extras_key": "about"}
    server = opened(
        cartridges=[{"path": str(cartridges / name)} for name in ("first", "second")],
        router={"type": "composite", "routers": [label, {"type": "explicit", "key": "doc"}]},
    )

    def used(**said: Any) -> Any:
        return server.complete(QUESTION, **GREEDY, kv_transfer_params=said)["kv_transfer_params"]["cartridge"]["id"]

    assert [used(doc="first"), used(about="s"), used(doc="first", about="s")] == ["first", "second", "second"]
    cases = [{"cartridge_id": "first"}, {"cartridge_label": "s"}, {"strange": "x"}, {"doc": ["first"]}, {"others": {}}]
    for said in cases:
        told = error_of(server.post("/v1/completions", {**PLAIN, "kv_transfer_params": said}), 400, "invalid_input")
        assert told["param"] == f"kv_transfer_params.{next(iter(said))}"
    snapshot = {"snapshot": "x", "doc": "first"}
    told = error_of(server.post("/v1/completions", {**PLAIN, "kv_transfer_params": snapshot}), 400, "invalid_input")
    assert "keeps the cartridge" in told["message"]
    unknown = server.post("/v1/completions", {**PLAIN, "kv_transfer_params": {"about": "x\n" * 10_000}})
    message = error_of(unknown, 404, "unknown_cartridge")["message"]
    assert len(message) < 300 and "\n" not in message


def test_a_mode_goes_with_a_cartridge(opened: Callable[..., Api]) -> None:
    server = opened()
    for mode in ("auto", "prompt", "virtual"):
        body = {**PLAIN, "kv_transfer_params": {"cartridge_prefix": mode}}
        told = error_of(server.post("/v1/completions", body), 400, "invalid_input")
        assert told["param"] == "kv_transfer_params.cartridge_prefix"


def test_what_can_never_fit(opened: Callable[..., Api], cartridges: Path, tmp_path: Path, load: Any) -> None:
    engine: Engine = load(pages=8)
    page = 2 * engine.layout.page_bytes
    configured = [{"path": str(cartridges / name)} for name in ("first", "second")]
    with pytest.raises(CartridgeTooLarge, match=f"takes {3 * page} bytes, and host_bytes is {2 * page}"):
        opened(cartridges=configured, host_bytes=2 * page)
    with pytest.raises(CartridgeTooLarge):
        opened(cartridges=configured, host_bytes=2 * page, preload=["second"])
    several = opened(registry=str(tmp_path / "registry.db"), host_bytes=2 * page)
    assert several.post(ROUTE, {"path": str(cartridges / "first")}).status_code == 200
    answer = several.post("/v1/completions", {**PLAIN, **using("first")})
    assert f"host_bytes of at least {3 * page}" in error_of(answer, 503, "cartridge_too_large")["message"]
    assert "retry-after" not in answer.headers


def test_what_does_not_fit_now(opened: Callable[..., Api], cartridges: Path, load: Any) -> None:
    configured = [{"path": str(cartridges / name)} for name in ("first", "second")]
    engine: Engine = load(pages=8)
    server = opened(cartridges=configured, host_bytes=3 * 2 * engine.layout.page_bytes, preload=["first"])
    stream = server.events({"prompt": QUESTION, "max_tokens": 300, "ignore_eos": True, **using("first")})
    next(stream)
    answer = server.post("/v1/completions", {**PLAIN, **using("second")})
    error_of(answer, 503, "residency_full")
    assert answer.headers["retry-after"] == "1"
    assert list(stream)[-1]["choices"][0]["finish_reason"] == "length"
    assert server.post("/v1/completions", {**PLAIN, **using("second")}).status_code == 200


def test_preloading_more_than_there_is_room_for(opened: Callable[..., Api], tmp_path: Path, load: Any) -> None:
    engine: Engine = load(pages=8)
    configured = []
    for number in range(2):
        trained(engine, 20, number, f"c{number}").save_pretrained(tmp_path / f"c{number}")
        configured.append({"path": str(tmp_path / f"c{number}")})
    page = 2 * engine.layout.page_bytes
    with pytest.raises(ResidencyFull, match=f"takes {4 * page} bytes, and host_bytes is {3 * page}"):
        opened(cartridges=configured, host_bytes=3 * page, preload=["c0", "c1"])
    server = opened(cartridges=configured, host_bytes=4 * page, preload=["c0", "c1", "c0"])
    assert server.engine.cartridges.metrics().resident == 2


def test_a_registered_cartridge_of_another_model(opened: Callable[..., Api], cartridges: Path, tmp_path: Path) -> None:
    import dataclasses

    server = opened(registry=str(tmp_path / "registry.db"))
    manifest = Cartridge.from_pretrained(cartridges / "first").manifest
    with Registry(tmp_path / "registry.db") as registry:
        registry.register(dataclasses.replace(manifest, model_revision="blake3:0000"), str(cartridges / "first"))
    told = error_of(server.post("/v1/completions", {**PLAIN, **using("first")}), 409, "layout_mismatch")
    assert "blake3:0000" in told["message"]
    assert server.get(ROUTE)["cartridges"] == []
