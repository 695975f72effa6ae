"""Quality, on a task that only the context can answer, with a model that has learnt to answer from its context."""

from __future__ import annotations

import pytest

from kvist.cartridge.build import build
from kvist.cartridge.causal import CausalModel
from kvist.cartridge.evaluate import DOCUMENT, LOSSLESS, NONE, Question, evaluate
from kvist.cartridge.framing import Framing
from kvist.cartridge.train import Conversation, Distillation, TrainSettings
from kvist.testing.recall import FORMS, NAMES, THINGS, Document, draw_document

from .conftest import RECALL


def ask(document: Document, form: str, seed: int) -> list[Question]:
    return [Question(**one) for one in document.questions(form, 10, seed=seed)]


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_ten_of_ten_with_the_lossless_cartridge(recall: CausalModel, seed: int, is_chat: bool) -> None:
    document, framing = draw_document(20 + 6 * seed, seed=seed), Framing(recall.tokenizer, is_chat=is_chat)
    cartridge = build(recall, document.text, cartridge_id="x", is_chat=is_chat)
    layers = [cartridge.layer(index) for index in range(cartridge.num_layers)]
    wrap = "{}" if is_chat else "<|user|> {} <|assistant|>"
    asked = [Question(wrap.format(one.question), one.answer) for one in ask(document, FORMS[seed % 3], seed)]
    report = evaluate(recall, framing, document.text, asked, cartridges={LOSSLESS: layers}, matches="exact", most=4)
    assert report.arm(DOCUMENT).right == report.arm(LOSSLESS).right == 10
    assert report.arm(LOSSLESS).loss == pytest.approx(report.arm(DOCUMENT).loss, abs=1e-4)
    assert report.arm(NONE).right <= 3


def test_trained_beats_untrained_of_the_same_length(recall: CausalModel) -> None:
    document, framing = draw_document(22, seed=100), Framing(recall.tokenizer, is_chat=True)
    distillation = Distillation(
        recall, framing, document.text, [Conversation(**one) for one in document.conversations(FORMS[:2])]
    )
    tokens = len(distillation.document) // 4
    trained = distillation.train(TrainSettings(tokens=tokens, steps=60, rate=0.3, rows=16, warmup=10))
    whole = recall.prefill(distillation.document)
    arms = {"trained": trained.layers, "untrained": [(keys[:tokens], values[:tokens]) for keys, values in whole]}
    report = evaluate(
        recall, framing, document.text, ask(document, FORMS[2], 0), cartridges=arms, matches="exact", most=4
    )
    assert report.arm("trained").right >= report.arm("untrained").right + 4
    assert report.arm("trained").loss < report.arm("untrained").loss / 2
    assert not report.is_worse_than_none("trained")


def test_the_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in RECALL.iterdir()) < 5_000_000


def test_documents() -> None:
    one, same, other = (draw_document(9, seed=seed) for seed in (3, 3, 4))
    assert one == same != other and len(one.facts) == 9
    assert one.text.count(".") == 9 and all(
        f"now {name} keeps the {thing} ." in one.text for name, thing in one.facts.items()
    )
    assert {question["answer"] for question in one.questions()} == set(one.facts.values())
    assert len(one.questions(count=4)) == 4 and len(one.conversations()) == 18
    assert (
        len(draw_document(len(NAMES), seed=0).facts) == len(NAMES) == len(set(NAMES)) == len(THINGS) == len(set(THINGS))
    )
