"""Publisher and subscriber over real sockets."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zmq", reason="ZeroMQ is not installed: pip install 'kvist[router]'")

import zmq

from kvist.blocks.events import Cleared, Event, Removed, Stored, Tier
from kvist.errors import AlreadyExists, Conflict, EngineError, InvalidInput, NotFound
from kvist.hashing import local_block_hashes
from kvist.router.feed import FeedState
from kvist.router.index import Index
from kvist.router.publish import END, Publisher
from kvist.router.subscribe import Subscriber
from kvist.router.wire import sglang, vllm
from router.waiting import publish_until_heard, until

SIZE = 4


class Lossy(Publisher):
    """Keeps all batches and leaves out some."""

    lost: frozenset[int] | range = frozenset()

    def _send(self, frames: list[bytes]) -> None:
        if int.from_bytes(frames[1], "big") not in self.lost:
            super()._send(frames)


def stored(name: int, parent: int | None = None, tier: Tier = Tier.DEVICE, rank: int = 0) -> Event:
    return Event(name, Stored([name], parent, token_ids=[[name] * SIZE]), tier, rank)


def removed(*names: int) -> Event:
    return Event(0, Removed(names))


def held(subscriber: Subscriber[Index], worker: int = 1, rank: int = 0) -> set[int]:
    with subscriber.reading() as index:
        return set(index.hashes_of(worker, rank))


@pytest.fixture
def subscriber() -> Iterator[Subscriber[Index]]:
    with Subscriber(Index()) as subscriber:
        yield subscriber


@pytest.fixture
def quiet() -> Iterator[Subscriber[Index]]:
    """Asks nothing by itself but upon connections and gaps."""
    with Subscriber(Index(), replay_timeout_s=60, check_interval_s=None) as subscriber:
        yield subscriber


def test_what_is_published_is_in_the_index(subscriber: Subscriber[Index]) -> None:
    with Publisher(block_size=SIZE) as publisher:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        assert publisher.publish([stored(1), stored(2, 1), stored(3, 2, Tier.HOST)]) == 0
        assert publisher.publish([]) is None
        assert publisher.publish([removed(2)]) == 1
        assert publisher.publish([stored(2, 1)]) == 2
        assert subscriber.wait(1, 2)
        with subscriber.reading() as index:
            found = index.find(local_block_hashes([1] * SIZE + [2] * SIZE + [3] * SIZE, SIZE))
        assert (found[1, 0].device, found[1, 0].host) == (2, 3)
        stats = subscriber.stats(1)
        assert (stats.state, stats.next_seq, stats.batches, stats.events) == (FeedState.CURRENT, 3, 3, 5)
        assert publisher.stats[:2] == (3, 5)


def test_lost_batches_are_replayed(subscriber: Subscriber[Index]) -> None:
    with Lossy(block_size=SIZE) as publisher:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        first = publish_until_heard(publisher, subscriber, stored(1))
        publisher.lost = range(first + 5, first + 40)
        for name in range(2, 60):
            publisher.publish([stored(name, name - 1)])
        assert subscriber.wait(1, first + 58)
        assert held(subscriber) == set(range(1, 60))
        stats = subscriber.stats(1)
        assert (stats.state, stats.gaps, stats.resyncs) == (FeedState.CURRENT, 1, 0)
        until(lambda: publisher.stats.replays >= stats.replays)
        assert publisher.stats.replayed >= 35


def test_a_lost_tail_is_found_by_asking(quiet: Subscriber[Index]) -> None:
    with Lossy(block_size=SIZE) as publisher:
        quiet.follow(1, publisher.endpoint, publisher.replay_endpoint)
        publisher.publish([stored(1)])
        assert quiet.wait(1, 0)
        publisher.lost = range(1, 3)
        publisher.publish([stored(2)])
        publisher.publish([removed(1)])
        assert not quiet.wait(1, 2, timeout_s=0.1)
        quiet.check(1)
        assert quiet.wait(1, 2)
        assert held(quiet) == {2}


def test_a_lost_tail_is_found_after_a_silence() -> None:
    with Lossy(block_size=SIZE) as publisher, Subscriber(Index(), check_interval_s=0.1) as subscriber:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        publisher.publish([stored(1)])
        assert subscriber.wait(1, 0)
        publisher.lost = range(1, 2)
        publisher.publish([stored(2)])
        assert subscriber.wait(1, 1)
        assert held(subscriber) == {1, 2}


def test_a_publisher_that_begins_anew_is_known_by_its_connection(subscriber: Subscriber[Index]) -> None:
    with Publisher(block_size=SIZE) as publisher:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        publisher.publish([stored(1), stored(2)])
        publisher.publish([stored(3)])
        assert subscriber.wait(1, 1)
    with Publisher(publisher.endpoint, publisher.replay_endpoint, block_size=SIZE) as publisher:
        for name in (5, 6, 7):
            publisher.publish([stored(name)])
        until(lambda: subscriber.stats(1).restarts)
        assert subscriber.wait(1, 2)
        assert held(subscriber) == {5, 6, 7}
        assert subscriber.stats(1).state is FeedState.CURRENT


def test_without_replay_a_gap_drops_the_worker(quiet: Subscriber[Index]) -> None:
    with Lossy(block_size=SIZE) as publisher:
        quiet.follow(1, publisher.endpoint)
        seq = None
        while quiet.stats(1).next_seq is None:  # what is published before it is connected is lost
            seq = publisher.publish([stored(1)])
            time.sleep(0.01)
        assert seq is not None and quiet.wait(1, seq)
        publisher.lost = range(seq + 1, seq + 2)
        publisher.publish([removed(1)])
        publisher.publish([stored(2)])
        assert quiet.wait(1, seq + 2)
        assert held(quiet) == {2}
        assert quiet.stats(1).state is FeedState.PARTIAL


def test_nobody_answers() -> None:
    with (
        Lossy(block_size=SIZE) as publisher,
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as silent,
        Subscriber(Index(), replay_timeout_s=0.3, check_interval_s=None) as quiet,
    ):
        silent.bind("tcp://127.0.0.1:*")
        quiet.follow(1, publisher.endpoint, silent.getsockopt_string(zmq.LAST_ENDPOINT))
        until(lambda: quiet.stats(1).unanswered == 1)
        publisher.lost = {1}  # type: ignore[assignment]
        for name in (1, 2, 3):
            publisher.publish([stored(name)])
        assert quiet.wait(1, 2)
        assert held(quiet) == {3}
        assert quiet.stats(1).state is FeedState.PARTIAL
        silent.setsockopt(zmq.LINGER, 0)


def test_strange_frames_are_told(quiet: Subscriber[Index]) -> None:
    with zmq.Context() as context, context.socket(zmq.XPUB) as pub, context.socket(zmq.ROUTER) as router:
        pub.bind("tcp://127.0.0.1:*")
        router.bind("tcp://127.0.0.1:*")
        for socket in (pub, router):
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
        addresses = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (pub, router)]
        quiet.follow(1, *addresses)
        assert pub.recv() == b"\x01"
        peer, _, start = router.recv_multipart()
        assert start == bytes(8)
        router.send_multipart([peer, b"", b"short", b""])
        router.send_multipart([peer, b"", b"topic", END, b""])
        until(lambda: quiet.stats(1).malformed == 1 and quiet.stats(1).state is FeedState.CURRENT)
        assert quiet.stats(1).last_error == "expected a replayed batch, got frames of 0, 5, 0 bytes"
        pub.send_multipart([b"", b"short", b"batch"])
        peer, _, start = router.recv_multipart()
        router.send_multipart([peer, b"", END, b""])
        until(lambda: quiet.stats(1).malformed == 2)
        assert quiet.stats(1).last_error == "expected topic, number and batch, got frames of 0, 5, 5 bytes"


def test_ranks_topics_and_codecs(subscriber: Subscriber[Index]) -> None:
    settings: dict[str, Any] = {"block_size": SIZE, "topic": "kv", "codec": sglang}
    with Publisher(**settings) as first, Publisher(**settings, dp_rank=1) as second:
        for rank, publisher in enumerate((first, second)):
            where = publisher.endpoint, publisher.replay_endpoint
            subscriber.follow("w", *where, dp_rank=rank, topic="k", codec=sglang)
            publisher.publish([stored(rank + 1, rank=rank)])
            assert subscriber.wait("w", 0, dp_rank=rank)
        second.publish([Event(1, Cleared(), dp_rank=1)])
        assert subscriber.wait("w", 1, dp_rank=1)
        with subscriber.reading() as index:
            assert index.find(local_block_hashes([1] * SIZE, SIZE)).keys() == {("w", 0)}
            assert index.find(local_block_hashes([2] * SIZE, SIZE)) == {}
        with pytest.raises(AlreadyExists):
            subscriber.follow("w", first.endpoint)
        subscriber.unfollow("w", 1)
        with pytest.raises(NotFound):
            subscriber.stats("w", 1)
        subscriber.follow("w", second.endpoint, second.replay_endpoint, dp_rank=1, codec=sglang)
        assert subscriber.wait("w", 1, dp_rank=1)


def test_many_publish_at_once(subscriber: Subscriber[Index]) -> None:
    with Publisher(block_size=SIZE) as publisher:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)

        def publish(first: int) -> None:
            for name in range(first, first + 200):
                publisher.publish([stored(name)])

        threads = [threading.Thread(target=publish, args=(1 + 200 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert subscriber.wait(1, 799)
        assert held(subscriber) == set(range(1, 801))


def test_a_publisher_keeps_as_many_batches_as_it_was_told(subscriber: Subscriber[Index]) -> None:
    with Publisher(block_size=SIZE, buffer_batches=3) as publisher:
        for name in range(1, 8):
            publisher.publish([stored(name)])
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        assert subscriber.wait(1, 6)
        assert held(subscriber) == {5, 6, 7}
        assert subscriber.stats(1).state is FeedState.PARTIAL


def test_replay_as_a_plain_client_asks_for_it(tmp_path: Path) -> None:
    where = f"ipc://{tmp_path}/replay"
    with Publisher(replay_endpoint=where, block_size=SIZE) as publisher, zmq.Context() as context:
        assert publisher.replay_endpoint == where
        for name in (1, 2, 3):
            publisher.publish([stored(name)])
        with context.socket(zmq.DEALER) as client:
            client.setsockopt(zmq.RCVTIMEO, 10_000)
            client.connect(where)
            client.send_multipart([b"", b"nonsense, too long"])
            client.send_multipart([b"", (1).to_bytes(8, "big")])
            answers = [client.recv_multipart() for _ in range(3)]
            assert [answer[1] for answer in answers] == [bytes(7) + b"\1", bytes(7) + b"\2", END]
            batch = vllm.decode(answers[0][2])
            assert [list(event.data.hashes) for event in batch.events] == [[2]]  # type: ignore[union-attr]
        with context.socket(zmq.REQ) as client:
            client.setsockopt(zmq.RCVTIMEO, 10_000)
            client.connect(where)
            client.send((9).to_bytes(8, "big"))
            assert client.recv_multipart() == [END, b""]
        until(lambda: publisher.stats.replays == 2)
        assert publisher.stats[3:] == (2, 1)


def test_a_publisher_refuses_what_cannot_be_right() -> None:
    for settings in ({"block_size": 0}, {"buffer_batches": 0}, {"queue_batches": 0}, {"dp_rank": -1}):
        with pytest.raises(InvalidInput, match=next(iter(settings))):
            Publisher(**{"block_size": SIZE, **settings})
    with pytest.raises(InvalidInput, match="cannot bind 'nowhere'"):
        Publisher("nowhere", block_size=SIZE)
    with Publisher(block_size=SIZE) as publisher:
        with pytest.raises(Conflict, match="in use"):
            Publisher(publisher.endpoint, block_size=SIZE)
        with pytest.raises(Conflict, match="in use"):
            Publisher(replay_endpoint=publisher.replay_endpoint, block_size=SIZE)
        with pytest.raises(InvalidInput, match="4 token ids"):
            publisher.publish([Event(0, Stored([1], None, token_ids=[[1]]))])
        with pytest.raises(InvalidInput, match="with their token ids"):
            publisher.publish([removed(1), Event(0, Stored([1], None, [7]))])
        with pytest.raises(InvalidInput, match="rank 0, got one of 1"):
            publisher.publish([stored(1), stored(2, rank=1)])
        with pytest.raises(InvalidInput, match=r"local hashes must be those .* got \[777\]"):
            publisher.publish([Event(0, Stored([1], None, [777], [[1] * SIZE]))])
        with pytest.raises(InvalidInput, match="block hashes must be integers"):
            publisher.publish([Event(0, Removed([1.5]))])  # type: ignore[list-item]
        assert publisher.publish([stored(1)]) == 0
    publisher.close()
    with pytest.raises(Conflict, match="closed"):
        publisher.publish([stored(2)])


def test_a_subscriber_refuses_what_cannot_be_right(subscriber: Subscriber[Index]) -> None:
    wrong: list[dict[str, Any]] = [{"replay_timeout_s": 0}, {"check_interval_s": -1}, {"queue_batches": 0}]
    wrong += [{"replay_timeout_s": math.inf}, {"check_interval_s": math.inf}, {"check_interval_s": math.nan}]
    for settings in wrong:
        with pytest.raises(InvalidInput, match=f"{next(iter(settings))} must be positive and finite"):
            Subscriber(Index(), **settings)
    with pytest.raises(InvalidInput, match="cannot connect"):
        subscriber.follow(1, "nowhere")
    with pytest.raises(InvalidInput, match="cannot connect"):
        subscriber.follow(1, "tcp://127.0.0.1:1", "nowhere")
    with pytest.raises(InvalidInput, match="dp_rank"):
        subscriber.follow(1, "tcp://127.0.0.1:1", dp_rank=-1)
    with pytest.raises(InvalidInput, match="block_size"):
        subscriber.follow(1, "tcp://127.0.0.1:1", block_size=0)
    for act in (subscriber.stats, subscriber.unfollow, subscriber.check):
        with pytest.raises(NotFound, match="worker 1, rank 0 is not followed"):
            act(1)
    subscriber.follow(1, "tcp://127.0.0.1:1", "tcp://127.0.0.1:1")
    assert not subscriber.wait(1, 0, timeout_s=0.05)
    assert subscriber.stats(1).state is FeedState.WAITING
    subscriber.close()
    subscriber.close()
    with pytest.raises(EngineError, match="closed"):
        subscriber.stats(1)


def test_an_index_that_fails_is_not_passed_over() -> None:
    class Broken:
        def apply(self, worker: object, event: Event) -> None:
            raise ZeroDivisionError("a bug")

    subscriber = Subscriber(Broken())
    with Publisher(block_size=SIZE) as publisher:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        publisher.publish([stored(1)])
        with pytest.raises(EngineError, match="a bug"):
            subscriber.wait(1, 0)
        with pytest.raises(EngineError, match="a bug"), subscriber.reading():
            pass
        with pytest.raises(EngineError, match="a bug"):
            subscriber.close()
        subscriber.close()


def test_nobody_wakes_in_vain() -> None:
    turns = 0

    class Counting(Subscriber[Index]):
        def _turn(self, ear: zmq.Socket[bytes]) -> None:
            nonlocal turns
            turns += 1
            super()._turn(ear)

    with Publisher(block_size=SIZE) as publisher, Counting(Index(), check_interval_s=None) as subscriber:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        publisher.publish([stored(1)])
        assert subscriber.wait(1, 0)
        time.sleep(0.1)
        before = turns
        time.sleep(0.3)
        assert turns == before
