"""`Subscriber`: keeps an index up to date with the event streams of many workers, over ZeroMQ.

One thread reads all streams. It sleeps until something comes; it asks for what was lost, upon every connection and
after every silence. The rules of a stream are `kvist.router.feed`'s.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Generic, Self, TypeVar

import zmq
from msgspec import structs
from zmq.utils.monitor import recv_monitor_message

from kvist.errors import AlreadyExists, Conflict, EngineError, InvalidInput, NotFound
from kvist.router.feed import Feed, FeedState, FeedStats, Follower, Snapshot
from kvist.router.index import Worker
from kvist.router.publish import END, SEQ_BYTES
from kvist.router.wire import Codec, vllm

_AT_ONCE: Final = 256
"""Batches of one stream that are read before the others have their turn."""
_FIRST_INTERVAL_S: Final = 0.1
"""From a connection to the first question; then twice as long each time."""
_LONGEST_SLEEP_S: Final = 86_400.0

FollowerT = TypeVar("FollowerT", bound=Follower)


class Subscriber(Generic[FollowerT]):
    """Follows workers. Safe to be used from any thread; use it as a context manager.

    The thread ends with the first error that is not a stream's fault (an index that raises what it should not); every
    later call raises it.
    """

    def __init__(
        self,
        index: FollowerT,
        *,
        replay_timeout_s: float = 2.0,
        check_interval_s: float | None = 10.0,
        queue_batches: int = 100_000,
    ) -> None:
        """Start the thread. It follows nobody yet.

        Args:
            index: where events go. Whoever else uses it does so within `reading`.
            replay_timeout_s: a publisher that sends nothing for so long will not answer.
            check_interval_s: after so long a silence the publisher is asked whether there was something, and sooner
                where the connection is young: a publisher may hear late of who listens. ``None``: it is not asked.
            queue_batches: how many batches of one worker may wait to be read before some are lost.

        Raises:
            InvalidInput: a number that is not positive and finite.
        """
        numbers = {"replay_timeout_s": replay_timeout_s, "check_interval_s": check_interval_s}
        for name, value in {**numbers, "queue_batches": queue_batches}.items():
            if value is not None and not 0 < value < math.inf:
                raise InvalidInput(f"{name} must be positive and finite, got {value}")
        self._index = index
        self._replay_timeout = replay_timeout_s
        self._check_interval = check_interval_s
        self._queue_batches = queue_batches
        self._changed = threading.Condition(threading.RLock())
        self._streams: dict[tuple[Worker, int], _Stream] = {}
        self._tasks: deque[Callable[[], None]] = deque()
        self._error: Exception | None = None
        self._is_closed = False
        self._reader: int | None = None  # the thread that is within `reading`
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))
        ear = self._context.socket(zmq.PAIR)
        ear.bind("inproc://tasks")
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.connect("inproc://tasks")
        self._thread = threading.Thread(target=self._run, args=(ear,), name="kvist-subscriber", daemon=True)
        self._thread.start()

    def follow(
        self,
        worker: Worker,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        dp_rank: int = 0,
        topic: str = "",
        codec: Codec = vllm,
        block_size: int | None = None,
        snapshot: Callable[[], Snapshot | None] | None = None,
    ) -> None:
        """Follow one rank of a worker. It need not run yet. Takes up to four sockets.

        Args:
            worker: its name in the index.
            endpoint: its PUB socket.
            replay_endpoint: its ROUTER socket; ``None``: what is lost is lost.
            dp_rank: the rank under which its events are filed.
            topic: what its messages begin with.
            codec: the form of its batches.
            block_size: tokens a block, as prompts are hashed for lookups; blocks of another size are refused, since
                none would be found. ``None``: any size is taken.
            snapshot: see `Feed`. It is called in the subscriber's thread: all other streams, `reading` and `stats` wait
                until it returns.

        Raises:
            AlreadyExists: this rank is followed.
            InvalidInput: an address that is none; a number out of range.
            EngineError: no more sockets can be opened.
        """
        if dp_rank < 0:
            raise InvalidInput(f"dp_rank must be at least 0, got {dp_rank}")
        if block_size is not None and block_size < 1:
            raise InvalidInput(f"block_size must be at least 1 token, got {block_size}")
        with self._changed:
            self._must_live()
            if (worker, dp_rank) in self._streams:
                raise AlreadyExists(f"worker {worker!r}, rank {dp_rank} is followed")
            can_replay = replay_endpoint is not None
            feed = Feed(
                self._index,
                worker,
                dp_rank=dp_rank,
                codec=codec,
                can_replay=can_replay,
                block_size=block_size,
                snapshot=snapshot,
            )
            stream = _Stream(self._context, feed, endpoint, replay_endpoint, topic.encode(), self._queue_batches)
            self._streams[worker, dp_rank] = stream
            self._ring()

    def unfollow(self, worker: Worker, dp_rank: int = 0) -> None:
        """Follow it no longer. Its blocks stay in the index until they are removed there.

        Raises:
            NotFound: it is not followed.
        """
        with self._changed:
            stream = self._stream(worker, dp_rank)
            del self._streams[worker, dp_rank]
            self._tasks.append(stream.close)
            self._ring()

    def check(self, worker: Worker, dp_rank: int = 0) -> None:
        """Ask the worker now whether there is something that we did not hear of.

        Raises:
            NotFound: it is not followed.
        """
        with self._changed:
            stream = self._stream(worker, dp_rank)
            self._tasks.append(stream.check)
            self._ring()

    def stats(self, worker: Worker, dp_rank: int = 0) -> FeedStats:
        """What happened on a worker's stream so far.

        Raises:
            NotFound: it is not followed.
        """
        with self._changed:
            return structs.replace(self._stream(worker, dp_rank).feed.stats)

    def wait(self, worker: Worker, seq: int, *, dp_rank: int = 0, timeout_s: float = 10.0) -> bool:
        """Return when the index has all that the worker told up to batch ``seq``, or may never have it.

        Returns:
            Whether it is so; otherwise the time is up.

        Raises:
            NotFound: it is not followed.
            Conflict: called within `reading`, where nothing changes.
        """
        self._must_not_read()

        def is_there() -> bool:
            stats = self._stream(worker, dp_rank).feed.stats
            return stats.next_seq is not None and stats.next_seq > seq and stats.state is not FeedState.CATCHING_UP

        with self._changed:
            return self._changed.wait_for(is_there, timeout_s)

    @contextmanager
    def reading(self) -> Iterator[FollowerT]:
        """The index, while no event changes it."""
        with self._changed:
            self._must_live()
            outer, self._reader = self._reader, threading.get_ident()
            try:
                yield self._index
            finally:
                self._reader = outer

    def close(self) -> None:
        """Stop following. The index stays as it is. Closing twice is nothing.

        Raises:
            EngineError: the thread had failed.
            Conflict: called within `reading`, for whose end the thread would wait.
        """
        self._must_not_read()
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._ring()
        self._thread.join()
        self._bell.close()
        self._context.term()
        if self._error is not None:
            raise EngineError(f"the subscriber failed: {self._error!r}") from self._error

    def _ring(self) -> None:
        """Wake the thread. Where so many rings wait that no more fit, it is awake."""
        with suppress(zmq.Again):
            self._bell.send(b"", zmq.NOBLOCK)

    def _stream(self, worker: Worker, dp_rank: int) -> _Stream:
        self._must_live()
        try:
            return self._streams[worker, dp_rank]
        except KeyError:
            raise NotFound(f"worker {worker!r}, rank {dp_rank} is not followed") from None

    def _must_live(self) -> None:
        if self._error is not None:
            raise EngineError(f"the subscriber failed: {self._error!r}") from self._error
        if self._is_closed:
            raise EngineError("the subscriber is closed")

    def _must_not_read(self) -> None:
        if self._reader == threading.get_ident():
            raise Conflict("this thread holds the index: leave reading() first")

    def _run(self, ear: zmq.Socket[bytes]) -> None:
        """The thread."""
        try:
            while not self._is_closed:
                self._turn(ear)
        except Exception as error:
            self._error = error
        with self._changed:
            for stream in self._streams.values():
                stream.close()
            for task in self._tasks:
                task()
            ear.close()
            self._changed.notify_all()

    def _turn(self, ear: zmq.Socket[bytes]) -> None:
        """Sleep until something comes or is due, and deal with it."""
        poller = zmq.Poller()
        poller.register(ear, zmq.POLLIN)
        with self._changed:
            streams = list(self._streams.values())
            for stream in streams:
                for socket in stream.sockets():
                    poller.register(socket, zmq.POLLIN)
            dues = [stream.due(self._replay_timeout, self._check_interval) for stream in streams]
        due = min((due for due in dues if due is not None), default=None)
        wait = None if due is None else min(max(0.0, due - time.monotonic()), _LONGEST_SLEEP_S)
        ready = dict(poller.poll(None if wait is None else math.ceil(wait * 1000)))
        with self._changed:
            if ear in ready:
                ear.recv()
            while self._tasks:
                self._tasks.popleft()()
            now = time.monotonic()
            for stream in streams:
                if not stream.is_closed:
                    stream.turn(ready, now, self._replay_timeout, self._check_interval)
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stream:
    """The sockets of one feed. All but the constructor is called in the subscriber's thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        feed: Feed,
        endpoint: str,
        replay_endpoint: str | None,
        topic: bytes,
        queue_batches: int,
    ) -> None:
        self.feed = feed
        self.is_closed = False
        self._context = context
        self._replay_endpoint = replay_endpoint
        self._dealer: zmq.Socket[bytes] | None = None
        self._heard = time.monotonic()
        self._young_interval = math.inf
        try:
            self._sub = context.socket(zmq.SUB)
        except zmq.ZMQError as error:
            raise EngineError(f"cannot follow {endpoint!r}: {error}") from None
        self._opened = [self._sub]
        try:
            self._sub.setsockopt(zmq.RCVHWM, queue_batches)
            self._monitor = self._sub.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self._opened.append(self._monitor)
            self._sub.subscribe(topic)
            self._sub.connect(endpoint)
            if replay_endpoint is not None:
                self._open_dealer(replay_endpoint).close(linger=0)
        except zmq.ZMQError as error:
            self.close()
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise EngineError(f"cannot follow {endpoint!r}: {error}") from None
            raise InvalidInput(f"cannot connect to {endpoint!r} and {replay_endpoint!r}: {error}") from None

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """Those to listen at. Batches wait in their queue while older ones are asked for."""
        return [self._sub, self._monitor] if self._dealer is None else [self._dealer]

    def due(self, replay_timeout: float, check_interval: float | None) -> float | None:
        """When something is to be done though nothing comes; ``None``: never."""
        if self._dealer is not None:
            return self._heard + replay_timeout
        return None if check_interval is None else self._heard + min(check_interval, self._young_interval)

    def turn(
        self, ready: dict[zmq.Socket[bytes], int], now: float, replay_timeout: float, interval: float | None
    ) -> None:
        """Deal with what came, or with the silence."""
        if self._dealer is not None:
            if self._read_replay(self._dealer):  # whether ready or not: an answer may have come since, as one waited
                self._heard = now
            elif now - self._heard >= replay_timeout:
                self._end_replay(answered=False)
            return
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            self._heard = now
            self._young_interval = _FIRST_INTERVAL_S
            self.check()
        elif self._sub in ready:
            self._heard = now
            self._read_live()
        elif interval is not None and now - self._heard >= min(interval, self._young_interval):
            self._heard = now
            self._young_interval *= 2
            self.check()

    def check(self) -> None:
        """Ask for what is missing, unless that is being done."""
        if self._dealer is None and not self.is_closed:
            self._ask(self.feed.check())

    def close(self) -> None:
        """Free the sockets."""
        if self.is_closed:
            return
        self.is_closed = True
        self._sub.disable_monitor()
        for socket in self._opened:
            socket.close(linger=0)
        if self._dealer is not None:
            self._dealer.close(linger=0)

    def _read_live(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                frames = self._sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 3 and len(frames[1]) == SEQ_BYTES:
                self._ask(self.feed.live(int.from_bytes(frames[1], "big"), frames[2]))
            else:
                self._ask(self.feed.unreadable(f"expected topic, number and batch, got frames of {_lengths(frames)}"))
            if self._dealer is not None:
                return

    def _read_replay(self, dealer: zmq.Socket[bytes]) -> bool:
        """Whether something came that we did not have. Nothing else keeps a replay open."""
        is_new = False
        for _ in range(_AT_ONCE):
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            seq, payload = frames[-2:] if len(frames) in (3, 4) else (b"", b"")  # newer vLLMs tell the topic, too
            if len(seq) != SEQ_BYTES:
                self.feed.stats.malformed += 1
                self.feed.stats.last_error = f"expected a replayed batch, got frames of {_lengths(frames)}"
            elif seq == END:
                self._end_replay(answered=True)
                return True
            else:
                is_new |= self.feed.replayed(int.from_bytes(seq, "big"), payload)
        return is_new

    def _end_replay(self, *, answered: bool) -> None:
        if self._dealer is not None:
            self._dealer.close(linger=0)
            self._dealer = None
        self._ask(self.feed.replay_ended(answered=answered))

    def _ask(self, start: int | None) -> None:
        """A socket for each request: what is left of an older answer cannot come in between."""
        if start is None or self._replay_endpoint is None:
            return
        self._heard = time.monotonic()
        try:
            self._dealer = self._open_dealer(self._replay_endpoint)
            self._dealer.send_multipart([b"", start.to_bytes(SEQ_BYTES, "big")], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.feed.stats.last_error = f"cannot ask {self._replay_endpoint!r}: {error}"
            self._end_replay(answered=False)

    def _open_dealer(self, endpoint: str) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RCVHWM, 0)
        try:
            dealer.connect(endpoint)
        except zmq.ZMQError:
            dealer.close(linger=0)
            raise
        return dealer


def _lengths(frames: list[bytes]) -> str:
    return ", ".join(str(len(frame)) for frame in frames) + " bytes"
