"""A publisher without sockets, and a feed that follows it."""

from __future__ import annotations

from collections.abc import Callable

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored
from kvist.hashing import local_block_hashes
from kvist.router.feed import Feed, FeedState, Snapshot
from kvist.router.index import Index
from kvist.router.wire import Batch, BlockEvent, from_event, vllm

SIZE = 4


class Engine:
    """A publisher without sockets: it numbers batches, keeps the last few, and knows what it holds."""

    def __init__(self, keeps: int = 1000, life: int = 0) -> None:
        self.keeps = keeps
        self.life = life
        self.sent: list[bytes] = []
        self.held: set[int] = set()

    def store(self, *names: int, parent: int | None = None) -> tuple[int, bytes]:
        self.held |= set(names)
        return self.tell(Stored(names, parent, token_ids=[[name] * SIZE for name in names]))

    def remove(self, *names: int) -> tuple[int, bytes]:
        self.held -= set(names)
        return self.tell(Removed(names))

    def clear(self) -> tuple[int, bytes]:
        self.held.clear()
        return self.tell(Cleared())

    def tell(self, data: EventData) -> tuple[int, bytes]:
        return self.send(from_event(Event(0, data), block_size=SIZE))

    def send(self, *events: BlockEvent) -> tuple[int, bytes]:
        seq = len(self.sent)
        self.sent.append(vllm.encode(Batch(self.life + seq / 1e6, events, 0)))
        return seq, self.sent[-1]

    def snapshot(self) -> Snapshot:
        events = [Event(0, Stored([name], None, local_block_hashes([name] * SIZE, SIZE))) for name in sorted(self.held)]
        return Snapshot(len(self.sent) - 1, events)

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        return [*enumerate(self.sent)][max(start, len(self.sent) - self.keeps) :]


class Following:
    """A feed, its index, and who answers it."""

    def __init__(
        self,
        engine: Engine,
        *,
        can_replay: bool = True,
        block_size: int | None = None,
        snapshot: Callable[[], Snapshot | None] | None = None,
    ) -> None:
        self.engine = engine
        self.answers = True
        self.most: int | None = None
        self.index = Index()
        self.feed = Feed(
            self.index, 1, dp_rank=0, codec=vllm, can_replay=can_replay, block_size=block_size, snapshot=snapshot
        )

    def hear(self, *batches: tuple[int, bytes]) -> None:
        for seq, payload in batches:
            self.answer(self.feed.live(seq, payload))

    def check(self) -> None:
        self.answer(self.feed.check())

    def answer(self, start: int | None) -> None:
        for _ in range(20):
            if start is None:
                return
            assert self.feed.stats.state is FeedState.CATCHING_UP
            if self.answers:
                for batch in self.engine.replay(start)[: self.most]:
                    self.feed.replayed(*batch)
            start = self.feed.replay_ended(answered=self.answers and self.most is None)
        raise AssertionError("the feed asks for ever")

    @property
    def held(self) -> set[int]:
        return set(self.index.hashes_of(1)) if self.index.pools else set()

    @property
    def state(self) -> FeedState:
        return self.feed.stats.state
