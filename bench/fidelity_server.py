"""The real side of bench/fidelity.py: a vLLM with a small pool, what clients see of it, and what its pool tells."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import zmq

from kvist.blocks.events import Removed, Stored
from kvist.router.wire import vllm as wire
from kvist.testing.vllm import VllmServer

Event = tuple[float, Stored | Removed]
BLOCK = 32
BUDGET, LONGEST = 512, 1536


class Answer(NamedTuple):
    """What a client saw of its request; seconds of one clock."""

    sent: float
    first: float
    last: float
    cached: int
    output: int


class Pool:
    """Follows the events of the server's pool, in the background."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)
        self._stops = False
        self._heard = time.monotonic()
        self.events: list[Event] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._stops:
            while self._socket.poll(50):
                batch = wire.decode(self._socket.recv_multipart()[-1])
                self.events += [(batch.ts, e.data) for e in batch.events if isinstance(e.data, Stored | Removed)]
                self._heard = time.monotonic()

    def take(self) -> list[Event]:
        """All since the last time, once it is quiet."""
        since = time.monotonic()
        while time.monotonic() - max(since, self._heard) < 0.5:
            time.sleep(0.05)
        taken, self.events = self.events, []
        return taken

    def close(self) -> None:
        self._stops = True
        self._thread.join()
        self._context.destroy(linger=0)


class Server:
    """A vLLM with a small pool, and its events."""

    def __init__(self, model: Path, blocks: int, seats: int, directory: Path, python: str) -> None:
        endpoint = f"ipc://{directory}/events"
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
        options = ["--num-gpu-blocks-override", str(blocks), "--max-model-len", str(LONGEST)]
        options += ["--max-num-batched-tokens", str(BUDGET), "--max-num-seqs", str(seats)]
        options += ["--kv-events-config", json.dumps(events), "--enable-logging-iteration-details"]
        options += ["--enable-log-requests"]
        env = {"VLLM_SERVER_DEV_MODE": "1"}
        self.vllm = VllmServer(model, None, *options, python=python, dtype="float32", block_size=BLOCK, env=env)
        self.pool = Pool(endpoint)

    def __enter__(self) -> Self:
        try:
            self.vllm.wait()
            for tokens in (40, 500, 40):  # what the first passes compile is no part of the time model
                self.ask([7 + tokens % 3] * tokens, 4)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.vllm.stop()
        self.pool.close()

    def ask(self, prompt: list[int], output: int) -> Answer:
        body = {"prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 1.0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        first = last = 0.0
        usage: dict[str, Any] = {}
        sent = time.perf_counter()
        with self.vllm.http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}: {answer.read().decode()}")
            rest = b""
            for data in answer.iter_bytes():
                *lines, rest = (rest + data).split(b"\n")  # `iter_lines` would split at U+0085 in a text too
                for event in (json.loads(line[6:]) for line in lines if line.startswith(b"data: {")):
                    usage = event.get("usage") or usage
                    if event.get("choices"):
                        last = time.perf_counter()
                        first = first or last
        assert usage["prompt_tokens"] == len(prompt) and usage["completion_tokens"] == output, usage
        return Answer(sent, first, last, (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0, output)

    def post(self, path: str) -> None:
        if (answer := self.vllm.http.post(path)).status_code != 200:
            raise RuntimeError(f"POST {path}: status {answer.status_code}: {answer.text}")

    def clear(self) -> None:
        """Empty the cache."""
        self.post("/reset_prefix_cache")
        self.pool.take()

    @property
    def queued(self) -> int:
        """Requests that have reached the engine so far."""
        return self.vllm.log.count("Added request ")

    def count(self, metric: str) -> float:
        found = re.findall(rf"^vllm:{metric}_total{{.*}} (\S+)$", self.vllm.http.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))


def alone(server: Server, prompts: list[list[int]], outputs: list[int], _: int) -> list[Answer]:
    return [server.ask(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def waves(server: Server, prompts: list[list[int]], outputs: list[int], width: int) -> list[Answer]:
    answers: list[Answer] = []
    with ThreadPoolExecutor(width) as threads:
        for start in range(0, len(prompts), width):
            server.post("/pause?mode=keep&clear_cache=false")
            wave: list[Future[Answer]] = []
            for prompt, output in zip(prompts[start : start + width], outputs[start : start + width], strict=True):
                queued = server.queued
                wave.append(threads.submit(server.ask, prompt, output))
                while server.queued == queued and not wave[-1].done():  # the next must come after it
                    time.sleep(0.002)
            server.post("/resume")
            answers += [each.result() for each in wave]
    return answers


def free(server: Server, prompts: list[list[int]], outputs: list[int], width: int) -> list[Answer]:
    with ThreadPoolExecutor(width) as threads:
        return list(threads.map(server.ask, prompts, outputs))
