"""Self-study: the model makes conversations about a document, from pieces of it and prompts to begin with.

To ask, it sees a piece of the document and a seed prompt; to answer, the whole document. (Eyuboglu et al.,
"Cartridges", arXiv 2506.06266, section 4; the wording of the prompts is ours.)

Knows models and framing. Must not know training.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from kvist.cartridge.causal import CausalModel, Layers
from kvist.cartridge.framing import Framing
from kvist.cartridge.train.conversations import Conversation
from kvist.errors import EngineError, InvalidInput

SEEDS: Final[dict[str, tuple[str, ...]]] = {
    "structuring": (
        "Write a request to lay out information from this text in a structured form, such as JSON, YAML or a table. "
        "Say which section, dates or names it is about.",
        "Write a request to list, in order, the entries or steps of one part of this text. Name that part.",
    ),
    "summarization": (
        "Write a request to summarize one part of this text. Say which part, by its names, dates or heading.",
        "Write a request to explain one part of this text briefly to somebody who has not read it. Name that part.",
    ),
    "question": (
        "Write one question about a detail of this text: a name, a number, a date, a place. It must have one answer, "
        "and be understood without the text at hand.",
        "Write one question that needs two facts of this text together. It must be understood without it at hand.",
    ),
    "use_case": (
        "Think of somebody who has a practical task that this text helps with. Write what that person would ask.",
        "Think of a decision that depends on this text. Write the request of the person who has to decide.",
    ),
    "creative": (
        "Write a creative request that starts from this text: a poem, a dialogue, a letter. Name what it is about.",
        "Write a playful question that only somebody who knows this text can answer.",
    ),
}
"""Kinds of conversation, and the prompts that begin one."""

_PIECE: Final = "This is a piece of a longer text.\n\n{piece}"
_ONLY: Final = "{seed} Write the message alone, as the user would send it, and nothing else."


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """How conversations are made. Construction checks the values.

    Attributes:
        count: conversations.
        piece: least and most tokens of a piece that a question is asked about.
        prompt_tokens: most of a question.
        answer_tokens: most of an answer; one that would be longer is cut, and its end is not learnt.
        temperature: of the questions; answers are the likeliest.
        rows: conversations made at once.
        seed: of all that is drawn.
    """

    count: int
    piece: tuple[int, int] = (512, 2048)
    prompt_tokens: int = 128
    answer_tokens: int = 256
    temperature: float = 0.6
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.piece[0], self.prompt_tokens, self.answer_tokens, self.rows) < 1:
            raise InvalidInput(f"count, piece, tokens and rows must be 1 or more, got {self}")
        if self.piece[0] > self.piece[1] or not self.temperature >= 0:
            raise InvalidInput(f"piece must go from least to most, and the temperature be 0 or more; got {self}")


def study(
    model: CausalModel, framing: Framing, document: Sequence[int], settings: StudySettings
) -> Iterator[list[Conversation]]:
    """Make conversations, some at a time.

    Args:
        model: an instruct model.
        framing: as a chat.
        document: its ids.
        settings: of the run. Each batch draws from a seed of its own.

    Raises:
        InvalidInput: the framing is not a chat.
        EngineError: the model asks nothing in a whole batch.
    """
    if not framing.is_chat:
        raise InvalidInput(
            "self-study asks the model in chats, so the document must be framed as one",
            hint="kvist cartridge train --system, for a model with a chat template; else give --conversations FILE",
        )
    prefix = model.prefill(document)
    for batch in range(-(-settings.count // settings.rows)):
        rows = min(settings.rows, settings.count - batch * settings.rows)
        asked = _ask(model, framing, document, settings, batch, rows)
        if not asked:
            raise EngineError(
                "the model wrote no question at all", hint="use an instruct model, or give --conversations FILE"
            )
        yield answer(model, framing, prefix, asked, settings.answer_tokens)


def answer(
    model: CausalModel, framing: Framing, prefix: Layers, asked: Sequence[Conversation], most: int
) -> list[Conversation]:
    """Complete conversations that have no completion yet: the likeliest answer after ``prefix``."""
    open_ = [one for one in asked if one.completion is None]
    said = model.generate([framing.prompt(one.prompt) for one in open_], prefix, most=most) if open_ else []
    completed = iter(
        dataclasses.replace(one, completion=framing.decode(ids), is_cut=len(ids) == most)
        for one, ids in zip(open_, said, strict=True)
    )
    return [next(completed) if one.completion is None else one for one in asked]


def _ask(
    model: CausalModel, framing: Framing, document: Sequence[int], settings: StudySettings, batch: int, rows: int
) -> list[Conversation]:
    chance = random.Random(f"{settings.seed}/{batch}")
    kinds = [chance.choice(list(SEEDS)) for _ in range(rows)]
    prompts = []
    for kind in kinds:
        length = min(len(document), chance.randint(*settings.piece))
        start = chance.randint(0, len(document) - length)
        piece = _PIECE.format(piece=framing.decode(document[start : start + length]))
        seed = _ONLY.format(seed=chance.choice(SEEDS[kind]))
        messages = [{"role": "system", "content": piece}, {"role": "user", "content": seed}]
        prompts.append(framing.ids(framing.render(messages)))
    generator = torch.Generator().manual_seed(chance.getrandbits(62))
    asked = model.generate(
        prompts, None, most=settings.prompt_tokens, temperature=settings.temperature, generator=generator
    )
    texts = [framing.decode(ids).strip() for ids in asked]
    return [Conversation(prompt=text, kind=kind) for text, kind in zip(texts, kinds, strict=True) if text]
