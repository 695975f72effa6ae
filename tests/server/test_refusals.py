"""What is refused, with 400 and by name: wrong types, unknown fields, parameters that nobody obeys."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvist.server.schema import _NEUTRAL, HARMLESS

from .conftest import Api, error_of

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt[...]"),
        ({"prompt": [1.5]}, "prompt[...]"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 5000}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": ["a"] * 20, "n": 100}, "n"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 1, "echo": True}, "logprobs"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop[...]"),
        ({"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids[...]"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"prompt": "a", "kvist": {"logit": True}}, "kvist.logit"),
        ({"prompt": "a", "kv_transfer_params": {"sequence": "x"}}, "kv_transfer_params.snapshot"),
        ({"prompt": "a", "kv_transfer_params": {"snapshot": 5}}, "kv_transfer_params.snapshot"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a", "colour": "red"}, "colour"),
    ],
)  # fmt: skip
def test_bad_completions(api: Api, body: dict[str, Any], param: str) -> None:
    found = error_of(api.post("/v1/completions", body), 400, "invalid_input")["param"]
    assert re.sub(r"\[\d+\]", "[...]", found) == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[...].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[...].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[...].content[...].type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[...].tool_calls"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[...].audio"),
        ({"messages": [{"role": "user", "content": "hi", "colour": "red"}]}, "messages[...].colour"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT | {"max_completion_tokens": 5000}, "max_completion_tokens"),
        (CHAT | {"logprobs": 2}, "logprobs"),
        (CHAT | {"echo": True}, "echo"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_bad_chats(api: Api, body: dict[str, Any], param: str) -> None:
    error = error_of(api.post("/v1/chat/completions", body), 400, "invalid_input")
    assert re.sub(r"\[\d+\]", "[...]", error["param"]) == param
    assert param.split("[")[0].split(".")[0] in error["message"]


_WRONG = [5, "x", [1], {"a": 1}, True, False, 0, 1, {}, []]


@pytest.mark.parametrize("name", sorted(_NEUTRAL))
def test_parameters_that_nobody_obeys(api: Api, name: str) -> None:
    for value in [None, *_NEUTRAL[name]]:
        assert api.post("/v1/completions", {"prompt": "a", "max_tokens": 1, name: value}).status_code == 200
    wrong = next(value for value in _WRONG if value not in _NEUTRAL[name])
    error = error_of(api.post("/v1/completions", {"prompt": "a", name: wrong}), 400, "invalid_input")
    assert error["param"] == name
    assert name in error["message"]


def test_a_boolean_is_no_number(api: Api) -> None:
    error_of(api.post("/v1/completions", {"prompt": "a", "presence_penalty": False}), 400, "invalid_input")
    error_of(api.post("/v1/completions", {"prompt": "a", "use_beam_search": 0}), 400, "invalid_input")


def test_harmless_fields(api: Api) -> None:
    assert api.complete("a", max_tokens=1, **dict.fromkeys(HARMLESS, "anything"))


def test_a_request_s_name_is_remembered_and_bounded(api: Api) -> None:
    api.complete("a", max_tokens=1, headers={"X-Request-Id": "x" * 200})
    refused = api.post("/v1/completions", {"prompt": "a"}, **{"X-Request-Id": "x" * 201})
    assert "X-Request-Id" in error_of(refused, 400, "invalid_input")["message"]


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b"5", b"\xff", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 100_000]
)
def test_bodies_that_are_no_json_object(api: Api, data: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/processfork/snapshot", "/v1/processfork/fork"):
        error_of(api.http.post(path, content=data), 400, "invalid_input")


def test_ids_out_of_the_vocabulary(api: Api) -> None:
    message = error_of(api.post("/v1/completions", {"prompt": [1, 512]}), 400, "invalid_input")["message"]
    assert "512" in message


def test_prompts_that_are_too_long(api: Api) -> None:
    too_long = [5] * (api.engine.max_model_len + 1)
    assert (
        str(len(too_long))
        in error_of(api.post("/v1/completions", {"prompt": too_long}), 400, "invalid_input")["message"]
    )
    full = [5] * (api.engine.max_model_len - 1)
    assert len(api.tokens(full)) == 1
    error_of(api.post("/v1/completions", {"prompt": full, "max_tokens": 2}), 400, "invalid_input")


def test_too_many_logits_at_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.server.plan._LOGITS_MAX", 10_000)
    body = {"prompt": "a", "max_tokens": 10, "kvist": {"logits": True}}
    for more in ({}, {"max_tokens": 1, "n": 5}, {"max_tokens": 1, "prompt": ["a"] * 5}):
        error = error_of(api.post("/v1/completions", body | more), 400, "invalid_input")
        assert error["param"] == "kvist.logits"
    assert api.post("/v1/completions", body | {"max_tokens": 2, "n": 2}).status_code == 200


def test_routes_and_methods(api: Api) -> None:
    error_of(api.http.get("/v1/nothing"), 404, "not_found")
    error_of(api.http.get("/v1/completions"), 405, "method_not_allowed")
    error_of(api.post("/v1/completions", {"model": "other", "prompt": "a"}), 404, "not_found")


@pytest.mark.parametrize(
    ("what", "body", "param"),
    [
        ("snapshot", {"names": "x"}, "names"),
        ("snapshot", {"name": 5}, "name"),
        ("snapshot", {"request_id": "a", "sequence": "b"}, "sequence"),
        ("fork", {}, "cid"),
        ("fork", {"cid": "x", "n": "2"}, "n"),
        ("checkout", {}, "cid"),
        ("checkout", {"cid": "x", "sequences": "all"}, "sequences"),
    ],
)
def test_bad_snapshot_bodies(api: Api, what: str, body: dict[str, Any], param: str) -> None:
    assert error_of(api.post(f"/v1/processfork/{what}", body), 400, "invalid_input")["param"] == param
