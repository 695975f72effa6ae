"""`Feed`: the rules by which a stream of numbered batches is followed through loss. No sockets, no clock.

A feed is told what came and says what to ask for. Its index holds the truth, or, after a loss that nobody can mend, a
part of it: never a block that the worker does not hold, as far as its events can be read.

Of a model with several KV cache groups only one is followed: the first of full attention. The others (sliding windows,
states) keep a prefix's last blocks alone, under the same hashes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from msgspec import Struct, structs

from kvist.blocks.events import Cleared, Event, Removed, Stored
from kvist.errors import InvalidInput, NotFound
from kvist.router.index import Worker
from kvist.router.wire import Batch, BlockEvent, Codec, to_event


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
    """All that its batches told of the group that is followed, from the first on, without a hole."""
    PARTIAL = "partial"
    """A part: what was told since the last hole, or without events that could not be taken or read."""


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
        skipped: events that were passed over: of a kind or medium that the codec does not know, which makes the feed
            `FeedState.PARTIAL`, or of a cache group that is not followed.
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


_REMEMBERED: Final = 10_000
"""Batches by which a duplicate is told from a restart."""
_MAIN_KINDS: Final = frozenset({None, "full_attention", "mla_attention", "sink_full_attention", "unknown"})
"""Groups that hold all blocks of a prefix, in vLLM's words."""


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
        block_size: tokens a block; stored blocks that tell another are refused. ``None``: any will do.
        snapshot: asked when the batches that can be had do not begin with the first. It must tell a state that is not
            older than the loss; ``None``: there is none. Whatever it raises counts as none, and is kept in the stats.
    """

    def __init__(
        self,
        index: Follower,
        worker: Worker,
        *,
        dp_rank: int,
        codec: Codec,
        can_replay: bool,
        block_size: int | None = None,
        snapshot: Callable[[], Snapshot | None] | None = None,
    ) -> None:
        self.stats = FeedStats()
        self._index = index
        self._worker = worker
        self._dp_rank = dp_rank
        self._codec = codec
        self._can_replay = can_replay
        self._block_size = block_size
        self._snapshot = snapshot
        self._is_complete = False
        self._is_owed = False  # a part is known, since a publisher that may yet answer did not
        self._event_id = 0
        self._groups: dict[int, bool] = {}  # that stored blocks, and whether it is the one to follow
        self._digests: dict[int, int] = {}
        self._order: deque[int] = deque()
        self._pending: tuple[int, bytes] | None = None  # the live batch that made us ask
        # Of the replay that goes on:
        self._is_asking = False
        self._anchor: int | None = None  # the batch that must come first, as we had it
        self._is_anew = False  # its first batch takes the place of all that is known
        self._is_stranger = False  # the anchor did not come first
        self._hole: tuple[int, bytes] | None = None  # the batch behind a hole
        self._has_progress = False

    def check(self) -> int | None:
        """Something may be missing: the stream was just connected, or was silent for long."""
        if not self._can_replay:
            return None
        return self._ask(anew=self._is_owed)

    def live(self, seq: int, payload: bytes) -> int | None:
        """A batch came."""
        expected = self.stats.next_seq
        if seq == expected and self._take(seq, payload):
            return None
        if expected is not None and seq < expected:
            if self._order and seq == self._order[-1] + 1:  # a snapshot told it before it came
                self._remember(seq, payload)
            if self._digests.get(seq) == hash(payload):
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

    def replayed(self, seq: int, payload: bytes) -> bool:
        """A batch came that was asked for.

        Returns:
            Whether it was new and is now known.
        """
        if self._is_stranger or self._hole is not None:
            return False
        if self._anchor is not None:
            is_other = self._digests.get(seq, hash(payload)) != hash(payload)
            self._is_stranger = seq != self._anchor or is_other
            self.stats.restarts += is_other
            self._anchor = None
            return False
        if self._is_anew:
            self._is_anew = False
            self._forget()
        if self.stats.next_seq is None:
            self._begin(seq)
            self._load_snapshot()
        expected = self.stats.next_seq or 0
        if seq < expected:
            is_new = seq not in self._digests
            self._remember(seq, payload)
            return is_new
        if seq > expected:
            self._hole = seq, payload
            return False
        self._has_progress = True
        self.stats.replayed += 1
        return self._take_or_lose(seq, payload)

    def replay_ended(self, *, answered: bool) -> int | None:
        """Nothing more comes.

        Args:
            answered: it ended as it should; otherwise the publisher fell silent.
        """
        self._is_asking = False
        self.stats.unanswered += not answered
        is_empty = answered and (self._anchor is not None or self._is_anew)
        if self._is_stranger or is_empty:
            self.stats.restarts += is_empty
            self._forget()
            return self._ask()
        if (self._hole is not None or not answered) and self._has_progress:
            return self._ask()
        whole = answered and self._hole is None
        if whole and self.stats.next_seq is None:
            self._begin(0)
        latest = max((batch for batch in (self._pending, self._hole) if batch is not None), default=None)
        self._pending = None
        if latest is not None:
            self._settle(*latest, whole=whole)
            self._is_owed = not self._is_complete and (self._is_owed or not whole)
        self._refresh()
        return None

    def _settle(self, seq: int, payload: bytes, *, whole: bool) -> None:
        """Go on from the latest batch that came; ``whole``: we have all that its publisher has."""
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

    def _ask(self, *, anew: bool = False) -> int:
        """Ask for the last batch that we had, and all after it; for all if we had none, or if all is to come ``anew``.

        What a snapshot told is no batch that we had.
        """
        self._anchor = self._order[-1] if self._order and not anew else None
        self._is_anew = anew
        self._is_stranger = self._has_progress = False
        self._hole = None
        self._is_asking = True
        self.stats.replays += 1
        self._refresh()
        return self._anchor or 0

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
            if snapshot is None or snapshot.seq + 1 < first:
                return
            events = [structs.replace(event, dp_rank=self._dp_rank) for event in snapshot.events]
        except Exception as error:
            self.stats.last_error = f"the snapshot failed: {error!r}"
            return
        self.stats.snapshots += 1
        self.stats.next_seq = snapshot.seq + 1
        self._is_complete = True
        for event in events:
            self._apply(event)

    def _take_or_lose(self, seq: int, payload: bytes) -> bool:
        is_taken = self._take(seq, payload)
        if not is_taken:
            self._lose(seq, payload)
        return is_taken

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
            if not self._is_followed(told):
                self._skip(f"batch {seq}: cache group {told.group} is not followed")
                continue
            if told.is_placeholder:
                self._refuse(f"batch {seq}: blocks were stored without saying what they hold")
                continue
            if self._block_size is not None and told.block_size not in (None, self._block_size):
                self._refuse(f"batch {seq}: expected blocks of {self._block_size} tokens, got {told.block_size}")
                continue
            try:
                event = to_event(told, self._event_id, dp_rank=self._dp_rank)
            except InvalidInput as error:
                self._refuse(f"batch {seq}: {error}")
                continue
            self._event_id += 1
            self._apply(event)
        for sentence in batch.skipped:
            self._skip(f"batch {seq}: {sentence}")
            self._is_complete = False

    def _is_followed(self, told: BlockEvent) -> bool:
        """Whether it is of the main attention's group. Engines with one group may not name it."""
        if told.group is None:
            return True
        if isinstance(told.data, Stored) and told.group not in self._groups:
            is_first = not any(self._groups.values())
            self._groups[told.group] = is_first and told.spec_kind in _MAIN_KINDS
        elif isinstance(told.data, Removed) and told.group not in self._groups:
            self._is_complete = False  # after a snapshot it may be any; less is never wrong
        return self._groups.get(told.group, True)

    def _skip(self, why: str) -> None:
        self.stats.skipped += 1
        self.stats.last_error = why

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
        self._groups.clear()
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
            is_current = self._is_complete and (not self._groups or any(self._groups.values()))
            self.stats.state = FeedState.CURRENT if is_current else FeedState.PARTIAL
