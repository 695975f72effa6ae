"""Subscribers that run short of sockets, publishers that misbehave, and who holds the index."""

from __future__ import annotations

import errno
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("zmq", reason="ZeroMQ is not installed: pip install 'kvist[router]'")

import zmq

from kvist.blocks.events import Event, Stored
from kvist.errors import Conflict, EngineError
from kvist.hashing import local_block_hashes
from kvist.router.feed import FeedState
from kvist.router.index import Index
from kvist.router.publish import END, Publisher
from kvist.router.subscribe import Subscriber
from router.waiting import publish_until_heard, until

SIZE = 4


def stored(name: int) -> Event:
    return Event(name, Stored([name], None, token_ids=[[name] * SIZE]))


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may open {hard} files, this needs {wanted}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_more_workers_are_followed_than_zeromq_opens_sockets_for_by_itself() -> None:
    with Publisher(block_size=SIZE) as publisher, Subscriber(Index(), check_interval_s=None) as subscriber:
        for worker in range(400):  # three sockets each, of 1023
            subscriber.follow(worker, "ipc:///nowhere/at/all")
        subscriber.follow("last", publisher.endpoint, publisher.replay_endpoint)
        publisher.publish([stored(1)])
        assert subscriber.wait("last", 0)


def test_without_sockets_a_worker_is_refused_and_the_others_live(monkeypatch: pytest.MonkeyPatch) -> None:
    short: set[int] = set()
    socket = zmq.Context.socket

    def opened(context: zmq.Context[Any], kind: int, **options: Any) -> zmq.Socket[Any]:
        if kind in short:
            raise zmq.ZMQError(errno.EMFILE)
        return socket(context, kind, **options)

    monkeypatch.setattr(zmq.Context, "socket", opened)
    with Publisher(block_size=SIZE) as publisher, Subscriber(Index(), check_interval_s=None) as subscriber:
        for kind in (zmq.SUB, zmq.PAIR, zmq.DEALER):
            short = {kind}
            with pytest.raises(EngineError, match=r"cannot follow .*: Too many open files"):
                subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        short = set()
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        heard = publish_until_heard(publisher, subscriber, stored(1))
        unanswered = subscriber.stats(1).unanswered
        short = {zmq.DEALER}
        subscriber.check(1)
        until(lambda: subscriber.stats(1).unanswered == unanswered + 1)
        stats = subscriber.stats(1)
        assert stats.state is FeedState.CURRENT
        assert "cannot ask" in (stats.last_error or "")
        publisher.publish([stored(2)])
        assert subscriber.wait(1, heard + 1)


def test_nonsense_does_not_keep_a_replay_open() -> None:
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as router,
        Publisher(block_size=SIZE) as publisher,
        Subscriber(Index(), replay_timeout_s=0.3, check_interval_s=None) as subscriber,
    ):
        router.bind("tcp://127.0.0.1:*")
        router.setsockopt(zmq.RCVTIMEO, 10_000)
        router.setsockopt(zmq.LINGER, 0)
        subscriber.follow(1, publisher.endpoint, router.getsockopt_string(zmq.LAST_ENDPOINT))
        peer, _, _ = router.recv_multipart()

        def gives_up() -> bool:
            router.send_multipart([peer, b"", b"short", b""])
            time.sleep(0.05)
            return subscriber.stats(1).unanswered == 1

        until(gives_up)
        assert subscriber.stats(1).malformed > 1


def test_an_answer_that_came_while_the_index_was_read_is_taken() -> None:
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as router,
        Publisher(block_size=SIZE) as publisher,
        Subscriber(Index(), replay_timeout_s=0.3, check_interval_s=None) as subscriber,
    ):
        router.bind("tcp://127.0.0.1:*")
        router.setsockopt(zmq.RCVTIMEO, 10_000)
        router.setsockopt(zmq.LINGER, 0)
        subscriber.follow(1, publisher.endpoint, router.getsockopt_string(zmq.LAST_ENDPOINT))
        peer, _, _ = router.recv_multipart()
        with subscriber.reading():
            time.sleep(0.6)  # the thread has seen that nothing came in time, and waits for us
            router.send_multipart([peer, b"", END, b""])
            time.sleep(0.1)
        until(lambda: subscriber.stats(1).state is FeedState.CURRENT)
        assert subscriber.stats(1).unanswered == 0


def test_an_index_that_is_read_is_not_waited_for() -> None:
    with Publisher(block_size=SIZE) as publisher, Subscriber(Index()) as subscriber:
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint)
        publisher.publish([stored(1)])
        assert subscriber.wait(1, 0)
        others: list[bool] = []
        other = threading.Thread(target=lambda: others.append(subscriber.wait(1, 0)))
        with subscriber.reading() as index:
            with subscriber.reading() as same:
                assert same is index
            for act in (subscriber.close, lambda: subscriber.wait(1, 0)):
                with pytest.raises(Conflict, match=r"leave reading\(\) first"):
                    act()
            other.start()
        other.join()
        assert others == [True]
        assert subscriber.wait(1, 0)


def test_a_publisher_tells_its_adapter_and_its_salt() -> None:
    names = {"lora_name": "adapter", "cache_salt": "tenant"}
    with Publisher(block_size=SIZE, **names) as publisher, Subscriber(Index()) as subscriber:  # type: ignore[arg-type]
        subscriber.follow(1, publisher.endpoint, publisher.replay_endpoint, block_size=SIZE)
        tokens = [7] * SIZE
        local = local_block_hashes(tokens, SIZE, lora_name="adapter", cache_namespace="tenant")
        publisher.publish([Event(0, Stored([1], None, local, [tokens]))])
        assert subscriber.wait(1, 0)
        with subscriber.reading() as index:
            assert index.find(local)[1, 0].device == 1
            assert index.find(local_block_hashes(tokens, SIZE)) == {}
