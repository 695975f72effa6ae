"""Cartridges on a hub: pushed, pulled, pinned, private, and out of reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist.cartridge.hub import resolve
from kvist.errors import NotFound

from .hub_fake import Hub, Repo
from .making import make_cartridge

Call = Callable[..., dict[str, Any]]
TOKEN = {"token": "hf_secret"}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def child(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    home = tmp_path_factory.mktemp("hub")
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | settings
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cartridge.hub_child"],
        cwd=Path(__file__).parents[2],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.repos.clear()
    server.gets.clear()
    server.broken, server.before_file = False, lambda: None
    return server


@pytest.fixture
def call(child: subprocess.Popen[str], tmp_path: Path) -> Call:
    """Calls in the child, with a cache of the test's own."""

    def ask(what: str, /, **kwargs: Any) -> dict[str, Any]:
        assert child.stdin is not None and child.stdout is not None
        if what == "open":
            kwargs = {"cache_dir": str(tmp_path / "cache")} | kwargs
        child.stdin.write(json.dumps({"call": what, "kwargs": kwargs}) + "\n")
        child.stdin.flush()
        answer: dict[str, Any] = json.loads(child.stdout.readline())
        return answer

    return ask


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_cartridge().save_pretrained(tmp_path / "saved", max_shard_size=1500)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def put(hub: Hub, directory: Path, below: str = "", **more: bytes) -> str:
    repo = hub.repos.setdefault("org/one", Repo())
    return repo.commit({below + name: data for name, data in files(directory).items()} | more, "main")


def test_pushed_and_pulled(hub: Hub, call: Call, saved: Path) -> None:
    url = call("push", directory=str(saved), repo_id="org/one", **TOKEN)["result"]
    repo = hub.repos["org/one"]
    oid = repo.branches["main"]
    assert url == f"{hub.url}/org/one/commit/{oid}"
    tree = repo.commits[oid]
    assert {name: data for name, data in tree.items() if name in files(saved)} == files(saved)
    assert tree["README.md"].startswith(b"---\nlibrary_name: kvist\n") and b"base_model: org/tiny" in tree["README.md"]
    opened = call("open", name="org/one")["result"]
    assert opened["identity"] == make_cartridge().identity
    assert opened["directory"].endswith(oid) and files(Path(opened["directory"])) == files(saved)


def test_a_second_push_replaces_the_first_whole(hub: Hub, call: Call, saved: Path, tmp_path: Path) -> None:
    assert "result" in call("push", directory=str(saved), repo_id="org/one", commit_message="first", **TOKEN)
    hub.repos["org/one"].commits[hub.repos["org/one"].branches["main"]]["README.md"] = b"mine"
    other = make_cartridge(seed=1)
    other.save_pretrained(tmp_path / "other")
    assert "result" in call("push", directory=str(tmp_path / "other"), repo_id="org/one", **TOKEN)
    tree = hub.repos["org/one"].commits[hub.repos["org/one"].branches["main"]]
    assert sorted(tree) == [".gitattributes", "README.md", "cartridge.json", "cartridge.safetensors"]
    assert tree["README.md"] == b"mine"
    assert call("open", name="org/one")["result"]["identity"] == other.identity


