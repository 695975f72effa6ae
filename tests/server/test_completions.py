"""``/v1/completions`` over real HTTP."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pytest

from kvist.engines.hf import Request, SamplingParams, StepOutput
from kvist.server.generation import Choice, Start

from .conftest import Api, error_of

PROMPT = "The quick brown fox"


def test_models_health_and_version(api: Api) -> None:
    (model,) = api.get("/v1/models")["data"]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == api.engine.max_model_len
    assert api.get("/v1/models/tiny") == model
    error_of(api.http.get("/v1/models/other"), 404, "not_found")
    assert api.get("/health") == {"status": "ok"}
    assert set(api.get("/version")) == {"version"}


def test_text_is_what_the_tokens_decode_to(api: Api) -> None:
    answer = api.complete(PROMPT, max_tokens=40, temperature=0)
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == api.tokenizer.encode(PROMPT)
    assert len(choice["token_ids"]) == 40
    assert api.tokenizer.decode([*choice["prompt_token_ids"], *choice["token_ids"]]) == PROMPT + choice["text"]
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(choice["prompt_token_ids"])
    assert usage["completion_tokens"] == 40
    assert usage["total_tokens"] == usage["prompt_tokens"] + 40


def test_prompts_of_every_form_give_the_same(api: Api) -> None:
    ids = api.tokenizer.encode(PROMPT)
    settings = {"max_tokens": 5, "temperature": 0}
    expected = api.tokens(PROMPT, **settings)
    assert api.tokens(ids, **settings) == expected
    for several in ([PROMPT, "And then"], [ids, api.tokenizer.encode("And then")]):
        choices = api.complete(several, **settings)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert choices[0]["token_ids"] == expected
        assert choices[1]["prompt_token_ids"] == api.tokenizer.encode("And then")


def test_seeds_repeat_and_choices_differ(api: Api) -> None:
    settings = {"max_tokens": 12, "seed": 7, "temperature": 1.2, "top_p": 0.95, "top_k": 50}
    choices = api.complete([PROMPT, "And"], n=2, **settings)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["token_ids"] != choices[1]["token_ids"]
    assert api.tokens(PROMPT, **settings) == choices[0]["token_ids"]
    assert api.tokens(PROMPT, **{**settings, "seed": 8}) == choices[1]["token_ids"]
    assert api.complete([PROMPT, "And"], n=2, **settings)["usage"]["prompt_tokens"] == len(
        api.tokenizer.encode(PROMPT)
    ) + len(api.tokenizer.encode("And"))
    assert api.tokens(PROMPT, max_tokens=12) != api.tokens(PROMPT, max_tokens=12)


def test_echo(api: Api) -> None:
    plain = api.complete(PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"]
    assert api.complete(PROMPT, max_tokens=4, temperature=0, echo=True)["choices"][0]["text"] == PROMPT + plain
    nothing = api.complete(PROMPT, max_tokens=0, echo=True)
    assert nothing["choices"][0]["text"] == PROMPT
    assert nothing["choices"][0]["finish_reason"] == "length"
    assert nothing["usage"]["completion_tokens"] == 0


def test_logprobs(api: Api) -> None:
    choice = api.complete(PROMPT, max_tokens=12, temperature=0, logprobs=3, kvist={"logits": True})["choices"][0]
    logprobs = choice["logprobs"]
    rows = np.frombuffer(base64.b64decode(choice["kvist"]["logits"]), "<f4").reshape(choice["kvist"]["shape"])
    assert rows.shape == (12, api.engine.model.vocab)
    assert rows.argmax(axis=1).tolist() == choice["token_ids"]
    for row, token, logprob in zip(rows, choice["token_ids"], logprobs["token_logprobs"], strict=True):
        assert logprob == pytest.approx(row[token] - np.logaddexp.reduce(row.astype(np.float64)), abs=1e-4)
    assert all(3 <= len(top) <= 4 for top in logprobs["top_logprobs"])
    for name, top, logprob in zip(
        logprobs["tokens"], logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True
    ):
        assert top[name] == logprob == max(top.values())
        assert math.isfinite(logprob)
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for name, offset in zip(logprobs["tokens"], offsets, strict=True):
        if not name.startswith(("bytes:", "token_id:")):
            assert name in choice["text"][offset:]
    by_id = api.complete(PROMPT, max_tokens=12, temperature=0, logprobs=3, return_tokens_as_token_ids=True)
    by_id = by_id["choices"][0]["logprobs"]
    assert by_id["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert by_id["token_logprobs"] == logprobs["token_logprobs"]
    assert all(
        len(top) == len(named) for top, named in zip(by_id["top_logprobs"], logprobs["top_logprobs"], strict=True)
    )
    chat = {"prompt": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    told = api.complete(chat=True, return_tokens_as_token_ids=True, **chat)["choices"][0]
    assert [entry["token"] for entry in told["logprobs"]["content"]] == [f"token_id:{n}" for n in told["token_ids"]]
    sampled = api.complete(PROMPT, max_tokens=3, logprobs=0, seed=1)["choices"][0]["logprobs"]
    assert [len(top) for top in sampled["top_logprobs"]] == [1, 1, 1]


def test_stop_strings_end_the_text_and_the_sequence(api: Api) -> None:
    settings = {"max_tokens": 60, "temperature": 0}
    whole = api.complete(PROMPT, **settings)["choices"][0]
    text = whole["text"]
    for start, length in ((9, 1), (20, 3), (30, 7)):
        stop = text[start : start + length]
        found = text.index(stop)
        answer = api.complete(PROMPT, stop=[stop, "never to be found"], **settings)
        choice = answer["choices"][0]
        assert choice["text"] == text[:found]
        assert choice["finish_reason"] == "stop"
        ids = choice["token_ids"]
        assert ids == whole["token_ids"][: len(ids)]
        assert len(ids) < 60
        before = api.tokenizer.decode([*choice["prompt_token_ids"], *ids[:-1]])
        assert not before.startswith(PROMPT + text[: found + length]), "the sequence went on after the stop string"
        streamed = list(api.events({"prompt": PROMPT, "stop": stop, **settings}))
        assert "".join(event["choices"][0]["text"] for event in streamed) == text[:found]
        # it is finished and there, without what came after the stop string
        taken = api.fork("snapshot", request_id=answer["id"])
        assert [seq["tokens"] for seq in taken["sequences"]] == [len(choice["prompt_token_ids"]) + len(ids)]
        going_on = api.tokens(None, kv_transfer_params={"snapshot": taken["cid"]}, max_tokens=60 - len(ids))
        assert going_on == whole["token_ids"][len(ids) :]


def test_a_stop_string_in_the_last_token_ends_the_text(api: Api) -> None:
    whole = api.complete(PROMPT, max_tokens=10, temperature=0)["choices"][0]
    choice = api.complete(PROMPT, max_tokens=10, temperature=0, stop=whole["text"][-1:])["choices"][0]
    found = whole["text"].index(whole["text"][-1:])
    assert (choice["text"], choice["finish_reason"]) == (whole["text"][:found], "stop")
    # here the stop string is U+FFFD for bytes that no further token completes: it comes when the text ends
    half = next(n for n in range(3, 512) if api.tokenizer.piece(n) == b"\xc3")
    pieces: list[Any] = []
    ended = Choice(0, "x", Start([], SamplingParams()), api.tokenizer.decode, ["\ufffd"], pieces.append)
    ended.request = Request("x", 0, None)
    ended._submitted.set()
    ended._on_event(StepOutput(half, 0.0))
    ended.request.finish_reason = "length"
    ended._on_event(None)
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("", None), ("", "stop")]


def test_stop_ids_and_ignore_eos(api: Api) -> None:
    ids = api.tokens(PROMPT, max_tokens=20, temperature=0)
    choice = api.complete(PROMPT, max_tokens=20, temperature=0, stop_token_ids=[ids[7]])["choices"][0]
    assert choice["token_ids"] == ids[: ids.index(ids[7]) + 1]
    assert choice["finish_reason"] == "stop"
    assert len(api.tokens(PROMPT, max_tokens=50, temperature=2, seed=3, ignore_eos=True)) == 50


def test_stream_equals_whole(api: Api) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "seed": 11, "n": 3, "logprobs": 2, "return_token_ids": True}
    body["kvist"] = {"logits": True}
    answer = api.post("/v1/completions", body).json()
    joined = [{"text": "", "token_ids": [], "tokens": [], "offsets": [], "logits": b""} for _ in range(3)]
    for event in api.events(body):
        assert event["object"] == "text_completion"
        assert "usage" not in event
        (choice,) = event["choices"]
        into = joined[choice["index"]]
        into["text"] += choice["text"]
        into["token_ids"] += choice["token_ids"]
        into["tokens"] += choice["logprobs"]["tokens"]
        into["offsets"] += choice["logprobs"]["text_offset"]
        into["logits"] += base64.b64decode(choice["kvist"]["logits"])
        into["finish_reason"] = choice["finish_reason"]
    for choice, into in zip(answer["choices"], joined, strict=True):
        assert into["text"] == choice["text"]
        assert into["token_ids"] == choice["token_ids"]
        assert into["tokens"] == choice["logprobs"]["tokens"]
        assert into["offsets"] == choice["logprobs"]["text_offset"]
        assert into["logits"] == base64.b64decode(choice["kvist"]["logits"])
        assert into["finish_reason"] == choice["finish_reason"]


def test_stream_never_cuts_a_character(api: Api) -> None:
    prompt = api.tokenizer.encode("Wörter 木 🌲")
    for seed in range(2):
        settings = {"max_tokens": 40, "seed": seed, "temperature": 3}
        texts = [event["choices"][0]["text"] for event in api.events({"prompt": prompt, **settings})]
        assert "".join(texts) == api.complete(prompt, **settings)["choices"][0]["text"]


def test_usage_in_streams(api: Api) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "stream_options": {"include_usage": True}}
    *parts, last = api.events(body)
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0


def test_cached_tokens(api: Api) -> None:
    prompt = [(7 * n) % 500 + 3 for n in range(100)]
    first = api.complete(prompt, max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"]
    second = api.complete(prompt, max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first < 16
    assert second == 99


@pytest.mark.parametrize("n", [1, 2])
def test_names_of_a_request(api: Api, n: int) -> None:
    answer = api.http.post(
        "/v1/completions", json={"prompt": PROMPT, "n": n, "max_tokens": 2}, headers={"X-Request-Id": f"mine {n}"}
    )
    assert answer.headers["x-request-id"] == f"mine {n}"
    by_client = api.fork("snapshot", request_id=f"mine {n}")
    by_us = api.fork("snapshot", request_id=answer.json()["id"])
    assert by_client["branch"] == by_us["branch"] == f"seq/{answer.json()['id']}"
    assert [seq["id"] for seq in by_us["sequences"]] == [seq["id"] for seq in by_client["sequences"]]
    assert len(by_us["sequences"]) == n
    assert by_us["parents"] == [by_client["cid"]]
