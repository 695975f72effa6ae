"""Who hears of events may fail, or not be there: blocks and bytes go on."""

from __future__ import annotations

import pytest
from tests.tiers.making import Worker, stored, tier

from kvist.blocks import Event, EventLog, Removed, Tier


def test_a_sink_that_fails_stops_nothing() -> None:
    heard: list[object] = []

    def sink(event: object) -> None:
        heard.append(event)
        raise OSError("sink")

    worker = Worker(8, batch_blocks=1)
    worker.run(1, 2)
    worker.manager.log._sink = sink
    with pytest.raises(OSError, match="sink"):
        worker.tiers.advance(1.0)
    with pytest.raises(OSError, match="sink"):
        worker.tiers.advance(5.0)
    assert worker.below() == {1, 2}
    assert worker.tiers.is_idle


class Sink:
    """Fails at what comes from one tier, and hears everything."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.heard: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.heard.append(event)
        if event.tier is self.tier:
            raise OSError(str(event.event_id))


def test_a_sink_that_fails_at_an_eviction_lets_no_slot_go_that_is_read() -> None:
    worker = Worker(2, tier(capacity=1), mode="blocking")
    worker.run(1)
    worker.run(2)
    worker.manager.allocate(1)
    worker.drain()
    assert worker.below() == {1}
    worker.manager.log._sink = Sink(Tier.HOST)
    assert worker.manager.allocate(1) == [0]  # which 1 had
    assert worker.use(3) == 0  # for 2 is read; and 1 had to go for it
    worker.manager.free([0, 1])
    worker.manager.check_integrity()


def test_a_sink_that_fails_loses_no_batch() -> None:
    worker = Worker(4, tier(capacity=1), disk=tier())
    worker.run(1)
    worker.drain()
    worker.manager.log._sink = sink = Sink(Tier.HOST)
    with pytest.raises(OSError):
        worker.run(2)  # for which 1 has to go, to the disk
    with pytest.raises(OSError):
        worker.drain()
    worker.drain()
    assert (worker.below(0), worker.below(1)) == ({2}, {1})
    assert [(event.tier, event.data) for event in sink.heard] == [
        (Tier.DEVICE, stored([2], None)),
        (Tier.HOST, Removed([1])),
        (Tier.HOST, stored([2], None)),
        (Tier.DISK, stored([1], None)),
    ]
    worker.check()


def test_several_errors_of_a_sink_are_told_as_one() -> None:
    worker = Worker(8)
    worker.run(1)
    worker.run(2)
    worker.run(3)
    worker.manager.log._sink = Sink(Tier.HOST)
    with pytest.raises(OSError) as raised:
        worker.tiers.advance(9.0)
    assert raised.value.__notes__ == ["and 2 more errors of sinks of events"]
    assert worker.below() == {1, 2, 3}
    assert worker.tiers.is_idle
    worker.tiers.advance(10.0)


def test_without_a_sink_nothing_is_told() -> None:
    worker = Worker(8)
    worker.manager.log._sink = None
    worker.run(1, 2)
    worker.drain()
    assert worker.below() == {1, 2}
    assert worker.told() == []
    assert isinstance(worker.manager.log, EventLog)
