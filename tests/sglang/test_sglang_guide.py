"""Every command of docs/guides/sglang.md runs, in the order in which a reader meets it, on a server of SGLang."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from msgspec import structs
from sglang_servers import PYTHON, SHIMS, needs_server

from kvist.engines.sglang.settings import Settings
from kvist.testing.models import make_shape
from kvist.testing.processes import free_port, kill_tree
from kvist.testing.sglang import CPU, ON_CPU

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "sglang.md").read_text()
PRELUDE = f'python() {{ exec {PYTHON} "$@" {" ".join(ON_CPU)} --dtype float32 --max-total-tokens 16384; }}\n'


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_guide_names_every_option() -> None:
    table = PAGE.partition("## Options")[2].partition("\n## ")[0]
    assert [field.name for field in structs.fields(Settings) if f"`{field.name}`" not in table] == []


@contextmanager
def serving(block: str, url: str, place: Path) -> Iterator[int]:
    paths = ":".join([str(SHIMS), os.environ.get("PYTHONPATH", "")])
    env = os.environ | CPU | {"PYTHONPATH": paths, "SGLANG_PLUGINS": ""}
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-euc", PRELUDE + block], cwd=place, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while True:
                assert server.poll() is None, (place / "log").read_text()
                try:
                    if httpx2.get(f"{url}/health").status_code == 200:
                        break
                except httpx2.TransportError:
                    pass
                time.sleep(0.2)
            yield server.pid
        finally:
            kill_tree(server.pid)
            server.wait()


@needs_server
@pytest.mark.timeout(1800)
def test_the_guide(tmp_path: Path) -> None:
    install, serve, stream, snapshot, kill, checkout, go_on, fork = blocks()
    assert install == 'pip install "kvist[sglang]"\n'
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    make_shape(tmp_path / "model", "tiny")
    assert "--port 8000" in serve
    assert "file:///srv/kv" in serve
    serve = serve.replace("--port 8000", f"--port {port}").replace("file:///srv/kv", (tmp_path / "kv").as_uri())

    def shell(script: str, **names: str) -> str:
        env = os.environ | {"U": url} | names
        done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with serving(serve, url, tmp_path) as server:
        shell(stream)
        while (tmp_path / "story.txt").stat().st_size < 2000:
            time.sleep(0.05)
        first = json.loads(shell(snapshot))
        (sequence,) = first["sequences"]
        assert sequence["id"] == "story"
        assert sequence["cached_tokens"] == sequence["tokens"] - 1
        shell(kill, SERVER=str(server))
    with serving(serve, url, tmp_path):
        done = json.loads(shell(checkout))
        assert (done["cid"], done["bit_exact"], done["restored_tokens"]) == (first["cid"], True, first["tokens"])
        usage = json.loads(shell(go_on))["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1 == first["tokens"]
        assert len(json.loads(shell(fork))["cids"]) == 12
