"""Every command of docs/guides/vllm.md runs, in the order in which a reader meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from vllm_servers import PYTHON, hash_seed

from kvist.testing.processes import free_port, kill_tree
from kvist.testing.vllm import OFFLINE

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "vllm.md").read_text()
# The CPU build's own `vllm` command cannot find its version; this is what it would start.
PRELUDE = f'vllm() {{ shift; exec {PYTHON} -m vllm.entrypoints.openai.api_server --model "$@"; }}\n'

# Eager, since compiling is switched off for the tests.
SETTINGS = "--block-size 32 --max-model-len 4096 --enforce-eager"


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@contextmanager
def serving(block: str, url: str, place: Path) -> Iterator[int]:
    env = os.environ | OFFLINE | hash_seed()
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
                    time.sleep(0.2)
            yield server.pid
        finally:
            kill_tree(server.pid)
            server.wait()


def test_the_guide(model: Callable[..., Path], tmp_path: Path) -> None:
    install, serve, stream, snapshot, kill, checkout, go_on, fork = blocks()
    assert install == 'pip install "kvist[vllm]"\n'
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (tmp_path / "model").symlink_to(model())
    assert "--port 8000" in serve
    assert "file:///srv/kv" in serve
    serve = serve.replace("--port 8000", f"--port {port} {SETTINGS}")
    serve = serve.replace("file:///srv/kv", (tmp_path / "kv").as_uri())

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
        assert sequence["cached_tokens"] == sequence["tokens"] - 1
        shell(kill, SERVER=str(server))
    with serving(serve, url, tmp_path):
        done = json.loads(shell(checkout))
        assert (done["cid"], done["bit_exact"], done["restored_tokens"]) == (first["cid"], True, first["tokens"])
        usage = json.loads(shell(go_on))["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1 == first["tokens"]
        assert len(json.loads(shell(fork))["cids"]) == 12
