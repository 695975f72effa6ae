"""Requests that name a snapshot: what reaches vLLM of them, and that nothing else is touched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from kvist.repo import LogicalSeq, Manifest
from kvist.server.schema import BODY_MAX
from kvist.testing.vllm_core import LAYOUT

from .conftest import IDS, PATH, AsgiCall, Live, error_of, make_app


@pytest.fixture
def cid(live: Live) -> str:
    return str(live.ask("snapshot", request_id="a", name="demo")["cid"])


def test_an_empty_prompt_is_filled(live: Live, cid: str) -> None:
    for prompt in ({}, {"prompt": None}, {"prompt": ""}, {"prompt": []}):
        body = live.complete("demo", max_tokens=5, **prompt)
        assert body["prompt"] == IDS
        assert body["kv_transfer_params"] == {"snapshot": cid, "sequence": "cmpl-a-0"}
        assert (body["model"], body["max_tokens"]) == ("m", 5)
    assert live.engine.calls["checkout"] == 1
    assert list(live.engine.checkouts) == [cid]


def test_a_chat_is_filled(live: Live, cid: str) -> None:
    for messages in ({}, {"messages": []}, {"messages": None}):
        body = live.complete("demo", chat=True, transfer={"mine": 1}, **messages)
        assert body["kv_transfer_params"] == {
            "snapshot": cid, "sequence": "cmpl-a-0", "prompt_token_ids": IDS, "mine": 1,
        }  # fmt: skip
        assert body["messages"] == [{"role": "user", "content": ""}]
        assert "prompt" not in body
    longer = [*IDS, 40, 41]
    texts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    body = live.complete("demo", chat=True, messages=texts, transfer={"prompt_token_ids": longer})
    assert body["kv_transfer_params"]["prompt_token_ids"] == longer
    assert body["messages"] == texts


def test_prompts_that_start_with_the_snapshot(live: Live, cid: str) -> None:
    assert live.complete("demo", prompt=[*IDS, 40])["prompt"] == [*IDS, 40]
    assert live.complete(cid, prompt=[[*IDS, 40], IDS])["prompt"] == [[*IDS, 40], IDS]
    assert live.complete(cid[:20], transfer={"sequence": "cmpl-a-0"})["kv_transfer_params"]["snapshot"] == cid


def test_sampling_goes_on(live: Live, cid: str) -> None:
    body = live.complete("demo")
    assert (body["temperature"], body["seed"], body["min_tokens"]) == (0.5, 3, 20)
    assert "stop" not in body and "max_tokens" not in body
    body = live.complete("demo", temperature=0, seed=9, min_tokens=None)
    assert (body["temperature"], body["seed"], body["min_tokens"]) == (0, 9, 20)
    assert "min_tokens" not in live.complete("demo", prompt=[*IDS, 40])


def test_request_names(live: Live, cid: str) -> None:
    def headers(**given: str) -> dict[str, str]:
        answer = live.post("/v1/completions", {"kv_transfer_params": {"snapshot": "demo"}}, **given)
        return dict(json.loads(answer.headers["x-headers"]))

    assert headers(**{"X-Request-Id": "mine"})["x-request-id"] == "mine"
    assert headers()["x-request-id"] != headers()["x-request-id"]
    assert len(headers()["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("completions", {"prompt": "text"}, 400, "prompt"),
        ("completions", {"prompt": ["text"]}, 400, "prompt"),
        ("completions", {"prompt": [1, 2, 3]}, 400, "prompt"),
        ("completions", {"prompt": IDS[:-1]}, 400, "prompt"),
        ("completions", {"prompt": [IDS, [1]]}, 400, "prompt"),
        ("completions", {"prompt": [True] * 20}, 400, "prompt"),
        ("completions", {"prompt_embeds": "AAAA"}, 400, "prompt_embeds"),
        ("completions", {"truncate_prompt_tokens": 4}, 400, "truncate_prompt_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}, 400, "messages"),
        ("chat/completions", {"echo": True}, 400, "messages"),
        ("completions", {"kv_transfer_params": {"snapshot": "nowhere"}}, 404, None),
        ("completions", {"kv_transfer_params": {"snapshot": "demo", "sequence": "other"}}, 404, None),
        ("completions", {"kv_transfer_params": {"snapshot": 3}}, 400, "kv_transfer_params.snapshot"),
        ("completions", {"kv_transfer_params": {"snapshot": "demo", "sequence": 3}}, 400,
         "kv_transfer_params.sequence"),
        ("chat/completions", {"kv_transfer_params": {"snapshot": "demo", "prompt_token_ids": [1]}}, 400,
         "kv_transfer_params.prompt_token_ids"),
        ("chat/completions", {"kv_transfer_params": {"snapshot": "demo", "prompt_token_ids": "x"}}, 400,
         "kv_transfer_params.prompt_token_ids"),
        ("chat/completions", {"kv_transfer_params": {"snapshot": "demo", "prompt_token_ids": IDS},
                              "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ],
)  # fmt: skip
def test_refusals(live: Live, cid: str, path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    answer = live.post(f"/v1/{path}", {"kv_transfer_params": {"snapshot": "demo"}} | body)
    error = error_of(answer, status, "invalid_input" if status == 400 else "not_found")
    assert error["param"] == param


def test_several_sequences(live: Live, cid: str) -> None:
    live.engine.add("cmpl-a-1", [*IDS, 20])
    live.ask("snapshot", name="both")
    named = {"kv_transfer_params": {"snapshot": "both"}}
    message = error_of(live.post("/v1/completions", named), 400, "invalid_input")["message"]
    assert "'cmpl-a-0', 'cmpl-a-1'" in message
    assert live.complete("both", transfer={"sequence": "cmpl-a-1"})["prompt"] == [*IDS, 20]


def test_a_sequence_without_ids(live: Live) -> None:
    with live.repo() as repo:
        repo.commit([Manifest(LAYOUT, (), (LogicalSeq("bare", ()),), {})], branch="bare")
    answer = live.post("/v1/completions", {"kv_transfer_params": {"snapshot": "bare"}})
    assert "without token ids" in error_of(answer, 400, "invalid_input")["message"]


def test_many_at_once_check_out_once(live: Live, cid: str, serve: Callable[..., Live]) -> None:
    other = serve()

    async def go() -> Any:
        body = {"kv_transfer_params": {"snapshot": "demo"}}
        return await asyncio.gather(*(other.http.post("/v1/completions", json=body) for _ in range(12)))

    assert {answer.status_code for answer in other.run(go())} == {200}
    assert other.engine.calls["checkout"] == 1
    other.engine.checkouts.clear()  # the engine forgot it
    assert other.complete("demo")["prompt"] == IDS
    assert other.engine.calls["checkout"] == 2


# -- what passes ---------------------------------------------------------------------------------------------------

PLAIN = [
    b'{"prompt": "text",  "max_tokens": 1}',
    b'{"kv_transfer_params": {"do_remote_decode": true}, "prompt": "snapshot"}',
    b'{"kv_transfer_params": {"snapshot": null}}',
    b'{"kv_transfer_params": null, "user": "snapshot"}',
    b'["kv_transfer_params", "snapshot"]',
    b'{"kv_transfer_params": {"snapshot": ',
    b"",
]


@pytest.mark.parametrize("data", PLAIN)
def test_bodies_pass_byte_for_byte(live: Live, data: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = live.run(live.http.post(path, content=data, headers={"content-type": "application/json"}))
        assert answer.content == data
        seen = json.loads(answer.headers["x-headers"])
        assert "x-request-id" not in seen


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/embeddings", "application/json"), ("/v1/completions", "text/plain"), ("/v1/completions", "")],
)
def test_other_routes_and_types_pass_unread(live: Live, path: str, kind: str) -> None:
    data = b'{"kv_transfer_params": {"snapshot": "nowhere"}}'
    answer = live.run(live.http.post(path, content=data, headers={"content-type": kind}))
    assert (answer.status_code, answer.content) == (200, data)


def test_bodies_in_pieces(live: Live, cid: str) -> None:
    async def go(pieces: list[bytes]) -> AsgiCall:
        call = AsgiCall("/v1/completions")
        task = call.start(live.app)
        for number, piece in enumerate(pieces):
            call.body(piece, more=number < len(pieces) - 1)
            await asyncio.sleep(0)
        await task
        return call

    plain = live.run(go([b'{"pro', b"", b'mpt": ', b"1}"]))
    assert plain.data == b'{"prompt": 1}'
    named = live.run(go([b'{"kv_transfer_params": {"snap', b'shot": "demo"}}']))
    assert json.loads(named.data)["prompt"] == IDS


def test_huge_bodies_pass(live: Live) -> None:
    data = b'{"kv_transfer_params": {"snapshot": "nowhere"}, "prompt": "' + b"x" * BODY_MAX + b'"}'
    answer = live.run(live.http.post("/v1/completions", content=data, headers={"content-type": "application/json"}))
    assert answer.content == data

    async def unannounced() -> AsgiCall:
        call = AsgiCall("/v1/completions")
        call.body(data[: BODY_MAX - 5], more=True)
        call.body(data[BODY_MAX - 5 : BODY_MAX + 5], more=True)
        call.body(data[BODY_MAX + 5 :])
        await call.start(live.app)
        return call

    assert live.run(unannounced()).data == data


def test_a_client_that_goes_while_it_sends(live: Live) -> None:
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            seen.append(message["type"])
            if message["type"] == "http.disconnect":
                return

    from kvist.server.live.gate import Door
    from kvist.server.live.resume import Resume
    from kvist.server.live.snapshots import Snapshots
    from kvist.server.vllm.dialect import VLLM

    async def go() -> None:
        call = AsgiCall("/v1/completions")
        call.body(b'{"kv_transfer', more=True)
        call.disconnect()
        await call.start(Resume(inner, Snapshots(), Door(VLLM)))

    live.run(go())
    assert seen == ["http.request", "http.disconnect"]


def test_streams_flow(serve: Callable[..., Live]) -> None:
    """Answers come piece by piece, and a client that leaves ends them; also where the request named a snapshot."""
    gate = asyncio.Event()

    async def slow(request: Request) -> StreamingResponse:
        await request.body()

        async def events() -> Any:
            yield b"data: 1\n\n"
            await gate.wait()
            yield b"data: 2\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    live = serve(app=make_app(Route("/v1/completions", slow, methods=["POST"])))
    live.engine.add("cmpl-a-0", IDS)
    live.ask("snapshot", name="demo")

    async def go(data: bytes, leave: bool) -> list[bytes]:
        gate.clear()
        call = AsgiCall("/v1/completions")
        call.body(data)
        task = call.start(live.app)
        while len(call.sent) < 2:
            await asyncio.sleep(0.001)
        assert call.data == b"data: 1\n\n"
        assert not task.done()
        if leave:
            call.disconnect()
        else:
            gate.set()
        await asyncio.wait_for(task, 5)
        return [message.get("body", b"") for message in call.sent]

    for data in (b'{"prompt": "x", "stream": true}', b'{"kv_transfer_params": {"snapshot": "demo"}, "stream": true}'):
        assert b"data: 2\n\n" in live.run(go(data, leave=False))
        assert b"data: 2\n\n" not in live.run(go(data, leave=True))


def test_mounted_below_a_prefix(live: Live, cid: str) -> None:
    """A proxy that passes its prefix on (``--root-path``)."""
    live.app.root_path = "/vllm"  # type: ignore[attr-defined]

    async def rooted(scope: Any, receive: Any, send: Any) -> None:
        await live.app({**scope, "root_path": "/vllm"}, receive, send)

    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(rooted), base_url="http://127.0.0.1")
    answer = live.run(http.post("/vllm/v1/completions", json={"kv_transfer_params": {"snapshot": "demo"}}))
    assert json.loads(answer.content)["prompt"] == IDS
    assert live.run(http.get(f"/vllm{PATH}/snapshots")).json()["total"] == 1
