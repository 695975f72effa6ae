"""Events: what a pool tells its routers. Values, and the log that numbers them; knows nothing of wires.

The rule of truth: whoever applies all events of a log, in order, to an empty index holds exactly the blocks that the
pools hold, tier by tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum

from msgspec import Struct


class Tier(StrEnum):
    """Where a block lies. The values are Dynamo's names of storage tiers."""

    DEVICE = "device"
    HOST = "host_pinned"
    DISK = "disk"
    EXTERNAL = "external"


class Stored(Struct, frozen=True):
    """These blocks are now here: one contiguous run, each the child of the one before it.

    Attributes:
        hashes: sequence hashes.
        parent: sequence hash of the block before the run, or ``None`` at the root.
        local_hashes: of each block's tokens alone; empty if they are not known.
        token_ids: of each block; ``None`` if they are not known.
    """

    hashes: Sequence[int]
    parent: int | None = None
    local_hashes: Sequence[int] = ()
    token_ids: Sequence[Sequence[int]] | None = None


class Removed(Struct, frozen=True):
    """These blocks are no longer here.

    Attributes:
        hashes: sequence hashes, in the order in which they went.
    """

    hashes: Sequence[int]


class Cleared(Struct, frozen=True):
    """No block is here any more."""


EventData = Stored | Removed | Cleared


class Event(Struct, frozen=True):
    """One numbered event.

    Attributes:
        event_id: 0 for the first of a log, then one more each.
        data: what happened.
        tier: where it happened.
        dp_rank: data-parallel rank of the pool.
    """

    event_id: int
    data: EventData
    tier: Tier = Tier.DEVICE
    dp_rank: int = 0


class EventLog:
    """Numbers events and hands each to ``sink``, at once and in order. Without a sink nothing is numbered.

    All tiers of one worker share one log, so that their events have one order.
    """

    def __init__(self, sink: Callable[[Event], None] | None = None, *, dp_rank: int = 0) -> None:
        self._sink = sink
        self._dp_rank = dp_rank
        self._next_id = 0
        self._tells_of_lower = False

    @property
    def is_heard(self) -> bool:
        """Whether there is a sink: without one there is no need to gather what events would say."""
        return self._sink is not None

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank in its events."""
        return self._dp_rank

    @property
    def tells_of_lower(self) -> bool:
        """Whether an event of another tier than the device was ever published: a Cleared would be heard as its, too."""
        return self._tells_of_lower

    def emit(self, data: EventData, tier: Tier = Tier.DEVICE) -> None:
        """Publish one event. A sink's error reaches the caller, whose own state is already changed."""
        self.emit_all((data,), tier)

    def emit_all(self, events: Iterable[EventData], tier: Tier = Tier.DEVICE) -> None:
        """Publish events, whatever the sink does: its first error reaches the caller after the last of them."""
        if self._sink is None:
            return
        error: Exception | None = None
        for data in events:
            event = Event(self._next_id, data, tier, self._dp_rank)
            self._next_id += 1
            self._tells_of_lower = self._tells_of_lower or tier is not Tier.DEVICE
            try:
                self._sink(event)
            except Exception as raised:
                error = error or raised
        if error is not None:
            raise error
