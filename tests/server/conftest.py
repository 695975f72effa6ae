"""One tiny model, engine and real HTTP server for the whole session; further servers where a test breaks things."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from starlette.types import ASGIApp

from kvist.engines.hf import Engine, HfPager, SamplingParams
from kvist.repo import Repository
from kvist.server import Server, Tokenizer, bind, create_app, url_of
from kvist.server.sessions import Sessions
from kvist.testing.models import make_model, make_tokenizer


class Api:
    """A client of one server, and what is behind it."""

    def __init__(self, url: str, engine: Engine, repo: Repository, tokenizer: Tokenizer, sessions: Sessions) -> None:
        self.url, self.engine, self.repo, self.tokenizer = url, engine, repo, tokenizer
        self.sessions = sessions
        self.http = httpx2.Client(base_url=url, timeout=None)

    def post(self, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        return self.http.post(path, json=body, headers=headers)

    def complete(
        self, prompt: Any = None, *, chat: bool = False, headers: dict[str, str] | None = None, **body: Any
    ) -> Any:
        """The answer to a completion that must succeed."""
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {"messages" if chat else "prompt": prompt, "return_token_ids": True, **body}
        answer = self.http.post(path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tokens(self, prompt: Any = None, **body: Any) -> list[int]:
        """The ids that a completion generates."""
        ids: list[int] = self.complete(prompt, **body)["choices"][0]["token_ids"]
        return ids

    def fork(self, what: str, **body: Any) -> Any:
        """The answer to a ``/v1/processfork`` call that must succeed."""
        answer = self.post(f"/v1/processfork/{what}", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path: str) -> Any:
        """The answer to a read that must succeed."""
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, body: dict[str, Any], path: str = "/v1/completions", **headers: str) -> Iterator[Any]:
        """The events of a stream, which must end with ``[DONE]``."""
        with self.http.stream("POST", path, json={"stream": True, **body}, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            done = False
            for line in answer.iter_lines():
                if not line:
                    continue
                assert not done
                data = line.removeprefix("data: ")
                done = data == "[DONE]"
                if not done:
                    yield json.loads(data)
            assert done

    def running(self) -> list[str]:
        """Sequences that a request computes."""
        return [
            info["id"] for info in self.get("/v1/processfork/sequences")["sequences"] if info["status"] != "resident"
        ]


def error_of(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer, which must be OpenAI's envelope with this status and code."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return dict(error)


@contextlib.contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """The url of a real server on a free port."""
    ready = threading.Event()
    with bind("127.0.0.1", 0) as listener:
        server = Server(app, ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        ready.wait()
        try:
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(engine: Engine, repo: Repository, model_dir: Path, **settings: Any) -> Iterator[Api]:
    """A client of a real server."""
    tokenizer = Tokenizer.load(model_dir)
    assert tokenizer is not None
    app = create_app(engine, repo, pager=HfPager, params=SamplingParams, tokenizer=tokenizer, **settings)
    with running(app) as url:
        api = Api(url, engine, repo, tokenizer, app.state.served.sessions)
        with api.http:
            yield api


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = make_model(tmp_path_factory.mktemp("model") / "tiny", layers=2, hidden=64, heads=4, kv_heads=2, max_len=2048)
    return make_tokenizer(path)


@pytest.fixture(scope="session")
def load(model_dir: Path) -> Callable[..., Engine]:
    """Loads another engine over the model."""

    def load(**settings: Any) -> Engine:
        return Engine.load(model_dir, **{"pages": 512, **settings})

    return load


@pytest.fixture(scope="session")
def engine(load: Callable[..., Engine]) -> Iterator[Engine]:
    with load() as engine:
        yield engine
    engine.check_integrity()


@pytest.fixture(scope="session")
def api(engine: Engine, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The server that most tests share."""
    with (
        Repository.open(str(tmp_path_factory.mktemp("store")), create=True) as repo,
        serving(engine, repo, model_dir) as api,
    ):
        yield api


@pytest.fixture
def own(engine: Engine, model_dir: Path, tmp_path: Path) -> Iterator[Api]:
    """A server of the test's own on the shared engine, with an empty repository in ``tmp_path / "store"``."""
    with Repository.open(str(tmp_path / "store"), create=True) as repo, serving(engine, repo, model_dir) as api:
        yield api
