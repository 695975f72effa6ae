"""`Publisher`: a worker's events as a ZeroMQ stream that vLLM's, SGLang's and Dynamo's subscribers understand.

A PUB socket sends numbered batches and forgets them: who is slow or late loses some. A ROUTER socket sends what it is
asked for again, as long as the buffer holds it. Knows nothing of who listens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, NamedTuple, Self

import zmq

from kvist.blocks.events import Event, Stored
from kvist.errors import Conflict, InvalidInput
from kvist.router.wire import Batch, Codec, from_event, vllm

SEQ_BYTES: Final = 8
END: Final = (-1).to_bytes(SEQ_BYTES, "big", signed=True)
"""In place of a number: nothing follows in this replay."""

_PATIENCE_MS: Final = 1000
"""For a peer that asked for a replay and does not read it."""


class PublisherStats(NamedTuple):
    """What a publisher did so far.

    Attributes:
        batches: sent, which is also the number of the next one.
        events: in them.
        replays: requests that were answered whole.
        replayed: batches that were sent again.
        refused: requests of another form, and requests whose sender went away or did not read.
    """

    batches: int
    events: int
    replays: int
    replayed: int
    refused: int


class Publisher:
    """Numbers batches from 0, sends and keeps them. Safe to be used from any thread; use it as a context manager.

    Attributes:
        endpoint: where subscribers connect, with the port that was chosen.
        replay_endpoint: where they ask for what they missed.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        replay_endpoint: str = "tcp://127.0.0.1:*",
        *,
        block_size: int,
        codec: Codec = vllm,
        topic: str = "",
        dp_rank: int = 0,
        lora_name: str | None = None,
        cache_salt: str | None = None,
        buffer_batches: int = 10_000,
        queue_batches: int = 100_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Bind both sockets.

        Args:
            endpoint: ZeroMQ address; ``*`` as port: any that is free.
            replay_endpoint: likewise.
            block_size: tokens a block; subscribers need it to know the blocks by their tokens.
            codec: the form of a batch.
            topic: what subscribers filter by.
            dp_rank: data-parallel rank of all events, told with every batch.
            lora_name: adapter that all blocks belong to.
            cache_salt: the tenant that all blocks belong to; see `kvist.router.wire.BlockEvent`.
            buffer_batches: how many batches can be asked for again.
            queue_batches: how many may wait for one slow subscriber before it loses some.
            clock: seconds since the epoch.

        Raises:
            InvalidInput: an address that cannot be bound, a number below 1, a negative rank.
            Conflict: an address that is in use.
        """
        counts = {"block_size": block_size, "buffer_batches": buffer_batches, "queue_batches": queue_batches}
        for name, value in counts.items():
            if value < 1:
                raise InvalidInput(f"{name} must be at least 1, got {value}")
        if dp_rank < 0:
            raise InvalidInput(f"dp_rank must be at least 0, got {dp_rank}")
        self._codec = codec
        self._block_size = block_size
        self._topic = topic.encode()
        self._dp_rank = dp_rank
        self._lora_name = lora_name
        self._cache_salt = cache_salt
        self._clock = clock
        self._lock = threading.Lock()
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffer_batches)
        self._next = self._events = self._replays = self._replayed = self._refused = 0
        self._context = zmq.Context()
        try:
            self._pub = self._context.socket(zmq.PUB)
            self._pub.setsockopt(zmq.SNDHWM, queue_batches)
            self.endpoint = _bind(self._pub, endpoint)
            self._router = self._context.socket(zmq.ROUTER)
            # Wait for a slow peer rather than leave out what it asked for.
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.SNDTIMEO, _PATIENCE_MS)
            self.replay_endpoint = _bind(self._router, replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        bell = self._context.socket(zmq.PAIR)
        bell.bind("inproc://end")
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.connect("inproc://end")
        self._thread = threading.Thread(target=self._answer, args=(bell,), name="kvist-replay", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[Event]) -> int | None:
        """Send these events as one batch. Never waits for subscribers.

        Returns:
            The batch's number; ``None`` if there were no events, of which nothing is sent.

        Raises:
            InvalidInput: events of another rank; stored blocks without token ids, by which subscribers know them, or
                with local hashes that are not theirs; events that the form cannot carry. Nothing was sent.
            Conflict: the publisher is closed.
        """
        if not events:
            return None
        for event in events:
            if event.dp_rank != self._dp_rank:
                raise InvalidInput(f"this publisher tells events of rank {self._dp_rank}, got one of {event.dp_rank}")
        if any(isinstance(event.data, Stored) and event.data.token_ids is None for event in events):
            raise InvalidInput("stored blocks must be told with their token ids: subscribers know them by these")
        names = {"lora_name": self._lora_name, "cache_salt": self._cache_salt}
        told = [from_event(event, block_size=self._block_size, **names) for event in events]
        with self._lock:
            if self._pub.closed:
                raise Conflict("the publisher is closed")
            payload = self._codec.encode(Batch(self._clock(), told, self._dp_rank))
            number = self._next
            seq = number.to_bytes(SEQ_BYTES, "big")
            self._next += 1
            self._events += len(events)
            self._buffer.append((seq, payload))
            self._send([self._topic, seq, payload])
        return number

    @property
    def stats(self) -> PublisherStats:
        """Counts so far."""
        with self._lock:
            return PublisherStats(self._next, self._events, self._replays, self._replayed, self._refused)

    def close(self) -> None:
        """Send what waits, for at most a second, and free the addresses. Closing twice is nothing."""
        with self._lock:
            if self._pub.closed:
                return
            self._pub.close(linger=_PATIENCE_MS)
        self._bell.send(b"")
        self._thread.join()
        self._bell.close()
        self._context.term()

    def _send(self, frames: list[bytes]) -> None:
        self._pub.send_multipart(frames)

    def _answer(self, bell: zmq.Socket[bytes]) -> None:
        """The thread that serves replays."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(bell, zmq.POLLIN)
        while bell not in (ready := dict(poller.poll())):
            if self._router in ready:
                self._replay(self._router.recv_multipart())
        self._router.close(linger=_PATIENCE_MS)
        bell.close()

    def _replay(self, request: list[bytes]) -> None:
        """Send all batches from a number on, then `END`."""
        if len(request) != 3 or request[1] or len(request[2]) != SEQ_BYTES:
            with self._lock:
                self._refused += 1
            return
        peer, start = request[0], int.from_bytes(request[2], "big")
        with self._lock:
            oldest = self._next - len(self._buffer)
            wanted = list(islice(self._buffer, max(0, start - oldest), None))
        try:
            for seq, payload in wanted:
                self._router.send_multipart([peer, b"", seq, payload])
            self._router.send_multipart([peer, b"", END, b""])
        except zmq.ZMQError:  # the peer is gone, or does not read
            with self._lock:
                self._refused += 1
            return
        with self._lock:
            self._replays += 1
            self._replayed += len(wanted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind, and tell the address with its port."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise Conflict(f"{endpoint} is in use") from None
        raise InvalidInput(f"cannot bind {endpoint!r}: {error}") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
