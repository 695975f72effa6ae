"""`kvist cartridge push`, to a hub of our own; in a process of its own, since that address is read at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("huggingface_hub")

from cartridge.hub_fake import Hub
from cartridge.making import make_cartridge

from .conftest import run


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_cartridge().save_pretrained(tmp_path / "saved")


def kvist(hub: Hub, home: Path, *words: str, token: str = "hf_secret") -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    env |= {"KVIST_REGISTRY": str(home / "registry.db"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "kvist", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_directory(hub: Hub, saved: Path, tmp_path: Path) -> None:
    done = kvist(hub, tmp_path, "cartridge", "push", str(saved), "hf:org/one", "--message", "first", "--json")
    assert done.returncode == 0, done.stderr
    told, repo = json.loads(done.stdout), hub.repos["org/one"]
    oid = repo.branches["main"]
    assert told["url"] == f"{hub.url}/org/one/commit/{oid}" and told["repository"] == "org/one"
    assert told["identity"] == make_cartridge().identity and not repo.private
    assert {path.name for path in saved.iterdir()} < repo.commits[oid].keys()


def test_one_that_is_registered(hub: Hub, saved: Path, tmp_path: Path) -> None:
    assert kvist(hub, tmp_path, "cartridge", "add", str(saved), "--id", "mine").returncode == 0
    done = kvist(hub, tmp_path, "cartridge", "push", "mine", "hf:org/two", "--private", "-q")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["org/two"]
    assert repo.private and done.stdout == f"{hub.url}/org/two/commit/{repo.branches['main']}\n"
    asked = kvist(hub, tmp_path, "cartridge", "push", "mine", "hf:org/two", "--pull-request")
    assert asked.stdout.split()[3] == f"{hub.url}/org/two/discussions/1:"


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["none", "hf:org/one"], 4, "unknown_cartridge"),
        (["SAVED", "org/one"], 2, "usage"),
        (["SAVED", "hf:"], 2, "usage"),
        (["SAVED", "s3:org/one"], 2, "usage"),
    ],
)
def test_what_is_refused(saved: Path, tmp_path: Path, words: list[str], code: int, kind: str) -> None:
    words = [str(saved) if word == "SAVED" else word for word in words]
    ran = run(["cartridge", "push", *words, "--json"], {"KVIST_REGISTRY": str(tmp_path / "registry.db")})
    assert (ran.code, ran.error["kind"]) == (code, kind)


def test_damage_and_a_wrong_token_publish_nothing(hub: Hub, saved: Path, tmp_path: Path) -> None:
    ran = kvist(hub, tmp_path, "cartridge", "push", str(saved), "hf:org/one", "--json", token="hf_other")
    assert json.loads(ran.stderr)["error"]["kind"] in ("store", "not_found")
    path = next(saved.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ran = kvist(hub, tmp_path, "cartridge", "push", str(saved), "hf:org/one", "--json")
    assert (ran.returncode, json.loads(ran.stderr)["error"]["kind"]) == (20, "damaged_cartridge")
    assert hub.repos == {} and "hf_" not in ran.stderr
