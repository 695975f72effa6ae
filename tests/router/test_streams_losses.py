"""What a feed must not believe: snapshots, half answers, other cache groups, blocks of another size."""

from __future__ import annotations

import msgspec
import pytest

from kvist.blocks.events import Event, Removed, Stored
from kvist.router.feed import FeedState, Snapshot
from kvist.router.wire import BlockEvent
from router.feed_cases import SIZE, Engine, Following

FULL, WINDOW = "full_attention", "sliding_window"


def in_group(group: int | None, kind: str | None, *names: int) -> BlockEvent:
    data = Stored(names, None, token_ids=[[name] * SIZE for name in names])
    return BlockEvent(data, block_size=SIZE, group=group, spec_kind=kind)


def out_of_group(group: int, *names: int) -> BlockEvent:
    return BlockEvent(Removed(names), group=group)


def test_whatever_a_snapshot_raises_counts_as_none() -> None:
    def refused() -> Snapshot:
        raise ConnectionRefusedError("nobody there")

    def broken() -> Snapshot:
        return Snapshot(7, iter([Event(0, Stored([1], None, [1])), None]))  # type: ignore[list-item]

    for snapshot, said in ((refused, "nobody there"), (broken, "TypeError")):
        engine = Engine(keeps=1)
        following = Following(engine, snapshot=snapshot)
        for name in (1, 2, 3):
            engine.store(name)
        following.check()
        assert (following.held, following.state) == ({3}, FeedState.PARTIAL)
        assert said in (following.feed.stats.last_error or "")
        assert following.feed.stats.snapshots == 0


def test_a_restart_is_seen_behind_a_snapshot_that_is_ahead() -> None:
    engine = Engine(keeps=1)

    def snapshot() -> Snapshot | None:
        return ahead

    following = Following(engine, snapshot=snapshot)
    for name in range(1, 9):
        engine.store(name)
    start = following.feed.check()
    answer = engine.replay(start or 0)
    engine.store(9)
    ahead: Snapshot | None = engine.snapshot()
    following.feed.replayed(*answer[0])
    assert following.feed.replay_ended(answered=True) is None
    assert (following.held, following.state) == (set(range(1, 10)), FeedState.CURRENT)
    following.engine, ahead = Engine(life=1), None
    for name in range(100, 112):
        following.engine.store(name)
    following.check()
    assert (following.held, following.state) == (following.engine.held, FeedState.CURRENT)
    assert following.feed.stats.restarts == 1


def test_batches_that_a_snapshot_told_before_they_came_ask_for_nothing() -> None:
    engine = Engine(keeps=1)
    late: list[tuple[int, bytes]] = []

    def snapshot() -> Snapshot:
        late.extend(engine.store(name) for name in (9, 10, 11))
        return engine.snapshot()

    following = Following(engine, snapshot=snapshot)
    for name in range(1, 9):
        engine.store(name)
    following.check()
    following.hear(*late, engine.store(12))
    assert (following.held, following.state) == (set(range(1, 13)), FeedState.CURRENT)
    stats = following.feed.stats
    assert (stats.duplicates, stats.replays, stats.resyncs, stats.snapshots) == (3, 1, 0, 1)
    following.check()
    assert (stats.replays, stats.restarts, stats.resyncs) == (2, 0, 0)


def test_a_hole_in_the_answer_to_a_silence_is_not_forgotten() -> None:
    engine = Engine()
    following = Following(engine)
    batches = [engine.store(1), engine.remove(1), engine.store(3)]
    start = following.feed.check()
    while start is not None:
        for batch in (batches[0], batches[2])[start:]:
            following.feed.replayed(*batch)
        start = following.feed.replay_ended(answered=True)
    assert (following.held, following.state) == ({3}, FeedState.PARTIAL)
    following.check()
    assert (following.held, following.state) == ({3}, FeedState.CURRENT)
    assert following.feed.stats.restarts == 0


def test_a_part_is_kept_until_somebody_answers() -> None:
    engine = Engine()
    following = Following(engine)
    following.answers = False
    engine.store(1)
    for name in range(2, 6):
        following.hear(engine.store(name))
    replays = following.feed.stats.replays
    following.check()
    assert (following.held, following.state) == ({2, 3, 4, 5}, FeedState.PARTIAL)
    following.hear(engine.store(6))
    assert (following.held, following.feed.stats.replays) == ({2, 3, 4, 5, 6}, replays + 1)
    following.answers = True
    following.check()
    assert (following.held, following.state) == ({1, 2, 3, 4, 5, 6}, FeedState.CURRENT)


def test_a_part_goes_when_the_answer_is_empty() -> None:
    engine = Engine()
    following = Following(engine)
    following.answers = False
    engine.store(1)
    following.hear(engine.store(2))
    following.engine, following.answers = Engine(life=1), True
    following.check()
    assert (following.held, following.state, following.feed.stats.restarts) == (set(), FeedState.CURRENT, 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_only_the_main_attention_is_followed(order: tuple[int, int]) -> None:
    engine = Engine()
    following = Following(engine)
    told = [in_group(0, FULL, 7, 8), in_group(1, WINDOW, 7, 8)]
    following.hear(engine.send(*(told[group] for group in order)))
    following.hear(engine.send(out_of_group(1, 7)))
    assert (following.held, following.state) == ({7, 8}, FeedState.CURRENT)
    assert (following.feed.stats.skipped, following.feed.stats.refused) == (2, 0)
    assert following.feed.stats.last_error == "batch 1: cache group 1 is not followed"
    following.hear(engine.send(out_of_group(0, 8)))
    assert following.held == {7}


def test_groups_without_a_kind_and_groups_of_windows_alone() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.send(in_group(3, None, 1), in_group(4, None, 2), in_group(5, FULL, 3), out_of_group(4, 1)))
    assert (following.held, following.state) == ({1}, FeedState.CURRENT), "the first one"
    engine = Engine()
    following = Following(engine)
    following.hear(engine.send(in_group(0, WINDOW, 1)))
    assert (following.held, following.state) == (set(), FeedState.PARTIAL)


def test_a_removal_in_a_group_that_told_nothing_is_taken() -> None:
    engine = Engine(keeps=1)
    engine.store(1)
    engine.store(2)
    following = Following(engine, snapshot=engine.snapshot)
    following.check()
    assert (following.held, following.state) == ({1, 2}, FeedState.CURRENT)
    following.hear(engine.send(out_of_group(1, 2)))
    assert (following.held, following.state) == ({1}, FeedState.PARTIAL)


def test_blocks_of_another_size_are_refused() -> None:
    engine = Engine()
    following = Following(engine, block_size=2 * SIZE)
    following.hear(engine.store(1), engine.remove(1))
    assert (following.held, following.state, following.feed.stats.refused) == (set(), FeedState.PARTIAL, 1)
    assert following.feed.stats.last_error == "batch 0: expected blocks of 8 tokens, got 4"
    following = Following(Engine(), block_size=SIZE)
    following.hear(following.engine.store(1))
    assert (following.held, following.state) == ({1}, FeedState.CURRENT)


@pytest.mark.parametrize("event", [["BlockMoved", 1], ["BlockRemoved", [1], "TAPE"]])
def test_what_cannot_be_read_makes_it_a_part(event: list[object]) -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1), (1, msgspec.msgpack.encode([0.0, [event], 0])))
    assert (following.held, following.state, following.feed.stats.skipped) == ({1}, FeedState.PARTIAL, 1)
