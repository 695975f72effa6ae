"""Logins: what a browser keeps instead of a token."""

from __future__ import annotations

import pytest

from kvist.server import logins as module
from kvist.server.logins import LASTS_S, Logins


def test_a_login_ends() -> None:
    now = 0.0
    logins = Logins(clock=lambda: now)
    one, two = logins.begin(b"a"), logins.begin(b"a")
    assert one != two and logins.find(one) == logins.find(two) == b"a"
    logins.end(one)
    logins.end("unknown")
    assert logins.find(one) is None and logins.find("") is None
    now = LASTS_S - 0.1
    assert logins.find(two) == b"a"
    now = float(LASTS_S)
    assert logins.find(two) is None


def test_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    logins = Logins()
    words = [logins.begin(b"a") for _ in range(5)]
    assert [logins.find(word) is not None for word in words] == [False, False, True, True, True]
