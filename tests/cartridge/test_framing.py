"""Ids of a document and of a prompt after it are the ids of both together."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.cartridge.causal import CausalModel
from kvist.cartridge.framing import Framing
from kvist.errors import InvalidInput

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
    ),
    # writes a system message of its own where none is given, as Qwen's does
    "default": (
        "{% if messages[0]['role'] != 'system' %}<|system|>You help.<|end|>{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # has no system message of its own, and folds it into the user's, as Gemma's does
    "folding": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        "{% if not messages %}{{ raise_exception('no user') }}{% endif %}"
        "{% for m in messages %}<|user|>{{ first if loop.first else '' }}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}
TEXT = "Ada keeps the river.\nBen keeps the stone."


class Templated:
    """The tiny model's tokenizer with another chat template."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self._tokenizer, self.chat_template = tokenizer, template

    def __call__(self, text: str, **words: Any) -> Any:
        return self._tokenizer(text, **words)

    def decode(self, ids: list[int], **words: Any) -> Any:
        return self._tokenizer.decode(ids, **words)

    def apply_chat_template(self, messages: Any, **words: Any) -> Any:
        return self._tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **words)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_cut_where_the_next_message_begins(tiny: CausalModel, name: str) -> None:
    tokenizer = Templated(tiny.tokenizer, TEMPLATES[name])
    framing = Framing(tokenizer, is_chat=True)
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "who keeps it?"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert framing.document(TEXT) + framing.prompt("who keeps it?") == tiny.tokenizer(whole)["input_ids"]
    cut = tiny.tokenizer.decode(framing.document(TEXT))
    if name == "folding":
        assert cut.endswith(TEXT + "\n\n")  # right before the user's own words
    else:
        assert cut.endswith("<|end|>" + ("\n" if name == "chatml" else ""))
    alone = tiny.tokenizer.decode(framing.alone("who?"))
    assert TEXT not in alone and ("You help." in alone) == (name == "default")


def test_bare_text(tiny: CausalModel) -> None:
    framing = Framing(tiny.tokenizer)
    assert framing.document(TEXT) == tiny.tokenizer(TEXT)["input_ids"]
    assert framing.prompt(" who?") == tiny.tokenizer(" who?", add_special_tokens=False)["input_ids"]
    assert framing.decode(framing.answer("a river")) == "a river"


def test_a_text_begins_with_what_the_tokenizer_puts_there(recall: CausalModel) -> None:
    framing = Framing(recall.tokenizer)
    assert framing.document("now ada keeps the river .")[0] == recall.tokenizer.bos_token_id
    assert recall.tokenizer.bos_token_id not in framing.prompt("ada keeps what ?")
    assert framing.provenance() == {"kind": "text", "begins_with": "<|bos|>"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            "drops the system",
        ),
        ("{{ raise_exception('never') }}", "refuses"),
    ],
)
def test_templates_that_cannot_frame(tiny: CausalModel, template: str | None, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Framing(Templated(tiny.tokenizer, template), is_chat=True).document(TEXT)


def test_messages_that_share_a_token(recall: CausalModel) -> None:
    framing = Framing(
        Templated(recall.tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}"), is_chat=True
    )
    with pytest.raises(InvalidInput, match="share tokens"):  # its tokens are words, and here two become one
        framing.document("now ada keeps the river")


def test_no_tokenizer() -> None:
    with pytest.raises(InvalidInput, match="token ids"):
        Framing(None)
