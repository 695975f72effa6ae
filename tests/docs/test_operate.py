"""Every command of docs/guides/operate.md runs, in the order in which a reader meets it, against a real S3 server.

The server is vLLM where ``KVIST_VLLM_PYTHON`` names its interpreter (see tests/vllm), and `kvist serve` in any case.
The remedies at its end run apart, each after the damage that it is for.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvist.errors import KvistError
from kvist.repo import Repository
from kvist.repo.fsck import Code
from kvist.repo.signing import signers
from kvist.store import open_store
from kvist.testing.models import make_shape
from kvist.testing.objects import ObjectServer
from kvist.testing.processes import free_port, kill_tree
from kvist.testing.repo_model import content, manifest_of
from kvist.testing.vllm import OFFLINE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "operate.md").read_text()
GUIDE, REMEDIES = PAGE.split("## Remedies, one by one")
VLLM = os.environ.get("KVIST_VLLM_PYTHON")
OURS = "kvist serve --model ./model --port 8000 --pages 256 --tokens ./tokens.json"
SETTINGS = "--host 127.0.0.1 --block-size 32 --max-model-len 1024 --enforce-eager"


def blocks(text: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Shell:
    """One operator's shell: what one block exports, the next has."""

    def __init__(self, place: Path, variables: dict[str, str]) -> None:
        self.place, self.variables = place, variables
        commands = {"kvist": f'{shlex.quote(sys.executable)} -m kvist "$@"'}
        if VLLM:  # the CPU build's own `vllm` command cannot find its version; this is what it would start
            commands["vllm"] = f'shift\nexec {VLLM} -m vllm.entrypoints.openai.api_server --model "$@" {SETTINGS}'
        for name, script in commands.items():
            (place / name).write_text(f"#!/bin/sh\n{script}\n")
            (place / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.place}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return os.environ | OFFLINE | self.variables | {"PATH": path, "PYTHONHASHSEED": "0"}

    def run(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"umask 077\n{script}"],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextmanager
    def serving(self, script: str, url: str) -> Iterator[None]:
        with (self.place / "log").open("w") as log:
            server = subprocess.Popen(
                ["bash", "-euc", script],
                cwd=self.place,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                while True:
                    assert server.poll() is None, (self.place / "log").read_text()
                    try:
                        if httpx2.get(f"{url}/health").status_code == 200:
                            break
                    except httpx2.TransportError:
                        time.sleep(0.1)
                yield
            finally:
                kill_tree(server.pid)
                server.wait()


def exports(block: str, places: dict[str, str]) -> str:
    """The block with the buckets of this test."""
    for name, url in places.items():
        block, found = re.subn(rf'^(export {name}=)"[^"]*"', rf'\1"{url}"', block, flags=re.MULTILINE)
        assert found == 1
    return block


@pytest.mark.parametrize("engine", ["kvist serve", pytest.param("vllm", marks=pytest.mark.timeout(1800))])
def test_the_guide(engine: str, moto: ObjectServer, tmp_path: Path) -> None:
    if engine == "vllm" and not VLLM:
        pytest.skip("KVIST_VLLM_PYTHON does not name vLLM's interpreter")
    steps = iter(blocks(GUIDE))
    install = next(steps)
    make_shape(tmp_path / "model", "tiny", dtype="bfloat16")
    places = {"KVIST_STORE": moto.new_url(), "BACKUP": moto.new_url()}
    server, page = free_port(), free_port()
    url = f"http://127.0.0.1:{server}"
    shell = Shell(tmp_path, {**places, "U": url})
    assert "made repository" in shell.run(exports(next(steps), places))
    shell.run(next(steps))

    serve = next(steps) if engine == "vllm" else (next(steps) and OURS)
    assert "--port 8000" in serve
    with shell.serving(serve.replace("8000", str(server)), url):
        assert "hello" in shell.run(next(steps))
        dashboard = next(steps).replace("8080", str(page))
        with shell.serving(dashboard, f"http://127.0.0.1:{page}"):
            scrape = next(steps).replace("8080", str(page))
            counted = f"until ({scrape}) | grep '^kvist_repository_whole 1.0'; do sleep 0.2; done"
            shell.run(counted if engine == "vllm" else counted.replace("^vllm:kvist", "^kvist_pool"))
        daily = shell.run(next(steps))
        assert "clean" in daily

    shell.run(next(steps))
    assert "clean" in shell.run(next(steps))
    assert "restored" in shell.run(next(steps))
    upgrade = next(steps)
    assert install.split()[-1] in upgrade
    shell.run("\n".join(line for line in upgrade.splitlines() if not line.startswith("pip ")))

    damage(places["KVIST_STORE"])
    mended = shell.run(next(steps))
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert {finding["code"] for finding in findings} >= {Code.DAMAGED_PAGE}
    assert "clean" in mended
    assert next(steps, None) is None


def damage(url: str) -> None:
    """Flip a bit of a page in the bucket, as a bad disk would."""
    with open_store(url) as store:
        key = max(store.list("segments/"), key=lambda info: info.size).key
        data = bytearray(store.get(key))
        data[10] ^= 1
        store.put(key, data)


LOSSES = {
    "kvist repair --rewind": ("manifests/{manifest}", Code.DAMAGED_MANIFEST),
    "kvist branch --mend": ("refs/branches/main.ref", Code.DAMAGED_REF),
    "kvist branch --delete": ("snapshots/{hello}", Code.DANGLING_REF),
    "kvist gc --break-lock": ("locks/gc", Code.DAMAGED_LOCK),
    "kvist sign": ("signatures/{main}/{key}", Code.DAMAGED_SIGNATURE),
}
"""The object that is lost, and the finding that it is, by the command that mends it."""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """In a place with the repository ``kv`` and its backup ``copy``; ``main`` is signed and has a past."""
    shell = Shell(tmp_path, {"KVIST_STORE": "./kv", "BACKUP": "./copy"})
    with Repository.init((tmp_path / "kv").as_uri()) as repo:
        repo.put_pages([content(number) for number in range(4)])
        repo.commit([manifest_of([0, 1])], branch="main")
        repo.commit([manifest_of([0, 1, 2, 3])], branch="main")
        repo.commit([manifest_of([2, 3])], branch="hello")
    shell.run("kvist key new ./signer && kvist sign main --key ./signer && kvist push ./copy --all")
    return shell


@pytest.mark.parametrize("command", LOSSES)
def test_a_remedy(command: str, shell: Shell) -> None:
    lost, code = LOSSES[command]
    with Repository.open((shell.place / "kv").as_uri()) as repo:
        main, hello = repo.snapshot("main"), repo.snapshot("hello")
        digests = {"main": main.cid, "hello": hello.cid, "manifest": main.manifests[0]}
        names = {name: digest.removeprefix("sha256:") for name, digest in digests.items()}
        key = lost.format(**names, key=signers(repo.store, main.cid)[0])
        if code is Code.DANGLING_REF:
            repo.store.delete([key])
        else:
            repo.store.put(key, b"unreadable")
    found = json.loads(shell.run("kvist fsck --json || test $? = 3"))["findings"]
    assert [finding["code"] for finding in found] == [code]
    (remedy,) = [block for block in blocks(REMEDIES) if block.startswith(command)]
    shell.run(remedy)
    assert "clean" in shell.run("kvist fsck")


def test_the_remedies_that_no_damage_needs(shell: Shell) -> None:
    quota, tokens = [block for block in blocks(REMEDIES) if not block.startswith(tuple(LOSSES))]
    shell.run("kvist quota --bytes 1")
    assert "2,000,000,000,000" in shell.run(quota)
    shell.run("kvist token add app --tokens ./tokens.json")
    assert "app" in shell.run(tokens)


def test_what_is_installed_exists() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"kvist\[([\w,]+)\]", PAGE)
    assert named
    for extras in named:
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_it_tells_of_every_finding() -> None:
    table = GUIDE.partition("## When fsck speaks")[2]
    assert all(f"`{code}`" in table for code in Code)


def test_the_kinds_and_codes_of_errors() -> None:
    kinds = {error.kind: error.exit_code for error in _errors(KvistError)}
    rows = re.findall(r"^\| `(\w+)` \((\d+)\) \|", PAGE, re.MULTILINE)
    assert len(rows) >= 5
    assert {kind: int(code) for kind, code in rows} == {kind: kinds[kind] for kind, _ in rows}


def _errors(error: type[KvistError]) -> list[type[KvistError]]:
    return [error, *(one for child in error.__subclasses__() for one in _errors(child))]
