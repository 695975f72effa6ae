"""Ages and foreign text as people read them. Pure."""

from __future__ import annotations

from typing import Final

_AGES: Final = ((365 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "m"))


def printable(text: str) -> str:
    r"""``text`` on one line, with whatever a terminal would obey instead of show written as an escape.

    A snapshot's name and message may come from anywhere; they must not move the cursor or colour the screen.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def age(created_ns: int, now_ns: int) -> str:
    """Time since ``created_ns`` in its largest whole unit: ``"12s"``, ``"5m"``, ``"3h"``, ``"9d"``, ``"2y"``.

    A time to come (another machine's clock) is ``"0s"``.
    """
    seconds = max(0, now_ns - created_ns) // 10**9
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds // unit}{name}"
    return f"{seconds}s"
