"""Chat completions, and the clients that people use: the official openai package, and curl."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .conftest import Api

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What grows from a twig? 🌲"}]


@pytest.fixture
def client(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_uses_the_models_template(api: Api) -> None:
    text = "<|bos|><|system|>Be brief.<|end|><|user|>What grows from a twig? 🌲<|end|><|assistant|>"
    ids = api.tokenizer.encode(text, special=False)
    answer = api.complete(MESSAGES, chat=True, max_tokens=8, temperature=0)
    assert answer["prompt_token_ids"] == answer["choices"][0]["prompt_token_ids"] == ids
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["token_ids"] == api.tokens(ids, max_tokens=8, temperature=0)
    parts = [{"type": "text", "text": "What grows "}, {"type": "text", "text": "from a twig? 🌲"}]
    again = api.complete([MESSAGES[0], {"role": "user", "content": parts}], chat=True, max_tokens=8, temperature=0)
    assert again["choices"] == answer["choices"]


def test_chat_template_refuses(api: Api) -> None:
    template = "{% for m in messages %}{{ raise_exception('no ' + m['role']) }}{% endfor %}"
    from kvist.server.errors import BadRequest
    from kvist.server.tokenizer import Tokenizer

    for text, reason in ((template, "no user"), ("{{ messages.__class__.__mro__ }}", "unsafe")):
        with pytest.raises(BadRequest, match=reason):
            Tokenizer(api.tokenizer._backend, {}, text).chat([{"role": "user", "content": "x"}])
    with pytest.raises(BadRequest, match="no chat template"):
        Tokenizer(api.tokenizer._backend, {}, None).chat([])
    marked = "{% generation %}{{ messages[0].content | tojson }}{% endgeneration %}"
    ids = Tokenizer(api.tokenizer._backend, {}, marked).chat([{"role": "user", "content": "<ä>"}])
    assert api.tokenizer.decode(ids) == '"<ä>"'


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "kvist"


def test_openai_completions(api: Api, client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="Once", max_tokens=20, temperature=0, logprobs=2, user="me")
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 20
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    stream = client.completions.create(model="tiny", prompt="Once", max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_openai_chat(client: openai.OpenAI) -> None:
    settings = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0, "n": 2}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == whole.choices[1].message.content
    content = whole.choices[0].logprobs.content
    assert len(content) == 20
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)
    joined = b"".join(bytes(entry.bytes) for entry in content)
    assert joined.decode(errors="replace") == whole.choices[0].message.content
    texts, usage = {0: "", 1: ""}, None
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage
    assert texts == {0: whole.choices[0].message.content, 1: whole.choices[1].message.content}
    assert usage.completion_tokens == 40
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_openai_chat_over_several_turns(api: Api, client: openai.OpenAI) -> None:
    messages: list[Any] = [MESSAGES[1]]
    for _ in range(3):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=4, seed=1)
        messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    assert {"annotations", "audio", "function_call", "refusal", "tool_calls"} <= messages[1].keys()
    empty = {"annotations": [], "tool_calls": [], "refusal": "", "reasoning_content": None}
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    answers = [api.complete(m, chat=True, max_tokens=4, seed=1) for m in (plain, [m | empty for m in plain])]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", presence_penalty=0.5)
    assert caught.value.param == "presence_penalty"
    assert caught.value.code == "invalid_input"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )


async def _async_texts(url: str) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def one() -> str:
            stream = await client.completions.create(model="tiny", prompt="A", max_tokens=10, seed=2, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one() for _ in range(6)))


def test_concurrent_streams(api: Api) -> None:
    import asyncio

    texts = asyncio.run(_async_texts(api.url))
    assert set(texts) == {api.complete("A", max_tokens=10, seed=2)["choices"][0]["text"]}


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], check=True, capture_output=True, text=True).stdout


def test_curl(api: Api) -> None:
    body = json.dumps({"prompt": "A", "max_tokens": 4, "temperature": 0})
    text = json.loads(curl(f"{api.url}/v1/completions", "-d", body))["choices"][0]["text"]
    lines = curl("-N", f"{api.url}/v1/completions", "-d", body[:-1] + ', "stream": true}').strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == text
    assert json.loads(curl("-X", "POST", f"{api.url}/v1/processfork/snapshot"))["branch"] == "main"


def test_bodies_over_the_limit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    big = "x" * (33 * 1024 * 1024)
    for extra in ((), ("-H", "Transfer-Encoding: chunked")):
        command = ["curl", "-sS", "-o", "-", "-w", "\n%{http_code}", *extra, f"{api.url}/v1/completions", "-d", "@-"]
        done = subprocess.run(command, input=big, capture_output=True, text=True, check=False)
        document, _, status = done.stdout.rpartition("\n")
        assert status == "413"
        assert json.loads(document)["error"]["code"] == "body_too_large"
