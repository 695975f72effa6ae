"""The commands and the code of docs/guides/mock.md run, against the server that its first command starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("zmq")
pytest.importorskip("prometheus_client")

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "mock.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_guide() -> None:
    serve, ask, metrics = blocks("sh")
    command = [sys.executable, "-m", *shlex.split(serve)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            line = server.stdout.readline()
            assert line, "it ended"
            text += line
        told, (shown,) = json.loads(text), blocks("json")
        assert len(told["workers"]) == 2
        assert told.keys() == json.loads(shown).keys()
        worker = told["workers"][0]
        assert worker.keys() == json.loads(shown)["workers"][0].keys()

        def shell(script: str) -> str:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                env={**os.environ, "URL": worker["url"]},
                capture_output=True,
                text=True,
                check=True,
            )
            return done.stdout

        answer = json.loads(shell(ask))
        assert answer["usage"]["completion_tokens"] == 64
        names = {"URL": worker["url"], "EVENTS": worker["kv_events_endpoint"], "REPLAY": worker["kv_replay_endpoint"]}
        exec(compile("\n".join(blocks("python")), "mock.md", "exec"), names)
        names["client"].close()  # type: ignore[attr-defined]
        assert shell(metrics).startswith('vllm:prefix_cache_hits_total{engine="0",model_name="mock"} ')
        everything = shell("curl -s $URL/metrics")
        for name in re.findall(r"`(vllm:\w+)`", PAGE):
            assert re.search(rf"^{name}(_count|_sum|_bucket)?(\{{| )", everything, re.MULTILINE), name
    finally:
        server.terminate()
        assert server.communicate(timeout=60)[0] == ""
    assert server.returncode == 0
