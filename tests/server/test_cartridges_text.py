"""A chat or a text after a cartridge goes on where its document ends, without a second beginning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist.cartridge.build import build
from kvist.cartridge.config import CartridgeConfig
from kvist.engines.hf import Engine
from kvist.repo import Repository
from kvist.server.offer import open_offer
from kvist.testing.recall import FORMS, Document, draw_document

from .conftest import Api, serving

MODEL = Path(__file__).parents[1] / "data/recall"
USING: dict[str, Any] = {"kv_transfer_params": {"cartridge_id": "doc"}}
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "kvist": {"logits": True}}


@pytest.fixture(scope="module")
def document() -> Document:
    return draw_document(22, seed=1)


@pytest.fixture(scope="module")
def recall(document: Document, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    root = tmp_path_factory.mktemp("recall")
    build(MODEL, document.text, cartridge_id="doc", is_chat=True).save_pretrained(root / "doc")
    told = {"cartridges": [{"path": str(root / "doc")}], "router": {"type": "explicit"}}
    with Repository.open(str(root / "store"), create=True) as repo, Engine.load(MODEL, pages=200) as engine:
        offer = open_offer(engine, CartridgeConfig.from_extra(told))
        with serving(engine, repo, MODEL, offer=offer) as api:
            yield api
        assert offer.library is not None
        offer.library.close()


def test_a_chat_after_a_system_message_is_the_chat_with_it(recall: Api, document: Document) -> None:
    for question in document.questions(FORMS[0], 4):
        asked = [{"role": "user", "content": question["question"]}]
        ids = recall.tokenizer.chat(asked)
        assert ids[0] == recall.tokenizer.special_id("bos_token")
        answer = recall.complete(asked, chat=True, **GREEDY, **USING)
        (choice,) = answer["choices"]
        assert choice["message"]["content"].strip() == question["answer"]
        by_ids = recall.complete(ids[1:], **GREEDY, **USING)["choices"][0]
        assert (choice["token_ids"], choice["kvist"]) == (by_ids["token_ids"], by_ids["kvist"])
        assert choice["prompt_token_ids"] == ids
        assert answer["usage"]["prompt_tokens"] == len(ids)
        system = [{"role": "system", "content": document.text}, *asked]
        assert recall.complete(system, chat=True, **GREEDY)["choices"][0]["token_ids"] == choice["token_ids"]
        streamed = list(recall.events({"messages": asked, **GREEDY, **USING}, "/v1/chat/completions"))
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in streamed if one["choices"])
        assert text == choice["message"]["content"]


def test_a_clients_own_ids_and_what_uses_no_cartridge_stay_whole(recall: Api, document: Document) -> None:
    (question,) = document.questions(FORMS[0], 1)
    ids = recall.tokenizer.chat([{"role": "user", "content": question["question"]}])

    def rows(prompt: Any, **said: Any) -> Any:
        return recall.complete(prompt, **GREEDY, **said)["choices"][0]["kvist"]

    assert rows(ids, **USING) != rows(ids[1:], **USING)
    text = question["question"]
    with_bos, without = recall.tokenizer.encode(text), recall.tokenizer.encode(text, special=False)
    assert with_bos != without
    assert rows(text, **USING) == rows(without, **USING)
    assert rows([text, text], **USING) == rows(without, **USING)
    assert rows(text) == rows(with_bos)
    whole = recall.tokenizer.chat([{"role": "system", "content": document.text}])
    assert rows(whole[:1], **USING) == rows(whole[:1], **USING), "one id is a prompt"


def test_a_session_after_a_cartridge_goes_on_with_the_same_text(recall: Api, document: Document) -> None:
    (question,) = document.questions(FORMS[0], 1)
    text = question["question"]
    answer = recall.complete(text, max_tokens=3, temperature=0, **USING)
    cid = recall.fork("snapshot", request_id=answer["id"])["cid"]
    snapshot = {"kv_transfer_params": {"snapshot": cid}}
    on = recall.complete(None, max_tokens=3, temperature=0, **snapshot)["choices"][0]
    bos = recall.tokenizer.encode(text)[:1]
    assert on["prompt_token_ids"] == answer["choices"][0]["prompt_token_ids"][1:] + answer["choices"][0]["token_ids"]
    said = recall.tokenizer.decode([*bos, *on["prompt_token_ids"]], special=False)
    if recall.tokenizer.encode(said)[1:] == on["prompt_token_ids"]:
        again = recall.complete(said, max_tokens=3, temperature=0, **snapshot)["choices"][0]
        assert again["token_ids"] == on["token_ids"]
