"""``kvist serve`` as a process, and the reference page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from kvist.engines.hf import Engine, HfPager, SamplingParams
from kvist.errors import InvalidInput
from kvist.repo import Repository
from kvist.server import Server, bind, create_app, url_of
from kvist.server.tokens import Scope, add_token

from .conftest import Api, error_of, running

COMMAND = [sys.executable, "-m", "kvist", "serve"]


def start(model_dir: Path, *options: str, **env: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "--model", str(model_dir), "--port", "0", "--threads", "1", "--pages", "64", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env)


def ready(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The url and the store that a starting process tells."""
    assert process.stderr is not None
    line = process.stderr.readline()
    told = re.fullmatch(r"kvist serving \S+ at (http://127\.0\.0\.1:\d+) \(store (\S+)\)\n", line)
    if told is None:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    return told[1], told[2]


def test_serve_until_a_signal(model_dir: Path, tmp_path: Path) -> None:
    process = start(
        model_dir, "--served-model-name", "served", "--layout-model", "kept", KVIST_STORE=str(tmp_path / "store")
    )
    url, store = ready(process)
    with process, httpx2.Client(base_url=url, timeout=None) as client:
        assert store == f"file://{tmp_path / 'store'}"
        assert client.get("/v1/models").json()["data"][0]["id"] == "served"
        body = {"prompt": "hello", "max_tokens": 30, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert client.post("/v1/processfork/snapshot").status_code == 200
            assert client.get("/v1/processfork/snapshots/main").json()["layout"]["model"] == "kept"
            process.send_signal(signal.SIGTERM)
            *_, last, _ = lines  # what has begun is finished
            assert last == "data: [DONE]"
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert (tmp_path / "store" / "kvist.json").is_file()


def test_signals_end_the_server_and_not_the_process() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        server = Server(lambda *_: None)  # type: ignore[arg-type, return-value]
        with server.capture_signals():
            signal.raise_signal(number)
            assert server.should_exit
        assert signal.getsignal(number) is before


def test_without_a_tokenizer(engine: Engine, own: Api) -> None:
    app = create_app(engine, own.repo, pager=HfPager, params=SamplingParams)
    with running(app) as url, httpx2.Client(base_url=url, timeout=None) as client:
        answer = client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3, "logprobs": 1})
        assert answer.json()["choices"][0]["text"] == ""
        assert all(name.startswith("token_id:") for name in answer.json()["choices"][0]["logprobs"]["tokens"])
        error_of(client.post("/v1/completions", json={"prompt": "text"}), 400, "invalid_input")
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        error_of(client.post("/v1/chat/completions", json=chat), 400, "invalid_input")


def test_streams_that_take_too_long_end_with_an_error(
    load: Callable[..., Engine], own: Api, caplog: pytest.LogCaptureFixture
) -> None:
    with load() as engine:
        app = create_app(engine, own.repo, pager=HfPager, params=SamplingParams)
        ready = threading.Event()
        server = Server(app, ready=ready.set, end_streams=engine.close, grace_s=0.1)
        with bind("127.0.0.1", 0) as listener:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            ready.wait()
            with httpx2.Client(base_url=url_of(listener), timeout=None) as client:
                body = {"prompt": [5], "max_tokens": 2000, "ignore_eos": True, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    server.should_exit = True
                    *_, error, _, last, _ = lines
            thread.join()
    assert last == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine"
    assert [record.name for record in caplog.records] == ["kvist.server"]


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(InvalidInput, match="cannot listen"):
        bind("127.0.0.1", int(url_of(listener).rpartition(":")[2]))


def test_every_route_and_field_is_in_the_reference(api: Api) -> None:
    from kvist.server import schema
    from kvist.server.errors import STATUS

    page = (Path(__file__).parents[2] / "docs/reference/http.md").read_text()
    app = create_app(api.engine, api.repo, pager=lambda _: None, params=lambda: None)  # type: ignore[arg-type, return-value]
    for route in app.routes:
        (method,) = route.methods - {"HEAD"}  # type: ignore[attr-defined]
        path = route.path.replace(":path", "")  # type: ignore[attr-defined]
        if path.startswith(("/ui/", "/favicon")):  # the page's own, which have a table
            assert f"{path}`" in page or f"{path}?" in page, path
        else:
            assert f"## `{method} {path}`" in page, path
    for body in (schema.CompletionBody, schema.ChatBody, schema.SnapshotBody, schema.ForkBody, schema.CheckoutBody):
        for field in body.__struct_fields__:
            assert f"`{field}`" in page, field
    for name in (*schema._NEUTRAL, *schema.HARMLESS):
        assert f"`{name}`" in page, name
    for kind, status in STATUS.items():
        assert re.search(rf"\| {status} \|.*`{kind.kind}`", page), kind


def test_no_secret_is_ever_told(model_dir: Path, tmp_path: Path) -> None:
    """What a process with tokens and a store's credentials writes and answers holds none of them."""
    tokens = tmp_path / "tokens.json"
    texts = {scope: add_token(tokens, scope.text, scope) for scope in (Scope.READ, Scope.ADMIN)}
    acme = add_token(tokens, "acme", Scope.WRITE, tenant="acme")
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "S3-very-secret", "AWS_ACCESS_KEY_ID": "AKIA-not-told",
        "AWS_SESSION_TOKEN": "session-not-told", "KVIST_REDIS_PASSWORD": "redis-very-secret",
        "KVIST_KEY_PASSPHRASE": "phrase-very-secret",
    }  # fmt: skip
    process = start(
        model_dir, "--log-level", "debug", "--tokens", str(tokens), KVIST_STORE=str(tmp_path / "store"), **secrets
    )
    assert process.stderr is not None
    said, told = "", None
    while told is None:
        line = process.stderr.readline()
        assert line, said
        said += line
        told = re.search(r"kvist serving \S+ at (http://127\.0\.0\.1:\d+) ", line)
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(process.stderr or []))
    reader.start()
    with process, httpx2.Client(base_url=told[1], timeout=None) as client:
        answers = []
        for text in (*texts.values(), acme, "kvist_unknown-but-secret", ""):
            headers = {"Authorization": f"Bearer {text}"} if text else {}
            for method, path, body in (
                ("GET", "/v1/models", None),
                ("GET", f"/v1/processfork/snapshots/{text or 'x'}", None),
                ("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 2}),
                ("POST", "/v1/processfork/snapshot", {"name": "a"}),
                ("POST", "/v1/completions", {"nonsense": 1}),
                ("GET", "/metrics", None),
                ("GET", "/", None),
                ("GET", "/v1/processfork/lineage", None),
            ):
                got = client.request(method, path, json=body, headers=headers)
                assert got.status_code < 500, got.text
                if text not in path:  # it was sent as a name
                    answers.append(got.text + str(got.headers))
        process.send_signal(signal.SIGTERM)
        reader.join()
        assert process.wait() == 0
    with Repository.open((tmp_path / "store/tenants/acme").as_uri()) as repo:
        salt = repo.config.salt
        assert [ref.name for ref in repo.refs.all()] == ["a"]
    everything = said + "".join(rest) + "".join(answers)
    assert "acme" in everything  # its repository was opened, and said so
    for secret in (*texts.values(), acme, "unknown-but-secret", salt, *secrets.values()):
        assert secret not in everything
