"""Waiting for what other threads bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvist.blocks.events import Event
from kvist.router.index import Index
from kvist.router.publish import Publisher
from kvist.router.subscribe import Subscriber


def until(what: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "this does not come about"
        time.sleep(0.005)


def publish_until_heard(publisher: Publisher, subscriber: Subscriber[Index], event: Event, worker: int = 1) -> int:
    """Publish an event until it comes live: a publisher hears late of who listens. The number of the last batch."""
    seq = 0

    def is_heard() -> bool:
        nonlocal seq
        seq = publisher.publish([event])
        is_there = subscriber.wait(worker, seq, timeout_s=0.2)
        stats = subscriber.stats(worker)
        return is_there and stats.batches > stats.replayed

    until(is_heard)
    return seq
