"""`kvist ui` as a process: it shows, changes nothing unless asked to, and ends at a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from kvist.repo import Repository

from .conftest import LAYOUT, put_manifest

pytest.importorskip("starlette", reason="needs the extra server")

_COMMAND = [sys.executable, "-m", "kvist"]
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("KVIST_")}


@pytest.fixture
def store(tmp_path: Path) -> str:
    with Repository.open(str(tmp_path / "store"), create=True) as repo:
        repo.commit([put_manifest(repo, 0, 3)], branch="main", message="the first")
    return str(tmp_path / "store")


@contextmanager
def showing(store: str, *options: str) -> Iterator[tuple[httpx2.Client, subprocess.Popen[str]]]:
    command = [*_COMMAND, "--store", store, "ui", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_ENVIRONMENT) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while "kvist ui at" not in line and line:
            line = process.stderr.readline()
        told = re.fullmatch(r"kvist ui at (http://127\.0\.0\.1:\d+) \(store (\S+)\)\n", line)
        assert told is not None, line + process.stderr.read()
        with httpx2.Client(base_url=told[1], timeout=None) as client:
            yield client, process
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait() == 0


def test_it_shows_and_changes_nothing(store: str) -> None:
    with showing(store) as (client, _):
        assert client.get("/health").json() == {"status": "ok"}
        answer = client.get("/")
        assert "the first" in answer.text
        with Repository.open(store) as repo:
            cid = repo.resolve("main")
        assert LAYOUT.model is not None
        assert LAYOUT.model in client.get(f"/ui/snapshots/{cid}").text
        assert client.post("/ui/fork", data={"cid": cid, "n": "1", "name": "x"}).status_code == 400
        metrics = client.get("/metrics").text
        assert 'kvist_http_requests_total{method="GET",route="/",status="200"} 1.0' in metrics
        assert 'kvist_store_call_seconds_count{call="get"}' in metrics
    assert not (Path(store) / "refs" / "branches" / "x").exists()


def test_a_fork_is_seen_by_the_command_line(store: str) -> None:
    with showing(store, "--allow-write") as (client, _):
        with Repository.open(store) as repo:
            cid = repo.resolve("main")
        answer = client.post("/ui/fork", data={"cid": cid, "n": "2", "name": "x"})
        assert answer.status_code == 303
        assert "Forked: x/0, x/1" in client.get(answer.headers["location"]).text
    listed = subprocess.run([*_COMMAND, "--store", store, "branch", "-q"], capture_output=True, text=True, check=True)
    assert {"x/0", "x/1"} <= set(listed.stdout.split())


def test_logs_in_json(store: str) -> None:
    with showing(store, "--log-format", "json", "--log-level", "info") as (client, process):
        client.get("/")
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert any(json.loads(line)["logger"] == "uvicorn.error" for line in lines)
    assert all({"time", "level", "message"} <= json.loads(line).keys() for line in lines)


def test_no_repository_is_an_error(tmp_path: Path) -> None:
    command = [*_COMMAND, "--store", str(tmp_path / "nothing"), "ui", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=_ENVIRONMENT)
    assert done.returncode == 10
    assert "no kvist repository" in done.stderr


def test_it_listens_to_this_machine_alone_without_tokens(store: str) -> None:
    command = [*_COMMAND, "--store", store, "ui", "--port", "0", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, env=_ENVIRONMENT)
    assert done.returncode == 2
    assert "without tokens" in done.stderr
