"""Text out of a growing list of tokens: whole characters only, and an end at stop strings.

Knows decoding as a function. Must not know tokenizers' files, engines or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_UNKNOWN: Final = "\ufffd"
_CONTEXT: Final = 6
"""Settled tokens that are decoded with the new ones: some tokenizers drop a space at the start."""
_LONGEST_CHARACTER: Final = 4
"""Tokens after which a byte sequence that still is no character never will be one: UTF-8 has at most 4 bytes."""
_JUNK: Final = 16
"""Tokens after which bytes that are no text are no longer decoded together, so that decoding stays cheap."""


class Detokenizer:
    """Turns tokens into text as they come.

    What it gives out never changes later: a character whose bytes are spread over tokens waits until it is whole, or
    until no further token could make it so. Everything given out, joined, is what decoding prompt and tokens at once
    has after the prompt.

    Only a few tokens are decoded each time. They begin at a settled point, where a character ends: some decoders
    (byte fallback) turn a whole run of bytes to U+FFFD if it does not begin and end with whole characters.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        """``decode`` turns ids into text, with U+FFFD where bytes are no character."""
        self._decode = decode
        start, settled = self._settled_prompt(prompt)
        self._ids = list(prompt[start:])
        self._points = [settled - start]  # ends of characters in the ids; the last one is where the new text begins
        self._before = decode(self._ids[: self._points[-1]])
        self._given = len(_stable(self._rest(), 0))  # characters of the new text that are given out

    def push(self, token: int) -> str:
        """The text that ``token`` completes; often none."""
        self._ids.append(token)
        pending = len(self._ids) - self._points[-1]
        rest = self._rest()
        stable = _stable(rest, pending)
        new = stable[self._given :]
        if stable == rest:
            self._settle()
        elif pending > _JUNK:
            self._ids = self._ids[-_CONTEXT - _LONGEST_CHARACTER :]
            self._points, self._before = [0], ""
            self._given = len(_stable(self._rest(), len(self._ids)))
        else:
            self._given = max(self._given, len(stable))
        return new

    def flush(self) -> str:
        """What still waits, at the end of the text."""
        new = self._rest()[self._given :]
        self._settle()
        return new

    def _rest(self) -> str:
        """Text of the ids after the last settled point."""
        text = self._decode(self._ids)
        if text.startswith(self._before):
            return text[len(self._before) :]
        # An unfinished character made U+FFFD of the whole run of bytes before it.
        return self._decode(self._ids[self._points[-1] :])

    def _settle(self) -> None:
        """Let the new text begin after all ids, and forget those that are no longer needed for context."""
        self._points.append(len(self._ids))
        cut = max((point for point in self._points if point <= len(self._ids) - _CONTEXT), default=0)
        self._ids = self._ids[cut:]
        self._points = [point - cut for point in self._points if point >= cut]
        self._before, self._given = self._decode(self._ids), 0

    def _settled_prompt(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Where to begin to decode a prompt, and where its last whole character ends."""
        for back in range(min(_LONGEST_CHARACTER, len(prompt) + 1)):
            end = len(prompt) - back
            for more in range(_LONGEST_CHARACTER):
                start = max(end - _CONTEXT - more, 0)
                if not self._decode(prompt[start:end]).endswith(_UNKNOWN):
                    return start, end
        start = max(len(prompt) - _CONTEXT, 0)
        return start, start


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
