"""The last requests, and the chains of their prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import PoolExhausted
from kvist.server import recent as module
from kvist.server.generation import Piece
from kvist.server.recent import KEPT, Answered, Recent, chain

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(one=IDS, other=IDS, size=st.integers(1, 9))
def test_names_are_equal_as_far_as_prompts_are(one: list[int], other: list[int], size: int) -> None:
    names, others = chain(one, size), chain(other, size)
    assert len(names) == -(-len(one) // size)
    for number, (a, b) in enumerate(zip(names, others, strict=False)):
        assert (a == b) == (one[: size * (number + 1)] == other[: size * (number + 1)])


class Script:
    """A generation of a fixed course."""

    def __init__(self, pieces: Sequence[Piece | Exception]) -> None:
        self.course = pieces
        self.is_cancelled = self.is_closed = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        try:
            for piece in self.course:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.is_closed = True

    def cancel(self) -> None:
        self.is_cancelled = True

    def usage(self, prompts: int) -> dict[str, Any]:
        return {"prompt_tokens": 30, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 16}}


def watched(script: Script, told: list[Answered] | None = None) -> tuple[Any, Recent]:
    recent = Recent(16, tell=(told if told is not None else []).append)
    generation = recent.watch(script, id="cmpl-1", kind="chat", begun_with="main", prompts=[recent.prompt(range(30))])
    return generation, recent


async def drain(generation: Any, most: int = 100) -> int:
    count = 0
    pieces = generation.pieces()
    try:
        async for _ in pieces:
            count += 1
            if count == most:
                break
    finally:
        await pieces.aclose()
    return count


def test_a_request_is_remembered_when_it_ends() -> None:
    told: list[Answered] = []
    token: Any = object()
    script = Script([Piece(0, "a", [token]), Piece(0, "b", [token], finish_reason="stop")])
    generation, recent = watched(script, told)
    assert asyncio.run(drain(generation)) == 2
    (found,) = recent.requests()
    assert told == [found]
    assert (found.id, found.kind, found.begun_with, found.outcome) == ("cmpl-1", "chat", "main", "stop")
    assert (found.prompt_tokens, found.cached_tokens, found.completion_tokens) == (30, 16, 2)
    assert found.first_s is not None and 0 <= found.first_s <= found.total_s
    (prompt,) = recent.prompts()
    assert (prompt.tokens, len(prompt.blocks)) == (30, 2)


def test_a_request_that_fails_or_is_left() -> None:
    generation, recent = watched(Script([PoolExhausted("no room")]))
    with pytest.raises(PoolExhausted):
        asyncio.run(drain(generation))
    assert recent.requests()[0].outcome == "pool_exhausted"
    assert recent.requests()[0].first_s is None
    script = Script([Piece(0), Piece(0)])
    generation, recent = watched(script)
    assert asyncio.run(drain(generation, most=1)) == 1
    assert script.is_closed
    assert recent.requests()[0].outcome == "cancelled"


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHAINS_MAX", 10)
    recent = Recent(16)
    for number in range(KEPT + 5):
        one = Answered(str(number), 0.0, "chat", "", 48, 0, 1, None, 1.0, "stop")
        recent.note(one, [recent.prompt([number] * 48), recent.prompt([])])
    assert len(recent.requests()) == KEPT
    assert recent.requests()[0].id == str(KEPT + 4)
    assert len(recent.prompts()) == 3


def test_short_prompts_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROMPTS_MAX", 5)
    recent = Recent(16)
    one = Answered("a", 0.0, "completion", "", 1, 0, 1, None, 1.0, "stop")
    recent.note(one, [recent.prompt([number]) for number in range(8)])
    assert recent.prompts() == [recent.prompt([number]) for number in range(3, 8)]
