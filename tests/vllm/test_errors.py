"""What cannot be is refused in OpenAI's envelope, and the server goes on; a load that fails is never attended."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvist.testing.scenario.requests import (
    CHECKOUT,
    FORK,
    GREEDY,
    SEEDED,
    SNAPSHOT,
    SNAPSHOTS,
    Case,
    Past,
    assert_same,
    check_out,
    error_of,
    go_on,
    interrupt,
    prompt,
)
from kvist.testing.scenario.store import altered, root_of
from kvist.testing.vllm import VllmServer

KEY = "sesame"
NOBODY = "sha256:" + "0" * 64
CASE = Case("case", prompt(300, seed=900), GREEDY)
OTHER = Case("other", prompt(260, seed=901), SEEDED)


@pytest.fixture(scope="module")
def server(store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> Iterator[VllmServer]:
    """With an API key, and with vLLM's default for failed loads (the request fails)."""
    settings = {"host_bytes": 1 << 20}  # so that what was snapshotted does not stay
    server = start(model(), store, api_key=KEY, transfer={"kv_load_failure_policy": "fail"}, settings=settings)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def past(server: VllmServer) -> Past:
    return interrupt(server, CASE)


@pytest.fixture(autouse=True)
def serving(server: VllmServer) -> Iterator[None]:
    """After every test the server still serves, and nothing of its processes is gone."""
    before = server.processes()
    yield
    assert len(server.complete([9, 8, 7], max_tokens=3, **GREEDY).steps) == 3
    assert server.http.get("/health").status_code == 200
    assert server.processes() == before


ROUTES = [("POST", SNAPSHOT), ("POST", CHECKOUT), ("POST", FORK), ("GET", SNAPSHOTS), ("GET", f"{SNAPSHOTS}/x")]
ROUTES += [("GET", "/v1/kvist/cartridges"), ("POST", "/v1/kvist/cartridges"), ("DELETE", "/v1/kvist/cartridges/x")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}], ids=["none", "wrong"])
def test_the_key_guards_our_routes(server: VllmServer, method: str, path: str, headers: dict[str, str]) -> None:
    with httpx2.Client(base_url=server.url, headers=headers, trust_env=False) as anybody:
        assert anybody.request(method, path, json={} if method == "POST" else None).status_code == 401


