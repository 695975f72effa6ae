"""The routes as vLLM's: bodies, answers, streams, refusals."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvist.server.tokenizer import Tokenizer
from kvist.testing.models import make_tokenizer

from .conftest import SIZE, Mock

HELLO = [{"role": "user", "content": "What grows from a twig?"}]


def test_equal_requests_have_equal_answers(mock: Mock) -> None:
    one, two = (mock.complete("Once upon a time", max_tokens=40, ignore_eos=True, seed=3) for _ in range(2))
    assert one["choices"] == two["choices"]
    (choice,) = one["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], len(choice["token_ids"])) == ("length", None, 40)
    assert choice["text"] == bytes(choice["token_ids"]).decode()
    others = [("Once upon a time", 4), ("Once upon a dime", 3)]
    texts = {mock.complete(text, max_tokens=40, seed=seed)["choices"][0]["text"] for text, seed in others}
    assert len(texts | {choice["text"]}) == 3
    longer = mock.complete("Once upon a time", max_tokens=60, ignore_eos=True, seed=3)
    assert longer["choices"][0]["text"].startswith(choice["text"])


def test_ids_and_texts_are_the_same_prompts(mock: Mock) -> None:
    text = "Tokens are bytes, ä too."
    ids = list(text.encode())
    assert mock.post("/tokenize", prompt=text).json()["tokens"] == ids
    first, second = mock.complete(text), mock.complete(ids)
    assert first["choices"] == second["choices"]
    assert len(first["choices"][0]["token_ids"]) == 16, "the default of completions"
    both = mock.complete([ids, ids], n=2, max_tokens=3)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in both["choices"][:2]] == [
        choice["token_ids"] for choice in both["choices"][2:]
    ]
    assert both["usage"]["prompt_tokens"] == 2 * len(ids)
    assert both["usage"]["completion_tokens"] == 12
    unknown = mock.complete([4_000_000_000, 1, 2], max_tokens=2)
    assert unknown["usage"]["prompt_tokens"] == 3


def test_streams_say_what_documents_say(mock: Mock) -> None:
    body: dict[str, Any] = {"max_tokens": 30, "n": 2, "seed": 1, "logprobs": 2, "echo": True}
    whole = mock.complete("A stream", **body)
    chunks = mock.events(prompt="A stream", stream_options={"include_usage": True}, **body)
    texts, ends = {0: "", 1: ""}, {}
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert all(text.startswith("A stream") for text in texts.values())
    assert ends == {0: "length", 1: "length"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 60
    logprobs = whole["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 30
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_the_next_turn_of_a_chat_finds_the_answer_in_the_cache(mock: Mock) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief. " * 20}, *HELLO]
    known = 0
    for _ in range(3):
        answer = mock.chat(messages, max_tokens=50, ignore_eos=True)
        usage = answer["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= (known - 1) // SIZE * SIZE
        known = usage["prompt_tokens"] + 49  # the last token is not computed
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    assert known > 400


def test_a_prompt_that_is_cached_is_found_but_for_its_last_token(mock: Mock) -> None:
    prompt = list(range(1000, 1000 + 4 * SIZE))
    cached = [mock.complete(prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached == [0, 3 * SIZE]
    assert mock.held(prompt) == 4


def test_stops(mock: Mock) -> None:
    free = mock.complete("Stop", max_tokens=60, ignore_eos=True)["choices"][0]
    stop = free["text"][20:23]
    (cut,) = mock.complete("Stop", max_tokens=60, ignore_eos=True, stop=[stop, "never"])["choices"]
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert len(cut["token_ids"]) == len(cut["text"]) + 3
    chunks = mock.events(prompt="Stop", max_tokens=60, ignore_eos=True, stop=stop)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == cut["text"]
    token = free["token_ids"][10]
    (cut,) = mock.complete("Stop", max_tokens=60, stop_token_ids=[token], ignore_eos=True)["choices"]
    first = free["token_ids"].index(token)
    assert cut["token_ids"] == free["token_ids"][: first + 1]
    assert cut["text"] == free["text"][:first], "the token that stops is not in the text"
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", token)
    (late,) = mock.complete("Stop", max_tokens=60, stop_token_ids=[token], min_tokens=30)["choices"]
    assert len(late["token_ids"]) > 30


def test_answers_that_end_by_themselves(start: Callable[..., list[Mock]]) -> None:
    (mock,) = start(mean=20.0)
    lengths = []
    for seed in range(60):
        (choice,) = mock.complete("How long?", max_tokens=1000, seed=seed)["choices"]
        lengths.append(len(choice["token_ids"]))
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        assert choice["token_ids"][-1] == 256, "it ends with the end of text"
        assert len(choice["text"]) == len(choice["token_ids"]) - 1, "which is none"
    assert 10 < sum(lengths) / len(lengths) < 40
    short = lengths.index(min(lengths))
    forced = mock.complete("How long?", max_tokens=100, seed=short, ignore_eos=True)["choices"][0]
    assert (len(forced["token_ids"]), forced["finish_reason"]) == (100, "length")
    least = mock.complete("How long?", max_tokens=100, seed=short, min_tokens=50)["choices"][0]
    assert len(least["token_ids"]) > 50
    chat = mock.chat(HELLO)["choices"][0]
    assert chat["finish_reason"] == "stop", "though nothing else ends it"


def test_a_sequence_ends_with_the_context(mock: Mock) -> None:
    answer = mock.complete([5] * 4000, max_tokens=200, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 96
    assert answer["choices"][0]["finish_reason"] == "length"


def error_of(answer: httpx2.Response, status: int, kind: str, param: str | None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (kind, status, param)
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": [5] * 4097}, "input_tokens", "maximum context length is 4096 tokens.* contains 4097 input tokens"),
        ({"prompt": [5] * 4096}, None, r"plus the number of requested output tokens \(at least 1\) is longer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
        ({"prompt": "x", "max_tokens": 5000}, "max_tokens", "cannot be greater than max_model_len=4096"),
        ({"prompt": "x", "max_tokens": 5, "min_tokens": 6}, "min_tokens", "got 6"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens", "expected"),
        ({"prompt": "x", "temperature": -1}, "temperature", "expected"),
        ({"prompt": ""}, "prompt", "cannot be empty"),
        ({"prompt": []}, "prompt", "cannot be empty"),
        ({}, "prompt", "cannot be empty"),
        ({"prompt": [5, "x"]}, "prompt", "mixture"),
        ({"prompt": [-1]}, "prompt[0]", "expected"),
        ({"prompt": "x", "n": 128, "stream_options": {}}, "stream_options", "only with stream"),
        ({"prompt": ["x"] * 1000, "n": 2}, "n", "at most 1024 choices"),
    ],
)
def test_bad_completions(mock: Mock, body: dict[str, Any], param: str | None, says: str) -> None:
    import re

    message = error_of(mock.post("/v1/completions", **body), 400, "BadRequestError", param)
    assert re.search(says, message), message


def test_other_refusals(mock: Mock) -> None:
    error_of(mock.post("/v1/completions", prompt="x", model="other"), 404, "NotFoundError", "model")
    error_of(mock.post("/v1/chat/completions"), 400, "BadRequestError", "messages")
    error_of(mock.post("/v1/chat/completions", messages=[{"role": "user"}], max_completion_tokens=0), 400,
             "BadRequestError", "max_completion_tokens")  # fmt: skip
    error_of(mock.http.post("/v1/completions", content=b"{"), 400, "BadRequestError", None)
    error_of(mock.http.get("/v1/completions"), 405, "Method Not Allowed", None)
    error_of(mock.http.get("/nothing"), 404, "Not Found", None)
    error_of(mock.post("/mock/held", prompt=["a", "b"]), 400, "BadRequestError", "prompt")
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    error_of(mock.post("/v1/chat/completions", messages=picture), 400, "BadRequestError", "messages[0].content[0].type")


def test_what_a_mock_has_no_use_for_is_passed_over(mock: Mock) -> None:
    plain = mock.complete("x", max_tokens=5, seed=1)
    more = {"presence_penalty": 1.5, "response_format": {"type": "json_object"}, "nvext": {}, "repetition_penalty": 2}
    assert mock.complete("x", max_tokens=5, seed=1, temperature=0.3, **more)["choices"] == plain["choices"]


def test_tools_and_their_calls_are_part_of_the_prompt(mock: Mock) -> None:
    def tokens(messages: list[Any], **body: Any) -> list[int]:
        return list(mock.post("/tokenize", messages=messages, **body).json()["tokens"])

    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "look"}}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "seen"}
    text = bytes(token for token in tokens([*HELLO, call, result]) if token < 256).decode()
    assert (
        text == 'What grows from a twig?{"tool_calls":[{"function":{"name":"look"},"id":"1"}]}seen{"tool_call_id":"1"}'
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}], "custom": 1}]
    assert bytes(token for token in tokens(parts) if token < 256).decode() == 'a{"custom":1}'
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert len(tokens(HELLO, tools=tools)) > len(tokens(HELLO)) + 40
    assert mock.chat(HELLO, tools=tools, max_tokens=3)["usage"]["prompt_tokens"] == len(tokens(HELLO, tools=tools))


def test_small_routes(mock: Mock) -> None:
    assert mock.http.get("/health").content == mock.http.get("/ping").content == b""
    assert "version" in mock.http.get("/version").json()
    (model,) = mock.http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("mock", 4096)
    answer = mock.http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["id"] == "cmpl-mine"


def test_a_tokenizer_of_ones_own(start: Callable[..., list[Mock]], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_tokenizer(tmp_path))
    assert tokenizer is not None
    (mock,) = start(tokenizer=tokenizer)
    messages: list[Any] = [{"role": "system", "content": "Be brief. " * 20}, *HELLO]
    answer = mock.chat(messages, max_tokens=64, ignore_eos=True)
    content = answer["choices"][0]["message"]["content"]
    assert tokenizer.encode(content, special=False) == answer["choices"][0]["token_ids"], "text and ids round-trip"
    more = [*messages, {"role": "assistant", "content": content}, *HELLO]
    cached = mock.chat(more, max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (answer["usage"]["total_tokens"] - 1) // SIZE * SIZE


def test_curl(mock: Mock) -> None:
    command = ["curl", "-sS", "-N", f"{mock.url}/v1/completions", "-d", '{"prompt": "A", "stream": true}']
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.endswith("data: [DONE]\n\n")
