"""Text out of a growing list of tokens: whole characters only, and an end at stop strings.

Knows decoding as a function. Must not know tokenizers' files, engines or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_UNKNOWN: Final = "\ufffd"
_CONTEXT: Final = 6
"""Tokens of the prompt that are decoded with the first new ones: some tokenizers drop a space at the start."""
_LONGEST_CHARACTER: Final = 4
"""Tokens after which a byte sequence that still is no character never will be one: UTF-8 has at most 4 bytes."""


class Detokenizer:
    """Turns tokens into text as they come.

    What it gives out never changes later: a character whose bytes are spread over tokens waits until it is whole, or
    until no further token could make it so. Everything given out, joined, is what decoding prompt and tokens at once
    has after the prompt.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        """``decode`` turns ids into text, with U+FFFD where bytes are no character."""
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._given = _stable(decode(self._ids), 0)
        self._pending = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes; often none."""
        self._ids.append(token)
        self._pending += 1
        text = self._decode(self._ids)
        stable = _stable(text, self._pending)
        new = stable[len(self._given) :]
        if stable == text:
            self._pending = 0
        if stable == text or new:
            # Only the last tokens are looked at again: the others are settled, and decoding stays cheap.
            self._ids = self._ids[-(_CONTEXT + _LONGEST_CHARACTER) :]
            self._given = _stable(self._decode(self._ids), self._pending)
        return new

    def flush(self) -> str:
        """What still waits, at the end of the text."""
        text = self._decode(self._ids)
        new, self._given, self._pending = text[len(self._given) :], text, 0
        return new


def _stable(text: str, pending: int) -> str:
    """``text`` without what a next token may change."""
    whole = text.rstrip(_UNKNOWN)
    return text[:-1] if pending > _LONGEST_CHARACTER and whole != text else whole


class StopStrings:
    """Watches a text for stop strings across the pieces it comes in.

    Attributes:
        found: the stop string that ended the text, or ``None``.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The part of the text that can be given out: not the start of what may become a stop string, and after one
        has come, nothing more. Where two end in one piece, the one that starts first counts, then the longer."""
        if self.found is not None:
            return ""
        held = self._held + text
        hits = [(held.find(stop), -len(stop), stop) for stop in self._stops if stop in held]
        if hits:
            start, _, self.found = min(hits)
            self._held = ""
            return held[:start]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
