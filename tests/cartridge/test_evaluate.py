"""Judging: what counts as right, and numbers that are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvist.cartridge.causal import CausalModel
from kvist.cartridge.evaluate import (
    DOCUMENT,
    LOSSLESS,
    NONE,
    Arm,
    Question,
    Report,
    Said,
    evaluate,
    is_right,
    read_questions,
)
from kvist.cartridge.framing import Framing
from kvist.errors import InvalidInput

TEXT = "The quick brown fox jumps over the lazy dog while the other dogs are sleeping."
QUESTIONS = [Question("who jumps?", " the fox"), Question("who is it that sleeps?", " the dogs"), Question("x", "y")]


@pytest.mark.parametrize("is_chat", [False, True])
def test_arms(tiny: CausalModel, is_chat: bool) -> None:
    framing = Framing(tiny.tokenizer, is_chat=is_chat)
    whole = tiny.prefill(framing.document(TEXT))
    arms = {LOSSLESS: whole, "half": [(keys[:9], values[:9]) for keys, values in whole]}
    report = evaluate(tiny, framing, TEXT, QUESTIONS, cartridges=arms, most=6)
    assert [arm.name for arm in report.arms] == [NONE, DOCUMENT, LOSSLESS, "half"]
    assert [arm.tokens for arm in report.arms] == [0, len(framing.document(TEXT)), len(framing.document(TEXT)), 9]
    document, lossless, half = (report.arm(name) for name in (DOCUMENT, LOSSLESS, "half"))
    assert document.divergence == 0
    assert lossless.divergence == pytest.approx(0, abs=1e-5) and lossless.loss == pytest.approx(document.loss, abs=1e-4)
    assert [one.text for one in lossless.said] == [one.text for one in document.said]
    assert half.divergence is not None and half.divergence > 0.01
    # one question by hand
    prompt, answer = framing.prompt("who jumps?"), [*framing.answer(" the fox"), tiny.end]
    ids = torch.tensor([framing.document(TEXT) + prompt + answer])
    chances = torch.log_softmax(tiny.logits(ids, None)[0, -len(answer) - 1 : -1], -1)
    expected = -float(chances[range(len(answer)), answer].sum())
    assert document.said[0].loss == pytest.approx(expected, rel=1e-4) and document.said[0].tokens == len(answer)
    (said,) = tiny.generate([framing.document(TEXT) + prompt], None, most=6)
    assert document.said[0].text == framing.decode(said)


def test_how_many_are_asked_at_once_does_not_matter(tiny: CausalModel) -> None:
    framing = Framing(tiny.tokenizer)
    arms = {"x": tiny.prefill(framing.document(TEXT))}
    one, three = (evaluate(tiny, framing, TEXT, QUESTIONS, cartridges=arms, most=5, rows=rows) for rows in (1, 3))
    for a, b in zip(one.arms, three.arms, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert [said.text for said in a.said] == [said.text for said in b.said]


@pytest.mark.parametrize(
    ("said", "expected", "contained", "exact"),
    [
        ("river", "river", True, True),
        (" The River.", "the river", True, True),
        ("It is the river, I think.", "the river", True, False),
        ("rivers", "river", False, False),
        ("", "river", False, False),
        ("the quick river", "the river", False, False),
        ("Straße 12", "STRASSE 12", True, True),
    ],
)
def test_what_is_right(said: str, expected: str, contained: bool, exact: bool) -> None:
    assert (is_right(said, expected, "contains"), is_right(said, expected, "exact")) == (contained, exact)


def arm(name: str, right: int, loss: float) -> Arm:
    return Arm(name, 1, tuple(Said("", number < right, 2, loss, 0.5) for number in range(10)))


@pytest.mark.parametrize(
    ("right", "loss", "verdict"),
    [
        (10, 0.2, "as right as the full document"),
        (7, 3.0, "between no context and the full document"),
        (2, 3.9, "between no context and the full document"),
        (2, 4.0, "no better than no context"),
        (2, 4.1, "worse than no context"),
        (1, 0.1, "worse than no context"),
    ],
)
def test_verdicts(right: int, loss: float, verdict: str) -> None:
    report = Report((), (arm(NONE, 2, 4.0), arm(DOCUMENT, 10, 0.1), arm("x", right, loss)))
    assert report.verdict("x") == verdict
    assert report.is_worse_than_none("x") == verdict.startswith("worse")
    assert report.arm("x").document() == {
        "arm": "x",
        "tokens": 1,
        "right": right,
        "questions": 10,
        "accuracy": right / 10,
        "loss": pytest.approx(loss / 2),
        "divergence": 0.25,
    }
    with pytest.raises(KeyError):
        report.arm("y")


def test_files_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "who?", "answer": "ada"}\n')
    assert read_questions(path) == [Question("who?", "ada")]
    for line in ('{"question": "who?"}', '{"question": "", "answer": "a"}', '{"question": "a", "answer": 1}', "[]"):
        path.write_text(line)
        with pytest.raises(InvalidInput, match=r"questions\.jsonl:1: expected"):
            read_questions(path)


def test_questions_that_do_not_fit(tiny: CausalModel) -> None:
    framing = Framing(tiny.tokenizer)
    with pytest.raises(InvalidInput, match="at least one question"):
        evaluate(tiny, framing, TEXT, [], cartridges={})
    with pytest.raises(InvalidInput, match="and the model has 512 positions"):
        evaluate(tiny, framing, TEXT, [Question("x" * 600, "y")], cartridges={})
