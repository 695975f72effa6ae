"""Random moves of two workers: no slot, byte or event is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest
from hypothesis import settings
from msgspec.structs import replace

from kvist.blocks import BlockManager, Event, FullBlock, Removed, Stored, Tier, Use
from kvist.errors import Conflict, InvalidInput
from kvist.testing.tiers import TiersMachine, View, Worker, drive, random_config
from kvist.tiers import Load, Tiers


class TestTiers(TiersMachine.TestCase):
    settings = settings(max_examples=30, stateful_step_count=50, deadline=None)


def test_a_while() -> None:
    counted: Counter[str] = Counter()
    for seed in range(40):
        stats = drive(seed, 150)[Tier.HOST]
        counted.update({field: getattr(stats, field) for field in stats.__struct_fields__})
    assert all(counted.values()), counted  # each thing that can happen did


Bend = Callable[[Stored], Stored]


@pytest.mark.parametrize(
    "bend",
    [
        lambda data: replace(data, parent=None),
        lambda data: replace(data, parent=data.hashes[0]),
        lambda data: replace(data, parent=data.parent if data.parent is None else data.parent ^ 1),
        lambda data: replace(data, hashes=data.hashes[::-1]),
        lambda data: replace(data, hashes=data.hashes[:1]),
        lambda data: replace(data, hashes=[*data.hashes, *data.hashes[:1]]),
        lambda data: replace(data, local_hashes=()),
        lambda data: replace(data, local_hashes=data.local_hashes[::-1]),
        lambda data: replace(data, token_ids=None),
        lambda data: replace(data, token_ids=data.token_ids[::-1]),
    ],
    ids=["rootless", "own_parent", "sibling", "reversed", "lost", "twice", "locals", "locals_order", "tokens", "order"],
)
@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
def test_a_stored_that_is_not_true_is_seen(monkeypatch: pytest.MonkeyPatch, tier: Tier, bend: Bend) -> None:
    hear = View.hear

    def bent(view: View, event: Event) -> None:
        if isinstance(event.data, Stored) and event.tier is tier:
            event = replace(event, data=bend(event.data))
        hear(view, event)

    monkeypatch.setattr(View, "hear", bent)
    with pytest.raises(AssertionError):
        for seed in range(10):
            drive(seed, 150)


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
def test_a_removed_that_comes_late_is_seen(monkeypatch: pytest.MonkeyPatch, tier: Tier) -> None:
    """After the Stored that took its room."""
    hear = View.hear
    late: dict[int, list[Event]] = {}

    def later(view: View, event: Event) -> None:
        waiting = late.setdefault(id(view), [])
        if isinstance(event.data, Removed) and event.tier is tier and not waiting:
            waiting.append(event)
            return
        for each in (event, *waiting):
            hear(view, replace(each, event_id=view._next))
        waiting.clear()

    monkeypatch.setattr(View, "hear", later)
    monkeypatch.setattr(
        Worker, "check", lambda worker: worker.tiers._offload.raise_failure()
    )  # the view alone finds it
    with pytest.raises(AssertionError, match="which holds fewer"):
        for seed in range(10):
            late.clear()
            drive(seed, 150)


@pytest.mark.parametrize("failing", [0.0, 0.15])
def test_uses_that_contradict_each_other_leak_nothing(failing: float) -> None:
    """Any lineage under any name, and a sink that fails now and then: no slot is lost, and nothing waits for ever."""
    brought = [0, 0]
    for seed in [8, 1150, 1298, 2117, *range(3000, 3040)]:
        loads = [load for load in contradict(Random(seed), failing, 120) if load.blocks]
        brought[0] += sum(load.brought < load.blocks for load in loads)
        brought[1] += len(loads)
    assert 0 < brought[0] < brought[1]


def contradict(random: Random, failing: float, steps: int) -> list[Load]:
    def sink(event: Event) -> None:
        if random.random() < failing:
            raise OSError("sink")

    manager = BlockManager(random.randint(1, 12), 2, random.choice(["lineage", "lru", "fifo"]), events=sink)
    tiers = Tiers(manager, random_config(random))
    held: list[list[int]] = []
    loads: list[Load] = []

    def release(number: int) -> None:
        with suppress(OSError):
            manager.deref(held.pop(number)[::-1])

    def drain() -> None:
        while (deadline := tiers.deadline()) is not None:
            with suppress(OSError):
                tiers.advance(deadline)

    for _ in range(steps):
        names = random.sample(range(9), random.randint(1, 4))
        lineage = [
            (
                random.randrange(9) if random.random() < 0.3 else name,
                random.choice([None, *range(9)]) if random.random() < 0.3 else above,
            )
            for name, above in zip(names, [None, *names], strict=False)
        ]
        lineage = random.choice([[], lineage])
        before = [manager.refs(name) for name in names]
        with suppress(InvalidInput, Conflict, OSError):
            match random.choice(["use", "use", "use", "load", "load", "release", "wait", "wait", "advance", "clear"]):
                case "use":
                    try:
                        manager.process(Use([FullBlock(name) for name in names], lineage=lineage))
                    finally:
                        held.append(
                            [name for name, refs in zip(names, before, strict=True) if manager.refs(name) > refs]
                        )
                case "load":
                    loads.append(tiers.load(names, lineage=lineage))
                case "release" if held:
                    release(random.randrange(len(held)))
                case "wait":
                    tiers.advance(tiers.deadline() or tiers.network.now)
                case "advance":
                    tiers.advance(tiers.network.now + random.choice([0.0, 0.3, 2.0]))
                case "clear":
                    manager.clear()
        manager.check_integrity()
        tiers.check_integrity()
    drain()
    while held:
        release(0)
    drain()
    assert tiers.is_idle
    assert manager.num_active_blocks == 0
    return loads


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_at_length(seed: int) -> None:
    drive(1000 + seed, 2000)
