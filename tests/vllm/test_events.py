"""vLLM's KV events: its own decoder reads ours, and our subscriber follows a real server's through loss."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zmq", reason="ZeroMQ is not installed: pip install 'kvist[router]'")

import zmq

from kvist.blocks.events import Cleared, Event, Removed, Stored, Tier
from kvist.hashing import local_block_hashes
from kvist.router.feed import FeedState, FeedStats
from kvist.router.index import Index
from kvist.router.subscribe import Subscriber
from kvist.router.wire import Batch, BlockEvent, from_event, vllm
from kvist.testing.scenario.requests import GREEDY, prompt
from kvist.testing.vllm import VllmServer

BLOCK = 32
CAPACITY = 40
PREFIX = prompt(4 * BLOCK, seed=1)
BEFORE = [[*PREFIX, *prompt(150 + 9 * n, seed=10 + n)] for n in range(10)]
AFTER = [[*PREFIX, *prompt(40 + 25 * n, seed=30 + n)] for n in range(12)]

READ = """
import msgspec
from vllm.distributed.kv_events import KVEventBatch
batch = msgspec.msgpack.Decoder(type=KVEventBatch).decode(bytes.fromhex(arguments[0]))
emit([msgspec.to_builtins(batch), msgspec.msgpack.encode(batch).hex()])
"""


def test_its_own_decoder_reads_our_batches(run_offline: Callable[..., Any]) -> None:
    tokens = [[1, 2, 3, 4], [5, 6, 7, 8]]
    events = [
        from_event(Event(0, Stored([2**64 - 1, 7], 9, token_ids=tokens)), block_size=4, lora_name="adapter"),
        from_event(Event(1, Stored([11], None, token_ids=tokens[:1]), Tier.HOST), block_size=4),
        from_event(Event(2, Removed([7, 9]), Tier.DISK), block_size=4),
        from_event(Event(3, Removed([8]), Tier.EXTERNAL), block_size=4),
        from_event(Event(4, Cleared()), block_size=4),
        BlockEvent(Stored([3], 7, token_ids=tokens[:1]), block_size=4, extra_keys=[["salt"]], group=1, spec_kind="mla"),
    ]
    ours = Batch(12.5, events, 3)
    (ts, read, rank), written = run_offline(READ, vllm.encode(ours).hex())
    assert (ts, rank) == (12.5, 3)
    stored = {"type": "BlockStored", "block_size": 4, "lora_id": None, "lora_name": None}
    first, second, third, fourth, fifth, sixth = read
    assert first == stored | {
        "block_hashes": [2**64 - 1, 7],
        "parent_block_hash": 9,
        "token_ids": [1, 2, 3, 4, 5, 6, 7, 8],
        "medium": "GPU",
        "lora_name": "adapter",
    }
    assert second == stored | {
        "block_hashes": [11],
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4],
        "medium": "CPU",
    }
    assert third == {"type": "BlockRemoved", "block_hashes": [7, 9], "medium": "STORAGE"}
    assert fourth == {"type": "BlockRemoved", "block_hashes": [8], "medium": "EXTERNAL"}
    assert fifth == {"type": "AllBlocksCleared"}
    assert (sixth["extra_keys"], sixth["group_idx"], sixth["kv_cache_spec_kind"]) == ([["salt"]], 1, "mla")
    again = vllm.decode(bytes.fromhex(written))
    assert again == vllm.decode(vllm.encode(ours)), "we read what it writes"


class Relay:
    """Passes messages on, but some: of each ten, two or three that follow each other."""

    def __init__(self, source: str, target: str, *, loses: bool) -> None:
        self.lost = 0
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.connect(source)
        self._sub.subscribe(b"")
        self._pub = self._context.socket(zmq.PUB)
        self._pub.bind(target)
        self._loses = loses
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                frames = self._sub.recv_multipart()
                seq = int.from_bytes(frames[1], "big")
                if self._loses and seq % 10 in (3, 4, 7 + seq // 10 % 2):
                    self.lost += 1
                else:
                    self._pub.send_multipart(frames)
        except zmq.ContextTerminated:
            self._sub.close(linger=0)
            self._pub.close(linger=0)

    def close(self) -> None:
        self._context.term()
        self._thread.join()


class Run:
    """One server, what was asked of it, and what a subscriber knew of it in the end."""

    def __init__(self, start: Callable[..., VllmServer], model: Path, place: Path, *, loses: bool) -> None:
        place.mkdir()
        source, replay, target = (f"ipc://{place}/{name}" for name in ("events", "replay", "relay"))
        settings = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": source,
            "replay_endpoint": replay,
            "topic": "kv",
        }
        options = ("--num-gpu-blocks-override", str(CAPACITY), "--max-model-len", "1024")
        options += ("--kv-events-config", json.dumps(settings))
        relay = Relay(source, target, loses=loses)
        try:
            with Subscriber(Index(), check_interval_s=None) as subscriber:
                subscriber.follow(1, target, replay, topic="kv")
                server = start(model, None, *options, block_size=BLOCK, env={"VLLM_SERVER_DEV_MODE": "1"})
                try:
                    self._ask(server, subscriber)
                finally:
                    server.stop()
                self.stats: FeedStats = subscriber.stats(1)
                with subscriber.reading() as index:
                    self.names = index.hashes_of(1)
                    self.found = [index.find(local_block_hashes(text, BLOCK)) for text in (*BEFORE, *AFTER)]
        finally:
            relay.close()
        self.lost = relay.lost

    def _ask(self, server: VllmServer, subscriber: Subscriber[Index]) -> None:
        self.cached: list[int] = []
        self.known: list[int] = []
        self._complete(server, subscriber, BEFORE)
        with subscriber.reading() as index:
            self.before = index.hashes_of(1)
        assert server.http.post("/reset_prefix_cache").status_code == 200
        server.complete(prompt(5), max_tokens=1, **GREEDY)  # vLLM tells with its next step; this fills no block
        settled(subscriber)
        with subscriber.reading() as index:
            self.reset = index.hashes_of(1)
        self._complete(server, subscriber, AFTER)

    def _complete(self, server: VllmServer, subscriber: Subscriber[Index], texts: list[list[int]]) -> None:
        """Completions; of some, how much of the prompt the index believes to be cached, and how much was."""
        for number, text in enumerate(texts):
            if number % 5 == 0:  # if it were asked each time, no gap would ever show
                settled(subscriber)
                with subscriber.reading() as index:
                    found = index.find(local_block_hashes(text, BLOCK))
                self.known.append(found[1, 0].device * BLOCK if found else 0)
            cached = server.complete(text, max_tokens=40, **GREEDY).cached_tokens
            if number % 5 == 0:
                self.cached.append(cached)
        settled(subscriber)


def settled(subscriber: Subscriber[Index]) -> None:
    """Return when nothing more is told."""
    last = -1
    while True:
        before = subscriber.stats(1).replays
        while (stats := subscriber.stats(1)).state is FeedState.CATCHING_UP or stats.replays == before:
            if stats.state is not FeedState.CATCHING_UP:
                subscriber.check(1)
            time.sleep(0.05)
        if stats.next_seq == last:
            return
        last = stats.next_seq or 0


@pytest.fixture(scope="module")
def runs(
    start: Callable[..., VllmServer], model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Run, Run]]:
    """With loss, and without."""
    place = tmp_path_factory.mktemp("e")
    yield tuple(Run(start, model("tiny"), place / name, loses=name == "a") for name in "ab")  # type: ignore[misc]


def test_a_server_is_followed_through_eviction_reset_and_loss(
    runs: tuple[Run, Run], note: Callable[[str], None]
) -> None:
    lossy, whole = runs
    assert lossy.lost >= 5
    assert whole.lost == 0
    for run in runs:
        assert run.stats.state is FeedState.CURRENT
        assert (run.stats.resyncs, run.stats.refused, run.stats.malformed, run.stats.skipped) == (0, 0, 0, 0)
        assert len(run.before) > CAPACITY // 2
        assert run.reset == frozenset()
        assert len(run.names) > CAPACITY // 2
        assert run.cached == run.known, "the index knew what was cached"
        assert any(run.known)
    assert lossy.stats.gaps >= 1
    assert lossy.before == whole.before
    assert lossy.names == whole.names
    assert lossy.found == whole.found
    assert any(whole.found)
    note(f"kv events: {whole.stats.batches} batches followed, {lossy.lost} of them lost and replayed")
