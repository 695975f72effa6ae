"""What a cartridge is worth: the same questions, with no context, with the document, and with each cartridge in front.

Knows models and framing. Must not know training or files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from kvist.cartridge.causal import CausalModel, Layers, Progress
from kvist.cartridge.framing import Framing
from kvist.cartridge.lines import read_lines
from kvist.errors import InvalidInput

NONE: Final = "no context"
DOCUMENT: Final = "full document"
LOSSLESS: Final = "lossless cartridge"

Match = Literal["contains", "exact"]
"""When an answer is right: the words of the expected one are in it, side by side; or are all of it."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the document, and the answer it gives."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Said:
    """What an arm made of a question.

    Attributes:
        text: its own answer, the likeliest, id by id.
        is_right: see `Match`.
        tokens: ids of the expected answer, with the one that ends it.
        loss: nats for all of these, the expected answer given.
        divergence: nats from the arm with the full document, summed over these; ``None``: there is no such arm.
    """

    text: str
    is_right: bool
    tokens: int
    loss: float
    divergence: float | None


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to have the document in front of the questions.

    Attributes:
        name: of the way.
        tokens: in front of the question; what the cache holds for it.
        said: of each question, in their order.
    """

    name: str
    tokens: int
    said: tuple[Said, ...]

    @property
    def right(self) -> int:
        """Questions answered rightly."""
        return sum(one.is_right for one in self.said)

    @property
    def loss(self) -> float:
        """Nats per token of the expected answers."""
        return sum(one.loss for one in self.said) / sum(one.tokens for one in self.said)

    @property
    def divergence(self) -> float | None:
        """Nats per token from the arm with the full document."""
        parts = [one.divergence for one in self.said]
        return None if None in parts else sum(filter(None, parts)) / sum(one.tokens for one in self.said)

    def document(self) -> dict[str, Any]:
        """Numbers alone; JSON."""
        return {
            "arm": self.name,
            "tokens": self.tokens,
            "right": self.right,
            "questions": len(self.said),
            "accuracy": self.right / len(self.said),
            "loss": self.loss,
            "divergence": self.divergence,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All arms, over the same questions."""

    questions: tuple[Question, ...]
    arms: tuple[Arm, ...]

    def arm(self, name: str) -> Arm:
        """The arm of that name; `KeyError` if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def is_worse_than_none(self, name: str) -> bool:
        """Whether an arm does worse than no context at all: fewer right, or as many with a greater loss."""
        arm, none = self.arm(name), self.arm(NONE)
        return (arm.right, -arm.loss) < (none.right, -none.loss)

    def verdict(self, name: str) -> str:
        """In words, for people and manifests."""
        arm, none, whole = self.arm(name), self.arm(NONE), self.arm(DOCUMENT)
        if self.is_worse_than_none(name):
            return "worse than no context"
        if (arm.right, -arm.loss) == (none.right, -none.loss):
            return "no better than no context"
        if arm.right >= whole.right:
            return "as right as the full document"
        return "between no context and the full document"


def read_questions(path: Path) -> list[Question]:
    """Read JSON lines: ``{"question": ..., "answer": ...}``.

    Raises:
        InvalidInput: the file cannot be read, is empty, or holds another line; it is named.
    """
    found = []
    for number, document in read_lines(path):
        texts = all(isinstance(text, str) and text for text in document.values())
        if set(document) != {"question", "answer"} or not texts:
            raise InvalidInput(f'{path}:{number}: expected {{"question": text, "answer": text}}, got {document!r:.80}')
        found.append(Question(document["question"], document["answer"]))
    return found


def evaluate(
    model: CausalModel,
    framing: Framing,
    text: str,
    questions: Sequence[Question],
    *,
    cartridges: Mapping[str, Layers],
    matches: Match = "contains",
    most: int = 64,
    rows: int = 8,
    progress: Progress | None = None,
) -> Report:
    """Ask every question in every arm: `NONE`, `DOCUMENT` and one a cartridge.

    Args:
        model: that answers.
        framing: of document and questions.
        text: the document.
        questions: at least one.
        cartridges: name to keys and values, from position 0.
        matches: when an answer is right.
        most: ids of an answer.
        rows: questions asked at once. With the document in the prompt always one.
        progress: is told of every forward group of every arm.

    Raises:
        InvalidInput: no questions, or the longest does not fit after the document.
    """
    if not questions:
        raise InvalidInput("expected at least one question, got none")
    document = framing.document(text)
    prompts = [framing.prompt(one.question) for one in questions]
    alone = [framing.alone(one.question) for one in questions]
    answers = [_answer_ids(model, framing, one.answer) for one in questions]
    longest = max(len(prompt) + max(len(answer), most) for prompt, answer in zip(prompts, answers, strict=True))
    model.require_room(len(document) + longest, "the document with the longest question and answer")
    asker = _Asker(model, framing, questions, answers, matches, most)
    ways: list[tuple[str, int, list[list[int]], Layers | None, int]] = [
        (DOCUMENT, len(document), [document + prompt for prompt in prompts], None, 1),
        (NONE, 0, alone, None, rows),
    ]
    ways += [(name, prefix[0][0].shape[0], prompts, prefix, rows) for name, prefix in cartridges.items()]
    arms: dict[str, Arm] = {}
    reference: list[Tensor] = []
    for done, (name, tokens, asked, prefix, batch) in enumerate(ways):
        given = asker.distributions(asked, prefix, batch)
        reference = reference or given
        arms[name] = Arm(name, tokens, asker.ask(asked, prefix, batch, given, reference))
        if progress is not None:
            progress(done + 1, len(ways))
    names = [NONE, DOCUMENT, *cartridges]
    return Report(tuple(questions), tuple(arms[name] for name in names))


class _Asker:
    """The questions, and what is expected of an arm."""

    def __init__(
        self,
        model: CausalModel,
        framing: Framing,
        questions: Sequence[Question],
        answers: Sequence[list[int]],
        matches: Match,
        most: int,
    ) -> None:
        self._model, self._framing, self._questions, self._answers = model, framing, questions, answers
        self._matches, self._most = matches, most

    def distributions(self, asked: Sequence[list[int]], prefix: Layers | None, rows: int) -> list[Tensor]:
        """Log-probabilities ahead of each id of the expected answers, ``[ids, vocabulary]`` a question, on the CPU."""
        found = []
        for start in range(0, len(asked), rows):
            batch = list(zip(asked[start : start + rows], self._answers[start : start + rows], strict=True))
            longest = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, (prompt, answer) in enumerate(batch):
                ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            first = min(len(prompt) for prompt, _ in batch) - 1
            with torch.no_grad():
                logits = self._model.logits(ids, prefix, keep=torch.arange(first, longest))
            for row, (prompt, answer) in enumerate(batch):
                begin = len(prompt) - 1 - first
                found.append(torch.log_softmax(logits[row, begin : begin + len(answer)], -1).cpu())
        return found

    def ask(
        self,
        asked: Sequence[list[int]],
        prefix: Layers | None,
        rows: int,
        given: Sequence[Tensor],
        reference: Sequence[Tensor],
    ) -> tuple[Said, ...]:
        texts = []
        for start in range(0, len(asked), rows):
            said = self._model.generate(asked[start : start + rows], prefix, most=self._most)
            texts += [self._framing.decode(ids) for ids in said]
        return tuple(
            Said(
                text=text,
                is_right=is_right(text, question.answer, self._matches),
                tokens=len(answer),
                loss=-float(own[torch.arange(len(answer)), answer].sum()),
                divergence=float((whole.exp() * (whole - own)).sum()),
            )
            for text, question, answer, own, whole in zip(
                texts, self._questions, self._answers, given, reference, strict=True
            )
        )


def is_right(said: str, expected: str, matches: Match) -> bool:
    """Whether an answer is the expected one, but for case, punctuation and spaces."""
    own, wanted = _words(said), _words(expected)
    if matches == "exact":
        return own == wanted
    return any(own[start : start + len(wanted)] == wanted for start in range(len(own) - len(wanted) + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _answer_ids(model: CausalModel, framing: Framing, text: str) -> list[int]:
    ids = framing.answer(text)
    return ids if model.end is None else [*ids, model.end]
