"""Every command of docs/quickstart.md runs, in the order in which a reader meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.testing.models import make_model, make_tokenizer
from kvist.testing.worker import Worker

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    yield tmp_path


def shell(script: str) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def answers(block: str, worker: Worker) -> list[dict[str, object]]:
    """What the curl commands of a block answer."""
    commands = re.findall(r"^curl(?:.*\\\n)*.*$", block, re.MULTILINE)
    return [json.loads(shell(command.replace("localhost:8000", worker.url))) for command in commands]


def test_the_shell_commands(place: Path) -> None:
    _, serve, tiny, snapshot, checkout, look = blocks("sh")
    shell(tiny)
    assert serve == "kvist serve --model ./my-model --store ./kv --port 8000\n"
    options = (place / "my-model", "./kv", "--threads", "1")
    worker = Worker(*options).wait()
    try:
        completion, snap, fork = answers(snapshot, worker)
    finally:
        worker.kill()
    assert snap["branch"] == "essay"
    assert fork["branches"] == ["ending/0", "ending/1", "ending/2"]
    with Worker(*options) as worker:
        done, more = answers(checkout, worker)
    assert (done["cid"], done["bit_exact"]) == (snap["cid"], True)
    tokens = completion["usage"]["total_tokens"]  # type: ignore[index]  # it may have ended by itself
    assert more["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens - 1  # type: ignore[index]
    told = shell(look)
    assert "essay" in told
    assert "ending/0" in told


def test_the_python_code(place: Path) -> None:
    (code,) = blocks("python")
    make_tokenizer(make_model(place / "my-model", layers=2, hidden=64, heads=4, kv_heads=2))
    after = """
with Engine.load("my-model") as engine:
    whole = [step.token_id for step in engine.submit(prompt, SamplingParams(max_tokens=40))]
assert first + more == whole, (first, more, whole)
"""
    done = subprocess.run([sys.executable, "-c", code + after], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
