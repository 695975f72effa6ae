"""Conversations that a model makes about a document, from pieces of it."""

from __future__ import annotations

import dataclasses

import pytest

from kvist.cartridge.causal import CausalModel
from kvist.cartridge.framing import Framing
from kvist.cartridge.train.study import SEEDS, StudySettings, answer, study
from kvist.errors import EngineError, InvalidInput

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
SETTINGS = StudySettings(count=7, piece=(8, 20), prompt_tokens=6, answer_tokens=5, rows=3, seed=1)


@pytest.fixture(scope="module")
def framing(tiny: CausalModel) -> Framing:
    return Framing(tiny.tokenizer, is_chat=True)


def test_conversations(tiny: CausalModel, framing: Framing) -> None:
    document = framing.document(TEXT)
    batches = list(study(tiny, framing, document, SETTINGS))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    for one in (one for batch in batches for one in batch):
        assert one.prompt and one.completion is not None and one.kind in SEEDS
    assert len({one.prompt for batch in batches for one in batch}) > 1
    assert list(study(tiny, framing, document, SETTINGS)) == batches
    more = dataclasses.replace(SETTINGS, count=9)  # each batch draws from a seed of its own
    assert list(study(tiny, framing, document, more))[:2] == batches[:2]


def test_answers_see_the_whole_document(tiny: CausalModel, framing: Framing) -> None:
    document = framing.document(TEXT)
    for one in next(study(tiny, framing, document, SETTINGS)):
        (said,) = tiny.generate([document + framing.prompt(one.prompt)], None, most=5)
        assert one.completion == framing.decode(said) and one.is_cut == (len(said) == 5)


def test_questions_see_a_piece_and_a_seed_prompt(
    tiny: CausalModel, framing: Framing, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def generate(prompts: list[list[int]], prefix: object, **words: object) -> list[list[int]]:
        asked.extend(tiny.tokenizer.decode(prompt) for prompt in prompts)
        return [[70, 71]] * len(prompts)

    monkeypatch.setattr(tiny, "generate", generate)
    list(study(tiny, framing, framing.document(TEXT), SETTINGS))
    questions = [text for text in asked if "<|system|>" in text]
    assert len(questions) == SETTINGS.count
    for text in questions:
        piece = text.partition("\n\n")[2].partition("<|end|>")[0]
        assert 0 < len(piece) < len(TEXT)
        assert any(seed in text for seeds in SEEDS.values() for seed in seeds)


def test_what_has_an_answer_keeps_it(tiny: CausalModel, framing: Framing) -> None:
    first, second = next(study(tiny, framing, framing.document(TEXT), SETTINGS))[:2]
    assert answer(tiny, framing, tiny.prefill([1, 2]), [first, second], 5) == [first, second]


def test_a_model_that_asks_nothing(tiny: CausalModel, framing: Framing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "generate", lambda prompts, prefix, **words: [[] for _ in prompts])
    with pytest.raises(EngineError, match="no question at all"):
        next(study(tiny, framing, framing.document(TEXT), SETTINGS))


def test_only_in_chats(tiny: CausalModel) -> None:
    with pytest.raises(InvalidInput, match="framed as one") as caught:
        next(study(tiny, Framing(tiny.tokenizer), [1, 2, 3], SETTINGS))
    assert "--conversations" in str(caught.value.hint)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"piece": (9, 3)}, {"temperature": -1.0}, {"rows": 0}])
def test_settings_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        StudySettings(**{"count": 1, **wrong})
