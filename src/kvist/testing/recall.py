"""A task that only the context can answer: documents of facts, and questions about them, made from a seed.

Every document gives each name it speaks of a thing, drawn anew, so that no weights can know the answer. Knows text and
a tokenizer of words. Must not know models; the weights of one that has learnt the task are in ``tests/data/recall``,
with the script that made them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NAMES: Final = (
    "ada ben cara dan eva finn gina hugo ida jack kira liam mona nils olga paul rosa sven tara ugo vera walt xena yuri "
    "zoe abel bea carl dora emil fay gus hana ivan june kurt lena max nora otto"
)
NAMES: Final = tuple(_NAMES.split())
"""Whom documents speak of."""

_THINGS: Final = (
    "river stone apple candle violin ladder window basket hammer pillow lantern anchor button carpet drum engine "
    "feather garden helmet island jacket kettle lemon mirror needle orange pencil quilt ribbon saddle table umbrella "
    "vase wagon yacht zipper bottle cradle diamond easel"
)
THINGS: Final = tuple(_THINGS.split())
"""What is kept; which, says the document."""

FORMS: Final = ("what does {name} keep ?", "which thing is kept by {name} ?", "{name} keeps what ?")
"""Ways to ask. Train with some and ask with another, and the wording is held out too."""

_SPECIALS: Final = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] != 'user' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS_ID: Final = 1
EOS_ID: Final = 2
END_ID: Final = 6


@dataclass(frozen=True, slots=True)
class Document:
    """Facts: who keeps what.

    Attributes:
        facts: name to thing, in the order of the text.
    """

    facts: Mapping[str, str]

    @property
    def text(self) -> str:
        """The document: six words a fact, the full stop among them."""
        return " ".join(f"now {name} keeps the {thing} ." for name, thing in self.facts.items())

    def questions(self, form: str = FORMS[0], count: int | None = None, *, seed: int = 0) -> list[dict[str, str]]:
        """Questions about names of the document in drawn order, as `kvist cartridge eval --questions` reads them.

        Args:
            form: of `FORMS`.
            count: how many; default one for every fact.
            seed: of the order.
        """
        names = list(self.facts)
        random.Random(seed).shuffle(names)
        return [{"question": form.format(name=name), "answer": self.facts[name]} for name in names[:count]]

    def conversations(self, forms: Sequence[str] = FORMS[:2]) -> list[dict[str, str]]:
        """Every fact asked for in each of ``forms``, as `kvist cartridge train --conversations` reads them."""
        return [
            {"prompt": form.format(name=name), "completion": thing}
            for form in forms
            for name, thing in self.facts.items()
        ]


def draw_document(facts: int, *, seed: int) -> Document:
    """A document of ``facts`` facts, at most one for each of `NAMES`; the same for the same seed."""
    generator = random.Random(seed)
    names = generator.sample(NAMES, facts)
    return Document(dict(zip(names, generator.sample(THINGS, facts), strict=True)))


def make_tokenizer(directory: str | Path) -> Path:
    """Write a tokenizer of the task's words, with a chat template; a word that it does not know is an error of yours.

    Returns:
        ``directory`` as a path.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for form in (*FORMS, "now keeps the .") for word in form.split()} - {"{name}"})
    vocabulary = {word: number for number, word in enumerate([*_SPECIALS, *words, *NAMES, *THINGS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIALS[BOS_ID]} $A", special_tokens=[(_SPECIALS[BOS_ID], BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIALS])
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _SPECIALS[0],
        "unk_token": _SPECIALS[0],
        "bos_token": _SPECIALS[1],
        "eos_token": _SPECIALS[END_ID],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path
