"""Names of requests, and bodies that name a snapshot, on their way to SGLang."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from kvist.engines.sglang.requests import name, wanted
from kvist.repo import LogicalSeq
from kvist.server.errors import BadRequest
from kvist.server.sglang.dialect import SGLANG
from kvist.server.sglang.naming import Naming

SEQ = LogicalSeq("story", (1, 2), 0, (5, 6, 7, 8))
CID = "sha256:" + "0" * 64


@pytest.fixture
def client() -> TestClient:
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"body": (await request.body()).decode()})

    paths = ("/v1/completions", "/v1/chat/completions", "/generate", "/other")
    return TestClient(Naming(Starlette(routes=[Route(path, echo, methods=["POST"]) for path in paths]), body_max=1000))


def sent(client: TestClient, path: str, content: bytes, called: str | None = "story") -> str:
    answer = client.post(path, content=content, headers={"X-Request-Id": called} if called else {})
    assert answer.status_code == 200
    body: str = answer.json()["body"]
    return body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_request_is_called_what_its_client_calls_it(path: str, client: TestClient) -> None:
    """With letters of its own after it, so that no two are called alike, and none begins as another."""
    bodies = [json.loads(sent(client, path, b'{"prompt": [1]}')) for _ in range(2)]
    assert all(re.fullmatch(r"story~[0-9a-f]{8}", body["rid"]) for body in bodies)
    assert bodies[0]["rid"] != bodies[1]["rid"]
    assert {name(body["rid"]) for body in bodies} == {"story"}
    assert all(body["prompt"] == [1] for body in bodies)


@pytest.mark.parametrize(
    ("path", "content", "called"),
    [
        ("/v1/completions", b'{"prompt": [1]}', None),
        ("/v1/completions", b'{"rid": "own"}', "story"),
        ("/v1/completions", b"{", "story"),
        ("/v1/completions", b"[]", "story"),
        ("/other", b'{"prompt": [1]}', "story"),
    ],
)
def test_all_else_passes_as_it_came(path: str, content: bytes, called: str | None, client: TestClient) -> None:
    assert sent(client, path, content, called) == content.decode()


def test_a_body_that_is_too_long_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/completions", content=b"x" * 1001, headers={"X-Request-Id": "story"})
    assert answer.status_code == 413


def filled(path: str, **body: Any) -> tuple[dict[str, Any], Any]:
    return body, SGLANG.generating[path].fill(body, SEQ, CID)


def test_a_completion_that_names_a_snapshot() -> None:
    """The scheduler is told which, beside what the client said there."""
    body, ids = filled("/v1/completions", custom_params={"mine": 1})
    assert body["prompt"] == ids == [5, 6, 7, 8]
    assert body["custom_params"] == {"mine": 1, "kvist": {"snapshot": CID, "sequence": "story"}}

    class Asked:
        class sampling_params:  # noqa: N801  as SGLang calls it
            custom_params = body["custom_params"]

    assert wanted(Asked()) == (CID, "story")


def test_a_chat_that_names_a_snapshot() -> None:
    """Its messages are not rendered; or its ids are checked."""
    body, ids = filled("/v1/chat/completions")
    assert body["input_ids"] == ids == [5, 6, 7, 8]
    assert len(body["messages"]) == 1
    _, ids = filled("/v1/chat/completions", input_ids=[5, 6, 7, 8, 9], messages=[{"role": "user", "content": "hi"}])
    assert ids == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "text"}, "prompt"),
        ("/v1/completions", {"prompt": [5, 6]}, "prompt"),
        ("/v1/completions", {"custom_params": 7}, "custom_params"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "messages"),
        ("/v1/chat/completions", {"input_ids": [1]}, "input_ids"),
        ("/v1/chat/completions", {"input_ids": "text"}, "input_ids"),
    ],
)
def test_what_cannot_be_meant_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest, match=param):
        filled(path, **body)


def test_tenants_have_none_of_sglangs_routes() -> None:
    """It keeps apart only by salts that clients choose."""
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/v1/models", "/flush_cache"):
        assert not SGLANG.rule_of("POST", path).for_tenants
