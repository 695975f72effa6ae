"""Real clients: the official openai package, two hundred at once, and such that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx2
import openai
import pytest

from router.waiting import until

from .conftest import Mock


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


async def stream(client: openai.AsyncOpenAI, number: int, tokens: int) -> tuple[int, int, str | None]:
    """Tokens as counted in the text and as told, and the finish reason."""
    system = "You are a friendly assistant, and you answer briefly. " * 5
    chunks = await client.chat.completions.create(
        model="mock",
        messages=[{"role": "system", "content": system}, {"role": "user", "content": f"Question {number}"}],
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, usage, reason = "", None, None
    async for chunk in chunks:
        usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert usage is not None
    return len(text), usage.completion_tokens, reason


def test_two_hundred_streams_at_once(start: Callable[..., list[Mock]]) -> None:
    (mock,) = start(num_blocks=2048, speedup=1.0)

    async def run() -> list[tuple[int, int, str | None]]:
        async with client(mock.url) as c:
            return await asyncio.gather(*(stream(c, number, 20 + number % 7) for number in range(200)))

    answers = asyncio.run(run())
    assert answers == [(20 + number % 7, 20 + number % 7, "length") for number in range(200)]
    metrics = mock.metrics()
    assert metrics['vllm:request_success_total{finished_reason="length"}'] == 200
    assert metrics["vllm:generation_tokens_total{}"] == sum(tokens for tokens, _, _ in answers)
    assert metrics["vllm:time_to_first_token_seconds_count{}"] == 200
    assert metrics["vllm:prefix_cache_hits_total{}"] > 199 * 256


def test_many_clients_of_a_tiny_pool_all_get_their_tokens(start: Callable[..., list[Mock]]) -> None:
    (mock,) = start(num_blocks=64, max_model_len=1024)

    async def run() -> list[tuple[int, int, str | None]]:
        async with client(mock.url) as c:
            return await asyncio.gather(*(stream(c, number, 100) for number in range(60)))

    assert set(asyncio.run(run())) == {(100, 100, "length")}
    assert mock.metrics()["vllm:num_preemptions_total{}"] > 0
    assert mock.engine.usage == 0


def test_clients_that_leave_free_their_place(start: Callable[..., list[Mock]]) -> None:
    (mock,) = start(num_blocks=1024, speedup=1.0, max_num_seqs=4)

    async def run() -> None:
        async with client(mock.url) as c:

            async def one(number: int) -> None:
                chunks = await c.completions.create(
                    model="mock", prompt=f"{number} never mind", max_tokens=3000, stream=True,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                async for _ in chunks:
                    break
                await chunks.close()

            await asyncio.gather(*(one(number) for number in range(8)))

    asyncio.run(run())
    until(lambda: mock.engine.num_running == mock.engine.num_waiting == 0)
    with pytest.raises(httpx2.ReadTimeout):  # without a stream: gone before there is an answer
        httpx2.post(f"{mock.url}/v1/completions", json={"prompt": "x", "max_tokens": 900}, timeout=0.2)
    until(lambda: mock.engine.num_running == 0)
    assert mock.engine.usage == 0
    metrics = mock.metrics()
    assert metrics['vllm:request_success_total{finished_reason="abort"}'] == 9


def test_a_stream_shows_tokens_as_they_come(start: Callable[..., list[Mock]]) -> None:
    (mock,) = start(num_blocks=1024, speedup=1.0)
    with mock.http.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 16, "stream": True}) as answer:
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
    # 15 decode passes of 5.8 ms each
    assert times[-1] - times[0] > 0.05
    assert len(times) > 4


def test_the_openai_client(mock: Mock) -> None:
    with openai.OpenAI(base_url=f"{mock.url}/v1", api_key="none", max_retries=0) as c:
        assert [model.id for model in c.models.list()] == ["mock"]
        whole = c.completions.create(model="mock", prompt="Once", max_tokens=20, n=2, logprobs=1)
        assert [choice.finish_reason for choice in whole.choices] == ["length"] * 2
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        chat = c.chat.completions.create(
            model="mock", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=5, logprobs=True,
            top_logprobs=2,
        )  # fmt: skip
        assert chat.choices[0].logprobs is not None
        assert len(chat.choices[0].logprobs.content or []) == 5
        for call, error in (({"model": "other"}, openai.NotFoundError), ({"max_tokens": 0}, openai.BadRequestError)):
            try:
                c.completions.create(**{"model": "mock", "prompt": "x", **call})  # type: ignore[call-overload]
            except error as caught:
                assert caught.code == str(caught.status_code)
            else:
                raise AssertionError(f"{call} must fail")


def test_metrics_agree_with_what_was_asked(start: Callable[..., list[Mock]]) -> None:
    (mock,) = start()
    prompt = list(range(100))
    for _ in range(3):
        mock.complete(prompt, max_tokens=10, ignore_eos=True)
    metrics = mock.metrics()
    assert metrics["vllm:prompt_tokens_total{}"] == metrics["vllm:prefix_cache_queries_total{}"] == 300
    assert metrics["vllm:prefix_cache_hits_total{}"] == metrics["vllm:prompt_tokens_cached_total{}"] == 2 * 96
    assert metrics['vllm:prompt_tokens_by_source_total{source="local_compute"}'] == 108
    assert metrics["vllm:generation_tokens_total{}"] == 30
    assert metrics["vllm:inter_token_latency_seconds_count{}"] == 27
    assert metrics["vllm:e2e_request_latency_seconds_count{}"] == 3
    assert metrics["vllm:iteration_tokens_total_sum{}"] == 108 + 30
    assert metrics["vllm:num_requests_running{}"] == metrics["vllm:kv_cache_usage_perc{}"] == 0
    (info,) = (name for name in metrics if name.startswith("vllm:cache_config_info"))
    assert 'block_size="16"' in info
    assert 'num_gpu_blocks="512"' in info