def test_the_key_opens_them(server: VllmServer, past: Past) -> None:
    assert server.get(SNAPSHOTS)["total"] >= 1
    check_out(server, past)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "org/another"},
        {"revision": "another"},
        {"dtype": "f16"},
        {"page_size_tokens": 16, "head_dim": 64},  # so that a page has as many bytes
        {"tp_size": 2},
        {"n_groups": 2},
        {"attention": "sliding:64"},
        {"memory_order": "LHND"},
    ],
    ids=str,
)
def test_another_layout(server: VllmServer, past: Past, store: str, changes: dict[str, Any]) -> None:
    """Both values side by side, by checkout and by name."""
    cid = altered(store, past.cid, **changes)
    message = error_of(server.http.post(CHECKOUT, json={"cid": cid}), 409, "layout_mismatch")
    for name, value in changes.items():
        assert f"{name} {value!r} there" in message
    body = {"kv_transfer_params": {"snapshot": cid, "sequence": past.sequence}, "max_tokens": 1}
    error_of(server.http.post("/v1/completions", json=body), 409, "layout_mismatch")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (SNAPSHOT, {"request_id": "nobody"}, 404, "not_found"),
        (SNAPSHOT, {"request_id": 7}, 400, "invalid_input"),
        (SNAPSHOT, {"nonsense": 1}, 400, "invalid_input"),
        (SNAPSHOT, {"name": "../x"}, 400, "invalid_name"),
        (CHECKOUT, {"cid": NOBODY}, 404, "not_found"),
        (CHECKOUT, {"cid": "no-such-branch"}, 404, "not_found"),
        (CHECKOUT, {}, 400, "invalid_input"),
        (FORK, {"cid": NOBODY, "n": 2}, 404, "not_found"),
        (FORK, {"cid": NOBODY, "n": 0}, 400, "invalid_input"),
    ],
    ids=str,
)
def test_what_is_not_there_or_cannot_be(
    server: VllmServer, past: Past, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    error_of(server.http.post(path, json=body), status, code)


def test_no_json(server: VllmServer) -> None:
    error_of(server.http.post(SNAPSHOT, content=b"{", headers={"Content-Type": "application/json"}), 400)


def test_unknown_in_the_list(server: VllmServer, past: Past) -> None:
    error_of(server.http.get(f"{SNAPSHOTS}/{NOBODY}"), 404, "not_found")


@pytest.mark.parametrize(
    ("named", "prompt_", "status"),
    [
        ({"snapshot": NOBODY}, None, 404),
        ({"sequence": "nobody"}, None, 404),
        ({}, [1, 2, 3], 400),
        ({}, "a text", 400),
        ({"snapshot": 7}, None, 400),
    ],
    ids=["no snapshot", "no sequence", "other ids", "text", "no text"],
)
def test_names_that_cannot_go_on(
    server: VllmServer, past: Past, named: dict[str, Any], prompt_: Any, status: int
) -> None:
    params = {"snapshot": past.cid, "sequence": past.sequence} | named
    body = {"kv_transfer_params": params, "max_tokens": 1} | ({} if prompt_ is None else {"prompt": prompt_})
    error_of(server.http.post("/v1/completions", json=body), status)


def test_structured_output_is_named(server: VllmServer) -> None:
    """A grammar's state is in no cache: the checkout says so."""
    form = {"structured_outputs": {"regex": "[a-z ]{1,900}"}}
    before = interrupt(server, Case("formed", prompt(40, seed=902), GREEDY | form))
    answer = server.post(CHECKOUT, {"cid": before.cid})
    (said,) = answer["not_carried"][before.sequence]
    assert said.startswith("structured output")


def test_y_pages_gone_after_the_checkout(server: VllmServer, store: str) -> None:
    """The load fails, and the request with it: vLLM's policy ``fail``. Others do not notice."""
    before = interrupt(server, OTHER)
    check_out(server, before)
    interrupt(server, Case("filler", prompt(500, seed=903), GREEDY))  # takes what host memory there is
    hidden = root_of(store).with_name("hidden")
    segments = root_of(store) / "segments"
    running = server.stream(CASE.prompt, cache_salt="running", max_tokens=300, **CASE.params)
    running.wait(5)
    shutil.move(segments, hidden)
    try:
        body = {"kv_transfer_params": {"snapshot": before.cid, "sequence": before.sequence}, "max_tokens": 5}
        answer = server.http.post("/v1/completions", json=body | before.case.params)
        assert answer.status_code >= 500, answer.text
        assert answer.json()["error"]["message"]
    finally:
        shutil.move(hidden, segments)
    assert len(running.result().steps) == 300
    assert_same(go_on(server, before).steps, before.next_steps())


def test_z_store_gone(server: VllmServer, past: Past, store: str) -> None:
    """Last: nothing of the store is left, in the middle of everything."""
    running = server.stream(CASE.prompt, cache_salt="gone", max_tokens=300, **CASE.params)
    running.wait(5)
    shutil.rmtree(root_of(store))
    root_of(store).write_text("not a directory")
    for path, body in (
        (SNAPSHOT, {"request_id": running.id}),
        (SNAPSHOT, {"name": "all"}),
        (CHECKOUT, {"cid": past.cid}),
    ):
        answer = server.http.post(path, json=body)
        assert answer.status_code >= 500 or (path == CHECKOUT and answer.status_code == 404), answer.text
        assert answer.json()["error"]["code"]
    assert_same(running.result().steps[:200], past.whole.steps[:200])
