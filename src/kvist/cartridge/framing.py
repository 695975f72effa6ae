"""How a document, and what is asked about it, become token ids: as bare text, or as messages of a chat.

Knows transformers' tokenizers by their methods. Must not know models or cartridges.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Final

from kvist.errors import InvalidInput

_DOCUMENT: Final = "kvistdocument"
_PROMPT: Final = "kvistprompt"


class Framing:
    """Ids of a document, and of a prompt that goes on after it.

    As bare text, a document is tokenised with what the tokenizer puts before a text (a BOS, mostly), a prompt without.
    As a chat, the document is the system message, cut where the next message begins; a prompt is a user's message
    with the opening of the answer.

    Attributes:
        is_chat: which of the two.
    """

    def __init__(self, tokenizer: Any, *, is_chat: bool = False) -> None:
        """Take the tokenizer of a model.

        Raises:
            InvalidInput: there is none, or it has no chat template where one is needed.
        """
        if tokenizer is None:
            raise InvalidInput("the model's directory has no tokenizer: give token ids instead of text")
        if is_chat and not getattr(tokenizer, "chat_template", None):
            raise InvalidInput("the tokenizer has no chat template, so a text cannot be a system message")
        self.is_chat = is_chat
        self._tokenizer = tokenizer

    def document(self, text: str) -> list[int]:
        """Ids of the document, from position 0.

        Raises:
            InvalidInput: as a chat, where the template cannot hold it, or a token would span it and what follows.
        """
        if not self.is_chat:
            return self._ids(text, special=True)
        opening, closing, suffix = self._frame
        ids = self._ids(opening + text + closing)
        if ids + self._ids(suffix) != self._ids(opening + text + closing + suffix):
            raise InvalidInput(
                "the chat template's messages share tokens, so the document cannot be cut from its prompt"
            )
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt that follows the document."""
        if not self.is_chat:
            return self._ids(text)
        return self._ids(self._frame[2].replace(_PROMPT, text))

    def alone(self, text: str) -> list[int]:
        """Ids of a prompt without any document, from position 0."""
        if not self.is_chat:
            return self._ids(text, special=True)
        return self._ids(self.render([{"role": "user", "content": text}]))

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, without the one that ends it."""
        return self._ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[dict[str, str]], *, opens_answer: bool = True) -> str:
        """A chat as the template writes it.

        Raises:
            InvalidInput: the template refuses these messages.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens_answer)
            )
        except Exception as error:  # templates raise what they like
            raise InvalidInput(f"the chat template refuses {[one['role'] for one in messages]}: {error}") from error

    def ids(self, rendered: str) -> list[int]:
        """Ids of a text that `render` wrote."""
        return self._ids(rendered)

    def provenance(self) -> dict[str, Any]:
        """What a cartridge's manifest says of it; JSON."""
        if not self.is_chat:
            return {"kind": "text", "begins_with": self._tokenizer.decode(self._ids("", special=True))}
        opening, closing, _ = self._frame
        return {"kind": "system", "opening": opening, "closing": closing}

    @property
    def template_hash(self) -> str:
        """``sha256:`` of the chat template."""
        return "sha256:" + hashlib.sha256(str(self._tokenizer.chat_template).encode()).hexdigest()

    @functools.cached_property
    def _frame(self) -> tuple[str, str, str]:
        """What the template writes before the document, between it and the user's message, and from there on.

        The cut is at the end of the system message; in a template that has none, and folds the text into the user's
        message, right before the user's own words.
        """
        system = {"role": "system", "content": _DOCUMENT}
        whole = self.render([system, {"role": "user", "content": _PROMPT}])
        opening, found, rest = whole.partition(_DOCUMENT)
        if not found or _PROMPT not in rest:
            raise InvalidInput("the chat template drops the system message, so a text cannot be one")
        try:
            alone = self.render([system], opens_answer=False)
        except InvalidInput:  # some templates want a user's message
            alone = ""
        end = len(alone) if alone and whole.startswith(alone) else whole.index(_PROMPT)
        return opening, whole[len(opening) + len(_DOCUMENT) : end], whole[end:]

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