def test_files_of_the_cartridge_before_are_deleted_whatever_they_are_called(
    hub: Hub, call: Call, saved: Path, tmp_path: Path
) -> None:
    make_cartridge(seed=1).save_pretrained(tmp_path / "other")
    document = json.loads((tmp_path / "other" / "cartridge.json").read_text())
    document["files"][0]["name"] = "kv.safetensors"
    before = {"cartridge.json": json.dumps(document).encode(), "kv.safetensors": b"x", "model.safetensors": b"mine"}
    hub.repos["org/one"] = repo = Repo()
    repo.commit(before, "main")
    assert "result" in call("push", directory=str(saved), repo_id="org/one", **TOKEN)
    tree = repo.commits[repo.branches["main"]]
    assert set(tree) == {*files(saved), "README.md", "model.safetensors"}
    repo.commit({"cartridge.json": b"what is this"}, "main")
    assert "result" in call("push", directory=str(saved), repo_id="org/one", **TOKEN)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"training_steps": 5, "ids": False}, "trained in 5 steps"),
        ({"ids": True}, "as a prefill computes them"),
        ({"ids": False, "source_format": "peft"}, "from peft"),
    ],
)
def test_the_card_says_what_is_known(hub: Hub, call: Call, tmp_path: Path, said: dict[str, Any], kind: str) -> None:
    made = make_cartridge(**said)
    made.save_pretrained(tmp_path / "c")
    assert made.manifest.origin == kind
    assert "result" in call("push", directory=str(tmp_path / "c"), repo_id="org/one", **TOKEN)
    repo = hub.repos["org/one"]
    assert f"`org/tiny`, {kind}.".encode() in repo.commits[repo.branches["main"]]["README.md"]


def test_saved_and_pushed_at_once_and_from_memory(hub: Hub, call: Call, saved: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "named")
    ran = call("save", directory=str(saved), save_directory=target, push_to_hub=True, private=True, **TOKEN)
    assert ran["result"] == target and hub.repos["me/named"].private
    assert "result" in call("push_from_memory", directory=str(saved), repo_id="org/memory", **TOKEN)
    assert call("open", name="org/memory")["result"]["identity"] == make_cartridge().identity


def test_branches_and_pull_requests(hub: Hub, call: Call, saved: Path) -> None:
    assert "result" in call("push", directory=str(saved), repo_id="org/one", revision="next", **TOKEN)
    repo = hub.repos["org/one"]
    assert "cartridge.json" in repo.commits[repo.branches["next"]]
    assert "cartridge.json" not in repo.commits[repo.branches["main"]]
    assert call("open", name="org/one")["kind"] == "not_found"
    assert call("open", name="org/one", revision="next")["result"]["identity"] == make_cartridge().identity
    ran = call("push", directory=str(saved), repo_id="org/one", create_pr=True, **TOKEN)
    assert ran["result"] == f"{hub.url}/org/one/discussions/1"
    assert "cartridge.json" not in repo.commits[repo.branches["main"]]


def test_only_what_the_manifest_names_is_fetched(hub: Hub, call: Call, saved: Path) -> None:
    put(hub, saved, **{"model.safetensors": b"x" * 1000, "code.py": b"raise SystemExit"})
    assert "result" in call("open", name="org/one")
    assert sorted(hub.gets) == sorted(files(saved))


def test_a_commit_pins_it(hub: Hub, call: Call, saved: Path, tmp_path: Path) -> None:
    first = put(hub, saved)
    put(hub, make_cartridge(seed=1).save_pretrained(tmp_path / "other", max_shard_size=1500))
    assert call("open", name="org/one", revision=first)["result"]["identity"] == make_cartridge().identity
    assert call("open", name="org/one")["result"]["identity"] == make_cartridge(seed=1).identity


def test_a_branch_that_moves_meanwhile(hub: Hub, call: Call, saved: Path, tmp_path: Path) -> None:
    """Manifest and files are of one commit."""
    put(hub, saved)
    other = make_cartridge(seed=1).save_pretrained(tmp_path / "other", max_shard_size=1500)

    def move() -> None:
        hub.before_file = lambda: None
        put(hub, other)

    hub.before_file = move
    assert call("open", name="org/one")["result"]["identity"] == make_cartridge().identity


def test_a_subfolder(hub: Hub, call: Call, saved: Path) -> None:
    put(hub, saved, "all/one/", **{"cartridge.json": b"{}"})
    opened = call("open", name="org/one", subfolder="all/one")["result"]
    assert opened["identity"] == make_cartridge().identity
    assert all(path.startswith("all/one/") for path in hub.gets)
    assert call("open", name="org/one", subfolder="all/two")["kind"] == "not_found"
    assert call("open", name="org/one", subfolder="../x")["kind"] == "invalid_input"
    assert call("open", name="org/one")["kind"] == "invalid_cartridge"


