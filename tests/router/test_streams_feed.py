"""The rules by which a stream is followed: what is lost is mended or forgotten, never wrong."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.blocks.events import Event, Removed, Stored
from kvist.errors import NotFound
from kvist.router.feed import FeedState, Snapshot
from router.feed_cases import SIZE, Engine, Following


def test_batches_from_the_first_on_need_no_replay() -> None:
    engine = Engine()
    following = Following(engine, can_replay=False)
    assert following.state is FeedState.WAITING
    following.hear(engine.store(1, 2), engine.store(3, parent=2), engine.remove(3))
    assert (following.held, following.state) == ({1, 2}, FeedState.CURRENT)
    assert (following.feed.stats.batches, following.feed.stats.events) == (3, 3)


def test_a_gap_is_mended_by_replay() -> None:
    engine = Engine()
    following = Following(engine)
    following.check()
    assert (following.state, following.feed.stats.next_seq) == (FeedState.CURRENT, 0)
    following.hear(engine.store(1, 2))
    lost = engine.store(3, parent=2), engine.remove(3)
    following.hear(engine.store(4, parent=2))
    assert (following.held, following.state) == ({1, 2, 4}, FeedState.CURRENT)
    stats = following.feed.stats
    assert (stats.gaps, stats.replays, stats.replayed, stats.resyncs) == (1, 2, 3, 0)
    assert (stats.duplicates, stats.strays) == (1, 0), "the replay brought the live batch, too"
    following.hear(*lost)
    assert (following.held, stats.duplicates) == ({1, 2, 4}, 3)


def test_a_late_joiner_asks_for_all() -> None:
    engine = Engine()
    engine.store(1, 2)
    following = Following(engine)
    following.hear(engine.store(3, parent=2))
    assert (following.held, following.state) == ({1, 2, 3}, FeedState.CURRENT)


def test_a_late_joiner_with_nobody_to_ask_knows_a_part() -> None:
    engine = Engine()
    engine.store(1, 2)
    following = Following(engine, can_replay=False)
    following.hear(engine.store(3, parent=2), engine.store(4))
    assert (following.held, following.state) == ({4}, FeedState.PARTIAL)
    assert following.feed.stats.refused == 1


def test_a_gap_that_nobody_can_mend_drops_the_worker() -> None:
    engine = Engine()
    following = Following(engine, can_replay=False)
    following.hear(engine.store(1), engine.store(2))
    engine.remove(1)
    following.hear(engine.store(3), engine.store(4))
    assert (following.held, following.state) == ({3, 4}, FeedState.PARTIAL)
    assert (following.feed.stats.gaps, following.feed.stats.resyncs) == (1, 1)


def test_a_gap_beyond_the_buffer_drops_the_worker_and_takes_what_there_is() -> None:
    engine = Engine(keeps=3)
    following = Following(engine)
    following.hear(engine.store(1))
    engine.remove(1)
    for name in range(2, 6):
        engine.store(name)
    following.hear(engine.store(6))
    assert (following.held, following.state) == ({4, 5, 6}, FeedState.PARTIAL)
    assert (following.feed.stats.resyncs, following.feed.stats.restarts) == (1, 0)
    following.check()
    assert (following.held, following.feed.stats.resyncs) == ({4, 5, 6}, 1)


def test_a_snapshot_stands_for_what_the_buffer_has_lost() -> None:
    engine = Engine(keeps=3)
    following = Following(engine, snapshot=engine.snapshot)
    for name in range(1, 8):
        engine.store(name)
    engine.remove(1)
    following.check()
    assert (following.held, following.state) == ({2, 3, 4, 5, 6, 7}, FeedState.CURRENT)
    assert (following.feed.stats.snapshots, following.feed.stats.next_seq) == (1, 8)
    following.hear(engine.store(8), engine.remove(2))
    following.check()
    assert (following.held, following.state) == ({3, 4, 5, 6, 7, 8}, FeedState.CURRENT)
    assert following.feed.stats.restarts == 0


def test_a_snapshot_that_is_older_than_the_loss_is_not_taken() -> None:
    engine = Engine(keeps=2)
    following = Following(engine, snapshot=lambda: Snapshot(0, [Event(0, Stored([1], None, [1]))]))
    for name in range(1, 6):
        engine.store(name)
    following.check()
    assert (following.held, following.state) == ({4, 5}, FeedState.PARTIAL)


def test_a_snapshot_that_fails_is_told() -> None:
    def snapshot() -> Snapshot:
        raise NotFound("no snapshot today")

    engine = Engine(keeps=1)
    following = Following(engine, snapshot=snapshot)
    following.hear(engine.store(1))
    assert following.state is FeedState.CURRENT
    for name in (2, 3):
        engine.store(name)
    following.hear(engine.store(4))
    assert (following.held, following.state) == ({4}, FeedState.PARTIAL)
    assert following.feed.stats.last_error == "the snapshot failed: NotFound('no snapshot today')"


def test_a_restart_is_seen_by_the_next_batch() -> None:
    following = Following(Engine())
    following.hear(following.engine.store(1), following.engine.store(2))
    following.engine = Engine(life=1)
    following.hear(following.engine.store(7))
    assert (following.held, following.state) == ({7}, FeedState.CURRENT)
    assert (following.feed.stats.restarts, following.feed.stats.resyncs) == (1, 1)


def test_a_restart_is_seen_though_the_numbers_have_gone_on() -> None:
    following = Following(Engine())
    following.hear(following.engine.store(1), following.engine.store(2))
    following.engine = Engine(life=1)
    for name in (5, 6, 7):
        following.engine.store(name)
    following.check()
    assert (following.held, following.state) == ({5, 6, 7}, FeedState.CURRENT)
    assert following.feed.stats.restarts == 1


def test_a_restart_is_seen_before_the_first_batch() -> None:
    following = Following(Engine())
    following.hear(following.engine.store(1))
    following.engine = Engine(life=1)
    following.check()
    assert (following.held, following.state, following.feed.stats.restarts) == (set(), FeedState.CURRENT, 1)


def test_a_restart_with_nobody_to_ask() -> None:
    following = Following(Engine(), can_replay=False)
    following.hear(following.engine.store(1), following.engine.store(2))
    following.engine = Engine(life=1)
    following.hear(following.engine.store(7))
    assert (following.held, following.state, following.feed.stats.restarts) == ({7}, FeedState.CURRENT, 1)


def test_batches_of_a_former_life_that_come_late_are_left_out() -> None:
    former = Engine()
    following = Following(former)
    following.hear(former.store(1))
    late = former.store(2), former.store(3), former.store(4)
    following.engine = Engine(life=1)
    for name in (6, 7):
        following.engine.store(name)
    following.check()  # as upon every connection
    following.hear(late[0], late[2])
    assert (following.held, following.state) == ({6, 7}, FeedState.CURRENT)
    assert (following.feed.stats.restarts, following.feed.stats.strays) == (1, 2)
    following.hear(late[1])
    assert following.held == {6, 7, 3}, "it has the number that is due, and nothing tells it from the next"
    following.check()
    assert (following.held, following.state) == ({6, 7}, FeedState.CURRENT)
    following.hear(following.engine.store(8))
    assert (following.held, following.state) == ({6, 7, 8}, FeedState.CURRENT)


def test_a_garbled_batch_is_asked_for_again() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1))
    seq, payload = engine.store(2)
    following.hear((seq, payload[:-3]))
    assert (following.held, following.state) == ({1, 2}, FeedState.CURRENT)
    assert (following.feed.stats.malformed, following.feed.stats.resyncs) == (1, 0)
    assert following.feed.stats.last_error is not None and following.feed.stats.last_error.startswith("batch 1: ")


def test_a_batch_that_stays_garbled_drops_what_was_known_once() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1), engine.store(2))
    engine.tell(Removed([1]))
    engine.sent[-1] = b"\xc1"
    following.hear((2, b"\xc1"))
    assert (following.held, following.state) == (set(), FeedState.PARTIAL)
    following.hear(engine.store(3))
    following.check()
    assert (following.held, following.state) == ({3}, FeedState.PARTIAL)
    assert (following.feed.stats.resyncs, following.feed.stats.restarts) == (1, 0)


def test_a_garbled_batch_with_nobody_to_ask() -> None:
    engine = Engine()
    following = Following(engine, can_replay=False)
    following.hear(engine.store(1), (1, b"?"), (2, engine.store(3)[1]))
    assert (following.held, following.state) == ({3}, FeedState.PARTIAL)
    assert (following.feed.stats.malformed, following.feed.stats.resyncs) == (1, 1)


def test_frames_without_a_number_make_it_ask() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1))
    engine.store(2)
    following.answer(following.feed.unreadable("two frames"))
    assert (following.held, following.feed.stats.malformed) == ({1, 2}, 1)
    assert following.feed.stats.last_error == "two frames"


def test_a_silent_publisher_keeps_what_was_known_until_a_gap_shows() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1))
    following.answers = False
    following.check()
    assert (following.held, following.state, following.feed.stats.unanswered) == ({1}, FeedState.CURRENT, 1)
    engine.store(2)
    following.hear(engine.store(3))
    assert (following.held, following.state, following.feed.stats.resyncs) == ({3}, FeedState.PARTIAL, 1)
    following.answers = True
    following.hear(engine.store(4))
    following.check()
    assert (following.held, following.state) == ({1, 2, 3, 4}, FeedState.CURRENT)


def test_answers_that_break_off_are_asked_for_until_they_are_whole() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1))
    for name in range(2, 7):
        engine.store(name)
    following.most = 3
    following.hear(engine.store(7))
    assert (following.held, following.state) == (set(range(1, 8)), FeedState.CURRENT)
    assert following.feed.stats.unanswered == 4, "two new batches an answer, and a last one that brings none"


def test_a_hole_within_an_answer_is_asked_for_again() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1))
    missed = [engine.store(name) for name in (2, 3, 4)]
    start = following.feed.live(*engine.store(5))
    assert start == 0
    for seq, payload in (engine.replay(0)[0], missed[0], missed[2]):
        following.feed.replayed(seq, payload)
    following.answer(following.feed.replay_ended(answered=True))
    assert (following.held, following.state) == ({1, 2, 3, 4, 5}, FeedState.CURRENT)


def test_events_that_the_index_cannot_take_are_told() -> None:
    engine = Engine()
    following = Following(engine)
    following.hear(engine.store(1), engine.tell(Stored([9], 8, token_ids=[[9] * SIZE])))
    assert (following.held, following.state, following.feed.stats.refused) == ({1}, FeedState.PARTIAL, 1)
    following.hear(engine.tell(Stored([5], 1)))
    assert following.feed.stats.refused == 2
    assert "without saying what they hold" in (following.feed.stats.last_error or "")


steps = st.lists(
    st.sampled_from(["store", "store", "remove", "lose", "lose", "garble", "late", "restart", "clear", "check"]),
    max_size=60,
)


@settings(deadline=None)
@given(
    steps=steps,
    keeps=st.integers(1, 12),
    can_replay=st.booleans(),
    has_snapshots=st.booleans(),
    numbers=st.randoms(use_true_random=False),
)
def test_whatever_is_lost_the_index_never_claims_too_much(steps, keeps, can_replay, has_snapshots, numbers) -> None:
    engine = Engine(keeps)
    names = iter(range(1, 1000))
    late: list[tuple[int, bytes]] = []

    def change() -> tuple[int, bytes]:
        if engine.held and numbers.random() < 0.4:
            return engine.remove(numbers.choice(sorted(engine.held)))
        return engine.store(next(names))

    def snapshot() -> Snapshot | None:
        if not has_snapshots or numbers.random() < 0.2:
            return None
        late.extend(change() for _ in range(numbers.randrange(3)))  # while it is made
        return engine.snapshot()

    following = Following(engine, can_replay=can_replay, snapshot=snapshot)
    for step in steps:
        if step in ("store", "remove"):
            following.hear(change())
        elif step == "clear":
            following.hear(engine.clear())
        elif step == "lose":
            late.append(change())
        elif step == "garble":
            following.hear((change()[0], b"?"))
        elif step == "late" and late and can_replay:
            following.hear(late.pop(numbers.randrange(len(late))))
        elif step == "restart" and can_replay:  # nobody else could see it
            following.engine = engine = Engine(keeps, engine.life + 1)
            late.clear()
            for _ in range(numbers.randrange(8)):
                change()
            following.check()  # as upon every connection
        elif step == "check":
            following.check()
    following.check()
    following.hear(engine.store(next(names)))
    assert following.held <= engine.held
    if following.state is FeedState.CURRENT:
        assert following.held == engine.held
