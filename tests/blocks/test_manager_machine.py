"""Any moves, under each policy, beside a model and an index."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from msgspec.structs import replace

from kvist.blocks import Cleared, EventLog, Removed, Stored
from kvist.blocks.policy import POLICIES
from kvist.testing.blocks import ManagerMachine, drive

_SHORT = settings(max_examples=20, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_any_moves(policy: str) -> None:
    machine = type("Machine", (ManagerMachine,), {"policy": policy}).TestCase
    machine.settings = _SHORT
    machine().runTest()


def test_a_while() -> None:
    for seed in range(40):
        drive(seed, 150, sorted(POLICIES)[seed % len(POLICIES)])


Mutation = Callable[[list[Stored | Removed | Cleared]], list[Stored | Removed | Cleared]]


def _each(change: Callable[[Stored], Stored]) -> Mutation:
    return lambda events: [change(data) if isinstance(data, Stored) else data for data in events]


def _one_event(events: list[Stored | Removed | Cleared]) -> list[Stored | Removed | Cleared]:
    stored = [data for data in events if isinstance(data, Stored)]
    if len(stored) < 2:
        return events
    merged = Stored([name for data in stored for name in data.hashes], stored[-1].parent)
    return [*(data for data in events if not isinstance(data, Stored)), merged]


@pytest.mark.parametrize(
    "mutation",
    [
        _each(lambda data: replace(data, parent=None)),
        _each(lambda data: replace(data, parent=987654)),
        _each(lambda data: replace(data, local_hashes=())),
        _each(lambda data: replace(data, token_ids=None)),
        _each(lambda data: replace(data, hashes=data.hashes[::-1])),
        lambda events: sorted(events, key=lambda data: isinstance(data, Removed)),
        lambda events: events[:1],
        lambda events: [
            replace(data, hashes=data.hashes[:1]) if isinstance(data, Removed) else data for data in events
        ],
        _one_event,
    ],
    ids=["no parent", "a strange one", "no hashes", "no tokens", "reversed", "late", "lost", "one name", "one event"],
)
def test_events_that_are_not_so_are_seen(monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    """The machine would tell: these are ways to break what it proves, the original's among them."""
    emit_all = EventLog.emit_all
    monkeypatch.setattr(EventLog, "emit_all", lambda self, events: emit_all(self, mutation(list(events))))
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(20):
            drive(seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_at_length(seed: int) -> None:
    drive(1000 + seed, 2000, sorted(POLICIES)[seed % len(POLICIES)])