def test_a_private_one_needs_a_token(hub: Hub, call: Call, saved: Path) -> None:
    put(hub, saved)
    hub.repos["org/one"].private = True
    ran = call("open", name="org/one")
    assert ran["kind"] == "not_found" and "org/one" in ran["message"]
    assert "result" in call("open", name="org/one", **TOKEN)


@pytest.mark.parametrize("kwargs", [{"name": "org/none"}, {"name": "org/one", "revision": "none"}])
def test_what_is_not_there(hub: Hub, call: Call, saved: Path, kwargs: dict[str, Any]) -> None:
    put(hub, saved)
    assert call("open", **kwargs)["kind"] == "not_found"


@pytest.mark.parametrize("name", ["a/b/c", "/none/such", "./none", "", "a b", "../x", "org/one.."])
def test_names_that_are_none(hub: Hub, call: Call, name: str) -> None:
    assert call("open", name=name)["kind"] in ("not_found", "invalid_input", "invalid_cartridge")


def test_a_token_that_may_not_write(hub: Hub, call: Call, saved: Path) -> None:
    put(hub, saved)
    assert call("push", directory=str(saved), repo_id="org/one", token="hf_other")["kind"] in ("store", "not_found")
    assert len(hub.repos["org/one"].commits) == 1


def test_damage_on_the_way_is_found(hub: Hub, call: Call, saved: Path) -> None:
    path = next(saved.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    put(hub, saved)
    assert call("open", name="org/one")["kind"] == "damaged_cartridge"
    assert "result" in call("open", name="org/one", verify=False)


@pytest.mark.parametrize("what", ["push", "save"])
def test_damage_is_not_published(hub: Hub, call: Call, saved: Path, tmp_path: Path, what: str) -> None:
    """Of files that were whole when they were saved, under a manifest that is written anew."""
    words = {"push": {"repo_id": "org/one"}, "save": {"save_directory": str(saved), "push_to_hub": True}}[what]
    source = saved if what == "push" else make_cartridge().save_pretrained(tmp_path / "same")
    path = next(saved.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert call(what, directory=str(source), **words, **TOKEN)["kind"] == "damaged_cartridge"
    assert hub.repos == {}


def test_a_file_that_the_repository_lacks(hub: Hub, call: Call, saved: Path) -> None:
    next(saved.glob("*.safetensors")).unlink()
    put(hub, saved)
    assert call("open", name="org/one")["kind"] == "damaged_cartridge"


def test_out_of_reach(hub: Hub, call: Call, saved: Path) -> None:
    """What was fetched once is found without the hub; by name of the branch too."""
    put(hub, saved)
    assert call("open", name="org/one", local_files_only=True)["kind"] == "not_found"
    hub.broken = True
    assert call("open", name="org/one")["kind"] == "store"
    hub.broken = False
    assert "result" in call("open", name="org/one")
    hub.broken = True
    assert call("open", name="org/one", local_files_only=True)["result"]["identity"] == make_cartridge().identity


def test_a_download_is_forced(hub: Hub, call: Call, saved: Path) -> None:
    put(hub, saved)
    directory = Path(call("open", name="org/one")["result"]["directory"])
    blob = next(directory.glob("*.safetensors")).resolve()
    blob.write_bytes(b"x" * blob.stat().st_size)
    assert call("open", name="org/one")["kind"] == "damaged_cartridge"
    assert call("open", name="org/one", force_download=True)["result"]["identity"] == make_cartridge().identity


def test_a_directory_goes_before_a_repository(hub: Hub, call: Call, saved: Path, tmp_path: Path) -> None:
    put(hub, saved)
    shutil.copytree(saved, tmp_path / "here")
    assert call("open", name=str(tmp_path / "here"))["result"]["directory"] == str(tmp_path / "here")
    assert hub.gets == []


@pytest.mark.parametrize("name", ["/" + "x" * 5_000, "x" * 300 + "/", "a\0b"])
def test_a_name_that_nothing_can_have(name: str) -> None:
    with pytest.raises(NotFound, match="there is no directory"):
        resolve(name)
