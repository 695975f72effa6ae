"""Conversations about a document: what a cartridge is trained on. Files of JSON lines, and ids of one step's rows.

Knows framing and torch's tensors. Must not know models.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvist.cartridge.framing import Framing
from kvist.cartridge.lines import read_lines
from kvist.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What somebody asks about the document, and what the model that reads it answers.

    Attributes:
        prompt: as the user writes it.
        completion: ``None``: the model answers it with the whole document in view.
        kind: of the seed prompt that it came from; ``""`` where there was none.
        is_cut: the completion ends where its room did: that it ends there is not learnt.
    """

    prompt: str
    completion: str | None = None
    kind: str = ""
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation's ids.

    Attributes:
        ids: of prompt and completion.
        start: where the completion begins; the id before it predicts its first.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def learnt(self) -> int:
        """Ids that are predicted."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples of one forward pass, padded on the right.

    Attributes:
        ids: ``[rows, tokens]``.
        predicts: ``[rows, tokens]``, true where the next id is of a completion.
    """

    ids: Tensor
    predicts: Tensor


def read_conversations(path: Path) -> list[Conversation]:
    """Read JSON lines: ``{"prompt": ..., "completion": ...}``, the completion optional.

    Raises:
        InvalidInput: the file cannot be read, is empty, or holds another line; it is named.
    """
    found = []
    for number, document in read_lines(path):
        texts = [document.get("prompt"), document.get("completion", ""), document.get("kind", "")]
        is_cut = document.get("is_cut", False)
        strange = set(document) - {"prompt", "completion", "kind", "is_cut"}
        if strange or not all(isinstance(text, str) for text in texts) or not texts[0] or type(is_cut) is not bool:
            raise InvalidInput(
                f'{path}:{number}: expected {{"prompt": text, "completion": text}}, got {json.dumps(document)[:80]}'
            )
        found.append(Conversation(**document))
    return found


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Append JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        for one in conversations:
            document = {key: value for key, value in dataclasses.asdict(one).items() if value}
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def make_example(conversation: Conversation, framing: Framing, end: int | None, most: int | None) -> Example:
    """Ids of a conversation that has its completion.

    Args:
        conversation: with a completion.
        framing: of the document, too.
        end: the id that ends an answer, which is learnt, too; ``None``: there is none.
        most: ids that there is room for; ``None``: any number.

    Raises:
        InvalidInput: no id to predict, or too long: nothing is cut.
    """
    prompt = framing.prompt(conversation.prompt)
    answer = framing.answer(conversation.completion or "")
    if end is not None and not conversation.is_cut:
        answer.append(end)
    if not prompt or not answer:
        raise InvalidInput(f"a conversation must have ids of a prompt and an answer, got {conversation.prompt!r:.80}")
    if most is not None and len(prompt) + len(answer) > most:
        raise InvalidInput(
            f"a conversation has {len(prompt) + len(answer)} tokens, and after the document there is room for {most}: "
            f"{conversation.prompt!r:.80}"
        )
    return Example((*prompt, *answer), len(prompt))


def draw_order(count: int, take: int, step: int, seed: int) -> list[int]:
    """Which examples step ``step`` takes: each epoch goes through all of them in an order of its own.

    A function of its arguments alone, so that a run which goes on after a pause sees what it would have seen.
    """
    chosen: list[int] = []
    position = step * take
    while len(chosen) < take:
        epoch, offset = divmod(position + len(chosen), count)
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        chosen += order[offset : offset + take - len(chosen)]
    return chosen


def pad(examples: Sequence[Example]) -> Rows:
    """Put examples side by side."""
    longest = max(len(one.ids) for one in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    predicts = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, one in enumerate(examples):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        predicts[row, one.start - 1 : len(one.ids) - 1] = True
    return Rows(ids, predicts)
