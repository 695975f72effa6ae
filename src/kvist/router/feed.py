"""`Feed`: the rules by which a stream of numbered batches is followed through loss. No sockets, no clock.

A feed is told what came and says what to ask for. Its index holds the truth, or, after a loss that nobody can mend, a
part of it: never a block that the worker does not hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from msgspec import Struct, structs

from kvist.blocks.events import Cleared, Event
from kvist.errors import InvalidInput, KvistError, NotFound
from kvist.router.index import Worker
from kvist.router.wire import Batch, Codec, to_event


class Follower(Protocol):
    """What takes the events; `kvist.router.index.Index` is one."""

    def apply(self, worker: Worker, event: Event, /) -> None:
        """Take one event. Raises `NotFound` for a run whose parent is unknown."""


class Snapshot(NamedTuple):
    """What a worker held after one batch.

    Attributes:
        seq: the batch's number; -1: before the first.
        events: they tell an empty index all of it.
    """

    seq: int
    events: Iterable[Event]


class FeedState(StrEnum):
    """What the index knows of the worker."""

    WAITING = "waiting"
    """Nothing was heard of it yet."""
    CATCHING_UP = "catching_up"
    """Batches are missing and were asked for."""
    CURRENT = "current"
    """All that its batches told, from the first on, without a hole."""
    PARTIAL = "partial"
    """What was told since the last hole: blocks may be there that the index does not know."""


class FeedStats(Struct):
    """What happened on a feed so far.

    Attributes:
        state: what the index knows.
        next_seq: number of the next batch; ``None`` while nothing was heard.
        batches: that were applied.
        events: that were applied.
        duplicates: batches that came again.
        strays: batches that came late from a publisher that has begun anew since.
        gaps: times that a batch was found missing.
        replays: times that batches were asked for again.
        replayed: batches that came of it and were new.
        unanswered: replays that were not answered, or not to the end.
        restarts: times that the publisher began anew.
        resyncs: times that all the worker's blocks were dropped from the index, since some batch cannot be had.
        snapshots: times that a snapshot took the place of lost batches.
        malformed: messages that could not be read.
        refused: events that the index did not take; the feed is then `FeedState.PARTIAL`.
        skipped: events of a kind that the codec does not know.
        last_error: the latest of the errors behind these counts.
    """

    state: FeedState = FeedState.WAITING
    next_seq: int | None = None
    batches: int = 0
    events: int = 0
    duplicates: int = 0
    strays: int = 0
    gaps: int = 0
    replays: int = 0
    replayed: int = 0
    unanswered: int = 0
    restarts: int = 0
    resyncs: int = 0
    snapshots: int = 0
    malformed: int = 0
    refused: int = 0
    skipped: int = 0
    last_error: str | None = None


_REMEMBERED: Final = 100_000
"""Batches by which a duplicate is told from a restart."""


class Feed:
    """Follows one worker's stream into an index.

    The owner calls `live` for each batch as it comes, and `check` when it fears that some did not. Any call may return
    a number: ask the publisher for all batches from there on, hand them to `replayed`, call `replay_ended`, and bring
    no live batch meanwhile. Each replay begins with the last batch that we had: a publisher that began anew does not
    have it, or has another under its number, and one whose buffer no longer reaches so far cannot mend the loss. Both
    ways the worker's blocks are dropped and all that the buffer holds is taken.

    Args:
        index: where events go.
        worker: the worker's name in the index.
        dp_rank: the rank under which its events are filed, whatever its batches say.
        codec: the form of its batches.
        can_replay: whether there is someone to ask.
        snapshot: asked when the batches that can be had do not begin with the first. It must tell a state that is not
            older than the loss; ``None``: there is none. Its errors count as none, and are kept in the stats.
    """

    def __init__(
        self,
        index: Follower,
        worker: Worker,
        *,
        dp_rank: int,
        codec: Codec,
        can_replay: bool,
        snapshot: Callable[[], Snapshot | None] | None = None,
    ) -> None:
        self.stats = FeedStats()
        self._index = index
        self._worker = worker
        self._dp_rank = dp_rank
        self._codec = codec
        self._can_replay = can_replay
        self._snapshot = snapshot
        self._is_complete = False
        self._is_owed = False  # a part is known, since a publisher that may yet answer did not
        self._event_id = 0
        self._digests: dict[int, int] = {}
        self._order: deque[int] = deque()
        self._pending: tuple[int, bytes] | None = None  # the live batch that made us ask
        # Of the replay that goes on:
        self._is_asking = False
        self._anchor: int | None = None  # the batch that must come first, as we had it
        self._is_stranger = False  # it did not
        self._has_hole = False
        self._has_progress = False

    def check(self) -> int | None:
        """Something may be missing: the stream was just connected, or was silent for long."""
        if not self._can_replay:
            return None
        if self._is_owed:
            self._forget()
        return self._ask()

    def live(self, seq: int, payload: bytes) -> int | None:
        """A batch came."""
        expected = self.stats.next_seq
        if seq == expected and self._take(seq, payload):
            return None
        if expected is not None and seq < expected and self._digests.get(seq) == hash(payload):
            self.stats.duplicates += 1
            return None
        self.stats.gaps += expected is not None and seq > expected
        if self._can_replay:
            self._pending = (seq, payload)
            return self._ask()
        if seq == expected:
            self._lose(seq, payload)
            return None
        if expected is not None:
            self.stats.restarts += seq < expected
            self._forget()
        self._begin(seq)
        self._take_or_lose(seq, payload)
        return None

    def unreadable(self, error: str) -> int | None:
        """A message came whose frames cannot be right: which batch it was is unknown."""
        self.stats.malformed += 1
        self.stats.last_error = error
        return self.check()

    def replayed(self, seq: int, payload: bytes) -> None:
        """A batch came that was asked for."""
        if self._is_stranger or self._has_hole:
            return
        if self._anchor is not None:
            is_other = self._digests.get(seq, hash(payload)) != hash(payload)
            self._is_stranger = seq != self._anchor or is_other
            self.stats.restarts += is_other
            self._anchor = None
            self._remember(seq, payload)
            return
        if self.stats.next_seq is None:
            self._begin(seq)
            self._load_snapshot()
        expected = self.stats.next_seq or 0
        if seq < expected:
            self._remember(seq, payload)
        elif seq > expected:
            self._has_hole = True
        else:
            self._has_progress = True
            self.stats.replayed += 1
            self._take_or_lose(seq, payload)

    def replay_ended(self, *, answered: bool) -> int | None:
        """Nothing more comes.

        Args:
            answered: it ended as it should; otherwise the publisher fell silent.
        """
        self._is_asking = False
        self.stats.unanswered += not answered
        is_empty = answered and self._anchor is not None
        if self._is_stranger or is_empty:
            self.stats.restarts += is_empty
            self._forget()
            return self._ask()
        if (self._has_hole or not answered) and self._has_progress:
            return self._ask()
        whole = answered and not self._has_hole
        if whole and self.stats.next_seq is None:
            self._begin(0)
        pending, self._pending = self._pending, None
        if pending is not None:
            self._settle(*pending, whole=whole)
            self._is_owed = not whole and not self._is_complete
        self._refresh()
        return None

    def _settle(self, seq: int, payload: bytes, *, whole: bool) -> None:
        """Go on from the live batch that made us ask; ``whole``: we have all that its publisher has."""
        expected = self.stats.next_seq
        if expected is not None and seq != expected and (whole or seq < expected):
            is_known = self._digests.get(seq) == hash(payload)
            self.stats.duplicates += is_known
            self.stats.strays += not is_known
            return
        if expected is not None and seq > expected:
            self._forget()
        if self.stats.next_seq is None:
            self._begin(seq)
        self._take_or_lose(seq, payload)

    def _ask(self) -> int:
        """Ask for the last batch that we had, and all after it; for all if we had none."""
        expected = self.stats.next_seq or 0
        self._anchor = expected - 1 if expected else None
        self._is_stranger = self._has_hole = self._has_progress = False
        self._is_asking = True
        self.stats.replays += 1
        self._refresh()
        return max(0, expected - 1)

    def _begin(self, seq: int) -> None:
        """This is the first batch that can be had."""
        self.stats.next_seq = seq
        self._is_complete = seq == 0

    def _load_snapshot(self) -> None:
        """Let a snapshot stand for the batches before the first that can be had."""
        first = self.stats.next_seq or 0
        if first == 0 or self._snapshot is None:
            return
        try:
            snapshot = self._snapshot()
        except KvistError as error:
            self.stats.last_error = str(error)
            return
        if snapshot is not None and snapshot.seq + 1 >= first:
            self.stats.snapshots += 1
            self.stats.next_seq = snapshot.seq + 1
            self._is_complete = True
            for event in snapshot.events:
                self._apply(structs.replace(event, dp_rank=self._dp_rank))

    def _take_or_lose(self, seq: int, payload: bytes) -> None:
        if not self._take(seq, payload):
            self._lose(seq, payload)

    def _take(self, seq: int, payload: bytes) -> bool:
        """Apply a batch, unless it cannot be read."""
        try:
            batch = self._codec.decode(payload)
        except InvalidInput as error:
            self.stats.malformed += 1
            self.stats.last_error = f"batch {seq}: {error}"
            return False
        self._remember(seq, payload)
        self.stats.next_seq = seq + 1
        self.stats.batches += 1
        self._apply_all(batch, seq)
        self._refresh()
        return True

    def _apply_all(self, batch: Batch, seq: int) -> None:
        for told in batch.events:
            if told.is_placeholder:
                self._refuse(f"batch {seq}: blocks were stored without saying what they hold")
                continue
            try:
                event = to_event(told, self._event_id, dp_rank=self._dp_rank)
            except InvalidInput as error:
                self._refuse(f"batch {seq}: {error}")
                continue
            self._event_id += 1
            self._apply(event)
        for sentence in batch.skipped:
            self.stats.skipped += 1
            self.stats.last_error = f"batch {seq}: {sentence}"

    def _apply(self, event: Event) -> None:
        try:
            self._index.apply(self._worker, event)
            self.stats.events += 1
        except (NotFound, InvalidInput) as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> None:
        self.stats.refused += 1
        self.stats.last_error = why
        self._is_complete = False

    def _lose(self, seq: int, payload: bytes) -> None:
        """This batch says nothing to us: what the index knew may no longer be so."""
        self._forget()
        self._remember(seq, payload)
        self.stats.next_seq = seq + 1
        self._refresh()

    def _forget(self) -> None:
        self.stats.resyncs += 1
        self.stats.next_seq = None
        self._is_complete = self._is_owed = False
        self._digests.clear()
        self._order.clear()
        self._event_id = 0
        self._index.apply(self._worker, Event(0, Cleared(), dp_rank=self._dp_rank))

    def _remember(self, seq: int, payload: bytes) -> None:
        if seq not in self._digests:
            self._order.append(seq)
        self._digests[seq] = hash(payload)
        if len(self._order) > _REMEMBERED:
            del self._digests[self._order.popleft()]

    def _refresh(self) -> None:
        if self._is_asking:
            self.stats.state = FeedState.CATCHING_UP
        elif self.stats.next_seq is None:
            self.stats.state = FeedState.WAITING
        else:
            self.stats.state = FeedState.CURRENT if self._is_complete else FeedState.PARTIAL
