"""The tokenizer of a mock engine that was given none, and the words that mock engines say."""

from __future__ import annotations

import re
from typing import Final

from kvist.server.tokenizer import Tokenizer, bytes_of_letters

_END: Final = "<|end|>"
_ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_TEMPLATE: Final = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
_WORD: Final = re.compile(rb" [a-z]+")
_LETTER: Final = re.compile(rb"[a-z ]")
_ENOUGH: Final = 64
_MOST: Final = 4096


def letter_tokenizer() -> Tokenizer:
    """A token for each byte of UTF-8, with the byte as its id; then ``<|end|>`` (256) and the roles of a chat.

    A chat reads ``<|user|>text<|end|><|assistant|>``. The ids of an answer are those of its text, so that the next turn
    of a chat begins with the ids of this one.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab=dict(bytes_of_letters()), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (_END, *_ROLES)])
    return Tokenizer(backend, {"eos_token": _END}, _TEMPLATE)


def sayable(tokenizer: Tokenizer) -> list[int]:
    """Ids to draw answers from: words, each with the space before it, that are the same ids in any company.

    Where there are too few such tokens: letters; where there are too few of these: all ids that have bytes.
    """
    for form in (_WORD, _LETTER):
        found: list[int] = []
        for token in tokenizer.ids:
            piece = tokenizer.piece(token)
            if form.fullmatch(piece) and tokenizer.encode(piece.decode(), special=False) == [token]:
                found.append(token)
                if len(found) == _MOST:
                    break
        if len(found) >= (_ENOUGH if form is _WORD else 2):
            return found
    return [token for token in tokenizer.ids if tokenizer.piece(token)]
