"""Beam search where every request begins with the server's default cartridge: the same beams as after its document."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cartridging import connector
from injecting import BEGIN, document, prefilled

from kvist.testing.scenario.requests import error_of
from kvist.testing.vllm import VllmServer

DOCUMENT = document(77, 1)
WIDTH, TOKENS = 3, 8
SAME = 1e-3
"""Most that the log probability of a whole beam differs by, in float32."""
TEXT = "What is the answer to the first question?"

_BEAMS = (
    BEGIN
    + """
from vllm.sampling_params import BeamSearchParams
model, config, document, prompts, text, width, tokens = arguments

def beams(llm, *prompts):
    search = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
    return [[{"ids": list(one.tokens)[-tokens:], "score": one.cum_logprob} for one in answer.sequences]
            for answer in llm.beam_search(list(prompts), search)]

def ids(*prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]

llm = make_llm(model, dtype="float32")
tokenizer = llm.get_tokenizer()
own = tokenizer.encode(text)
begun = {"prompt_token_ids": [tokenizer.bos_token_id, *own], "prompt": text}  # as most tokenizers have it
out = {"document": beams(llm, *ids(*(document + prompt for prompt in (*prompts, own, own))))}
out["bare"] = beams(llm, *ids(*prompts, own), begun)
del llm
llm = make_llm(model, config=config, dtype="float32")
out["placed"] = beams(llm, *ids(*prompts), text, begun)
out["texts"] = [tokenizer.decode(one["ids"]) for one in out["placed"][-1]]
out["left"] = left(llm)
emit(out)
"""
)


@pytest.fixture(scope="module")
def path(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prefilled(model("tiny", dtype="float32"), DOCUMENT, tmp_path_factory.mktemp("cartridges") / "a", "a")


@pytest.fixture(scope="module")
def found(path: Path, model: Callable[..., Path], run_offline: Callable[..., Any]) -> dict[str, Any]:
    """What `LLM.beam_search` finds after the document, without it, and with the cartridge."""
    prompts = [document(length, seed=length) for length in (1, 9, 40)]
    static = connector({"cartridge_path": str(path)})
    weights = str(model("tiny", dtype="float32"))
    result: dict[str, Any] = run_offline(_BEAMS, weights, static, DOCUMENT, prompts, TEXT, WIDTH, TOKENS)
    return result


def test_beams_are_those_after_the_document(found: dict[str, Any]) -> None:
    """By tokens, which are taken as they are, and by text, whose beginning is left out in every step."""
    assert len(found["placed"]) == 5
    for placed, expected in zip(found["placed"], found["document"], strict=True):
        assert [one["ids"] for one in placed] == [one["ids"] for one in expected]
        assert all(abs(a["score"] - b["score"]) < SAME for a, b in zip(placed, expected, strict=True))
    for placed, bare in zip(found["placed"], found["bare"], strict=True):
        assert placed != bare
    assert found["left"] == [0, 0, 0]


def test_on_a_server(
    found: dict[str, Any], path: Path, model: Callable[..., Path], start: Callable[..., VllmServer]
) -> None:
    server = start(model("tiny", dtype="float32"), config=connector({"cartridge_path": str(path)}), dtype="float32")
    search = {"use_beam_search": True, "n": WIDTH, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}
    body = {"prompt": TEXT, **search}
    answer = server.post("/v1/completions", body)
    expected = [re.sub(r"<\|\w+\|>", "", text) for text in found["texts"]]  # a server leaves special tokens out
    assert [choice["text"] for choice in answer["choices"]] == expected
    named = server.post("/v1/completions", body | {"kv_transfer_params": {"cartridge_id": "a"}})
    assert [choice["text"] for choice in named["choices"]] == expected
    for params, status, text in (
        ({"cartridge_id": "b"}, 404, "'b'"),
        ({"cartridge_prefix": "virtual"}, 400, "cartridge_prefix: cannot be said in a beam search"),
        ({"cartridge_lable": "a"}, 400, "nobody reads"),
    ):
        refused = server.http.post("/v1/completions", json=body | {"kv_transfer_params": params})
        assert text in error_of(refused, status)
    server.stop()
