"""Before which prompts a cartridge is placed, and under which salt: the same on every engine.

Knows token ids and names. Must not know files, engines or requests.

A cartridge is *placed* before a prompt that goes on after it: the prompt's first token is at position ``num_tokens``.
A prompt may instead *repeat* the document that a lossless cartridge is of: then its first tokens are the cartridge's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

from kvist.errors import InvalidInput

PrefixMode = Literal["auto", "virtual", "prompt"]
"""``virtual``: the cartridge is always placed before the prompt. ``prompt``: the prompt must begin with the document.
``auto``: it is placed, unless the prompt begins with all the ids of the document."""

SALT: Final = "kvist:cartridge:"
"""Start of the salt of every block hash of a sequence that uses a cartridge."""

VIRTUAL: Final = 2**32 - 1
"""What stands for the id of a token that has none, where a record of a sequence has a place for it: no vocabulary
has this id, so nothing can take it for a word."""

_FIELDS: Final = {"id": str, "identity": str, "tokens": int, "placed": bool}


def salt_of(identity: str) -> str:
    """The salt under which a cartridge's blocks are hashed; ``identity``: see `CartridgeManifest.identity`."""
    return SALT + identity


def parse_mode(value: object) -> PrefixMode:
    """A mode from the outside.

    Raises:
        InvalidInput: it is none.
    """
    for mode in get_args(PrefixMode):
        if value == mode:
            found: PrefixMode = mode
            return found
    raise InvalidInput(f"cartridge_prefix must be one of {', '.join(get_args(PrefixMode))}, got {value!r:.80}")


def is_placed(mode: PrefixMode, document: Sequence[int] | None, prompt: Sequence[int]) -> bool:
    """Whether the cartridge is placed before ``prompt``; ``False``: the prompt repeats its document.

    Args:
        mode: how the request wants it.
        document: ids of the document that the cartridge is a lossless prefill of, or ``None``.
        prompt: of the request.

    Raises:
        InvalidInput: the mode is ``prompt``, and the prompt does not begin with the document.
    """
    if mode == "virtual":
        return True
    repeats = document is not None and list(prompt[: len(document)]) == list(document)
    if mode == "prompt" and not repeats:
        if document is None:
            raise InvalidInput("cartridge_prefix: this cartridge knows no token ids, so no prompt can begin with them")
        same = next((n for n, (a, b) in enumerate(zip(document, prompt, strict=False)) if a != b), None)
        same = min(len(document), len(prompt)) if same is None else same
        raise InvalidInput(
            f"cartridge_prefix: the prompt must begin with the {len(document)} token ids of the cartridge's document; "
            f"it has {len(prompt)}, and {same} of them agree"
        )
    return not repeats


def skips(text_ids: Sequence[int], bos_id: int | None) -> int:
    """How many first ids of a text or a chat are left out where it goes on after a cartridge placed before it.

    The tokenizer or the chat template marks the beginning of a text, and that is not where it stands then: a chat after
    the cartridge of a system message is to be the chat with that message. A client's own token ids are left alone.

    Args:
        text_ids: of the whole text.
        bos_id: what marks the beginning; ``None``: nothing does.
    """
    return int(len(text_ids) > 1 and text_ids[0] == bos_id)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The cartridge that a sequence begins with.

    Attributes:
        cartridge_id: what it was called when the sequence began.
        identity: digest of its content.
        tokens: how many it has; positions ``range(tokens)`` of the sequence.
        placed: it was placed before the prompt; otherwise the prompt repeats its document.
    """

    cartridge_id: str
    identity: str
    tokens: int
    placed: bool

    @property
    def salt(self) -> str:
        """Of the block hashes of the sequence."""
        return salt_of(self.identity)

    @property
    def own(self) -> int:
        """First position that is the client's."""
        return self.tokens if self.placed else 0

    def to_dict(self) -> dict[str, Any]:
        """As a state and an answer say it; JSON."""
        return {"id": self.cartridge_id, "identity": self.identity, "tokens": self.tokens, "placed": self.placed}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self | None:
        """The prefix that a sequence's state names, or ``None``.

        Raises:
            InvalidInput: it names one in a way that cannot be read.
        """
        told = state.get("cartridge")
        if told is None:
            return None
        if not (
            isinstance(told, Mapping)
            and told.keys() == _FIELDS.keys()
            and all(type(told[name]) is kind for name, kind in _FIELDS.items())
            and told["tokens"] > 0
        ):
            raise InvalidInput(f"expected a state's cartridge to have {', '.join(_FIELDS)}, got {told!r:.200}")
        return cls(told["id"], told["identity"], told["tokens"], told["placed"])
