"""Real mock servers on free ports, each in a thread of its own."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

pytest.importorskip("zmq", reason="ZeroMQ is not installed: pip install 'kvist[router]'")
pytest.importorskip("prometheus_client", reason="pip install prometheus-client")

from kvist.engines.mock import MockEngine
from kvist.server.mock import Cluster, Ports, letter_tokenizer
from kvist.server.mock.letters import sayable
from kvist.server.mock.speech import Voice
from kvist.server.tokenizer import Tokenizer
from kvist.sim.config import EngineConfig

SIZE = 16
QUICK: dict[str, Any] = {"num_blocks": 512, "block_size": SIZE, "max_model_len": 4096, "speedup": 1000.0}


@dataclass
class Mock:
    """A client of one worker, and what is behind it."""

    cluster: Cluster
    number: int
    http: httpx2.Client

    @property
    def url(self) -> str:
        url: str = self.about["url"]
        return url

    @property
    def about(self) -> dict[str, Any]:
        return self.cluster.workers[self.number].about()

    @property
    def engine(self) -> MockEngine:
        return self.cluster.workers[self.number].served.engine

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: Any, **body: Any) -> Any:
        """The answer to a completion that must succeed."""
        answer = self.post("/v1/completions", prompt=prompt, **{"return_token_ids": True, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, messages: Any, **body: Any) -> Any:
        """The answer to a chat that must succeed."""
        answer = self.post("/v1/chat/completions", messages=messages, **{"return_token_ids": True, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """The events of a stream, which must end with ``[DONE]``."""
        with self.http.stream("POST", path, json={"stream": True, **body}) as answer:
            assert answer.status_code == 200, answer.read()
            *lines, done = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert done == "[DONE]"
        return [json.loads(line) for line in lines]

    def held(self, prompt: Any) -> int:
        """Leading blocks of a prompt in the pool."""
        blocks: int = self.post("/mock/held", prompt=prompt).json()["blocks"]
        return blocks

    def metrics(self) -> dict[str, float]:
        """Samples by name with its labels, without those that all have."""
        samples = {}
        for line in self.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                own = re.sub(r'(engine="0"|model_name="mock"),?', "", name).replace(",}", "}")
                samples[own] = float(value)
        return samples


@contextlib.contextmanager
def mocking(
    workers: int = 1,
    *,
    tokenizer: Tokenizer | None = None,
    mean: float | None = None,
    grace_s: float = 5.0,
    ports: Ports | None = None,
    **config: Any,
) -> Iterator[list[Mock]]:
    """A running cluster."""
    words = tokenizer or letter_tokenizer()
    voice = Voice(name="mock", tokenizer=words, vocabulary=sayable(words), mean_tokens=mean)
    ready = threading.Event()
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            cluster.serve(ready=ready.set, grace_s=grace_s)
        except BaseException as error:
            failed.append(error)
            ready.set()

    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(EngineConfig(**{**QUICK, **config}), voice, workers=workers, ports=ports))
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            ready.wait()
            yield [
                Mock(cluster, n, stack.enter_context(httpx2.Client(base_url=each.about()["url"], timeout=None)))
                for n, each in enumerate(cluster.workers)
            ]
        finally:
            cluster.stop()
            thread.join()
    assert not failed, failed


@pytest.fixture(scope="session")
def mock() -> Iterator[Mock]:
    """The server that most tests share; its answers end by themselves only where a test's own server's do."""
    with mocking() as (mock,):
        yield mock


@pytest.fixture
def start() -> Iterator[Callable[..., list[Mock]]]:
    """Starts servers of the test's own."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(mocking(*args, **settings))
