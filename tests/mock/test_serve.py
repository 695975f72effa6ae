"""``kvist mock serve`` as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cli.conftest import run
from kvist.errors import Conflict, InvalidInput
from kvist.server import bind, url_of
from kvist.testing.models import make_tokenizer
from kvist.testing.processes import free_port

from .conftest import Mock, mocking

COMMAND = [sys.executable, "-m", "kvist", "mock", "serve", "--port", "0", "--num-blocks", "64", "--block-size", "16"]


class Served:
    """A running command."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def lines(self, count: int) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline() for _ in range(count)]

    def document(self) -> Any:
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                return json.loads(text)
        raise AssertionError(self.process.communicate()[1])


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []
    try:
        yield lambda *options: started.append(Served(*options)) or started[-1]  # type: ignore[func-returns-value]
    finally:
        for served in started:
            served.process.kill()
            served.process.communicate()


def test_workers_until_a_signal(serve: Callable[..., Served], tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    served = serve("--workers", "2", "--json", "--tokenizer", str(tmp_path / "tokenizer.json"), "--speedup", "1e3",
                   "--served-model-name", "m", "--timing", "fixed:10,10", "--policy", "lfu")  # fmt: skip
    told = served.document()
    assert (told["model"], told["block_size"], len(told["workers"])) == ("m", 16, 2)
    urls = [worker["url"] for worker in told["workers"]]
    assert len({worker[key] for worker in told["workers"] for key in worker}) == 6
    for url in urls:
        answer = httpx2.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 9, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 9
    body = {"prompt": [5], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{urls[1]}/v1/completions", json=body, timeout=None) as stream:
        lines = stream.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        *_, last, _ = lines  # what has begun is finished
        assert last == "data: [DONE]"
    assert served.process.communicate() == ("", "")
    assert served.process.returncode == 0


def test_what_people_are_told(serve: Callable[..., Served]) -> None:
    assert serve("-q").lines(1)[0].startswith("http://127.0.0.1:")
    title, row = serve().lines(2)
    assert title.split() == ["worker", "url", "kv", "events", "replay"]
    assert [word.split(":")[0] for word in row.split()] == ["0", "http", "tcp", "tcp"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-blocks", "0"], "num_blocks must be a whole number"),
        (["--max-model-len", "1025"], "max_model_len must be at most the pool's 1024 tokens"),
        (["--no-chunked-prefill", "--max-num-batched-tokens", "512"], "max_num_batched_tokens must be at least"),
        (["--scheduling", "sglang"], "a mock engine has vLLM's"),
        (["--tokenizer", "/"], "expected a tokenizer.json"),
        (["--mean-output-tokens", "0.5"], "mean_output_tokens"),
        (["--mean-output-tokens", "nan"], "mean_output_tokens"),
        (["--mean-output-tokens", "inf"], "mean_output_tokens"),
        (["--served-model-name", ""], "served_model_name"),
        (["--seed", "-1"], "seed must be a whole number"),
        (["--timing", "fixed:nan,1"], "prefill_each_ms"),
        (["--num-blocks", "1000000000000"], "num_blocks must be a whole number"),
        (["--timing", "/nowhere"], "/nowhere"),
        (["--workers", "3", "--port", "65534"], "http ports must lie in 1 to 65535"),
        (["--workers", "3", "--port", "20000", "--kv-events-port", "20002"], "overlap"),
    ],
)
def test_what_cannot_be_is_refused_before_it_listens(options: list[str], says: str) -> None:
    done = run([*COMMAND[3:], *options], {})
    assert done.code == 2, done.err
    assert says in done.err
    assert done.out == ""


def free_row(count: int) -> int:
    """The first of so many ports in a row on which nobody listens, below those that a system gives out by itself."""
    for first in range(20_000, 32_000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(bind("127.0.0.1", port))
            except InvalidInput:
                continue
            return first
    raise AssertionError(f"no {count} free ports in a row")


def test_ports_in_a_row() -> None:
    from kvist.server.mock import Ports

    first = free_row(9)
    ports = Ports(http=first, events=first + 3, replay=first + 6)
    with mocking(3, ports=ports) as mocks:
        assert [mock.about for mock in mocks] == [
            {
                "url": f"http://127.0.0.1:{first + n}",
                "kv_events_endpoint": f"tcp://127.0.0.1:{first + 3 + n}",
                "kv_replay_endpoint": f"tcp://127.0.0.1:{first + 6 + n}",
            }
            for n in range(3)
        ]
        with pytest.raises(InvalidInput, match="cannot listen"), mocking(ports=Ports(http=first + 2)):
            pass
        with pytest.raises(Conflict, match="in use"), mocking(2, ports=Ports(events=first + 4)):
            pass


def test_ports_are_free_again_after_a_failure() -> None:
    from kvist.server.mock import Ports

    with bind("127.0.0.1", 0) as taken:
        port = int(url_of(taken).rpartition(":")[2])
        other = free_port()
        with pytest.raises(Conflict), mocking(ports=Ports(http=other, replay=port)):
            pass
    bind("127.0.0.1", other).close()


def test_streams_that_take_too_long_end_with_an_error(start: Callable[..., list[Mock]]) -> None:
    (mock,) = start(speedup=0.01, grace_s=0.1)
    with mock.http.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 900, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        mock.cluster.stop()
        *_, error, _, last, _ = lines
    assert last == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
