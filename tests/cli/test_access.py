"""``kvist token``, ``key``, ``sign``, ``verify`` and ``quota``, and what `kvist serve` says of them at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.repo import Repository
from kvist.server.tokens import Scope, Tokens

from .conftest import Kvist, put_manifest, run


@pytest.fixture
def committed(kvist: Kvist) -> str:
    with kvist.opened() as repo:
        return repo.commit([put_manifest(repo, 0, 2)], branch="main").cid


def test_a_token_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    env = {"KVIST_TOKENS": str(path)}
    made = run(["token", "add", "app", "--tenant", "acme", "--expires", "90d", "--note", "x"], env)
    assert made.code == 0, made.err
    text = made.out.strip()
    assert Tokens(path).grant_of(text).tenant == "acme" and "once" in made.err
    admin = run(["token", "add", "ops", "--scope", "admin", "--json"], env).json
    assert Tokens(path).grant_of(admin["token"]).scope is Scope.ADMIN
    listed = run(["token", "list"], env).out
    assert "acme" in listed and "never" in listed and text not in listed
    found = run(["token", "list", "--json"], env).json["tokens"]
    assert [(each["id"], each["scope"], each["tenant"]) for each in found] == [
        ("app", "write", "acme"), ("ops", "admin", None),
    ]  # fmt: skip
    assert run(["token", "list", "-q"], env).lines == ["app", "ops"]
    assert run(["token", "remove", "app"], env).code == 0
    assert run(["token", "remove", "app", "--json"], env).error["kind"] == "not_found"
    assert run(["token", "list", "-q"], env).lines == ["ops"]


@pytest.mark.parametrize(
    "words",
    [["add", "a"], ["add", "a", "--expires", "soon"], ["add", "a", "--scope", "root"], ["list"]],
)
def test_a_token_command_that_makes_no_sense(words: list[str], tmp_path: Path) -> None:
    env: dict[str, str | None] = {"KVIST_TOKENS": str(tmp_path / "t") if len(words) > 2 else None}
    assert run(["token", *words], env).code == 2


def test_a_token_of_no_name(tmp_path: Path) -> None:
    env = {"KVIST_TOKENS": str(tmp_path / "tokens.json")}
    for words in (["a/b"], ["a", "--tenant", "../a"], ["a", "--tenant", "a/b"]):
        assert run(["token", "add", *words, "--json"], env).error["kind"] == "invalid_name"
    assert not (tmp_path / "tokens.json").exists()


def test_sign_and_verify(kvist: Kvist, committed: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
    key, trusted = tmp_path / "key", tmp_path / "key.pub"
    made = kvist.ok("key", "new", str(key), "--name", "the farm", "--json").json
    assert key.stat().st_mode & 0o777 == 0o600 and trusted.read_text() == made["line"] + "\n"
    assert kvist("key", "new", str(key), "--json").error["kind"] == "already_exists"
    trusted.chmod(0o644)
    refused = kvist("verify", "main", "--trusted", str(trusted), "--json")
    assert (refused.code, refused.error["kind"]) == (13, "untrusted_snapshot")
    assert "key" in kvist.ok("sign", "main", "--key", str(key)).out
    found = kvist.ok("verify", "main", "--trusted", str(trusted), "--json").json
    assert found == {
        "cid": committed, "signed_by": {"key": made["id"], "name": "the farm"}, "signatures": [made["id"]],
        "page_halves": 4,
    }  # fmt: skip
    assert "the farm" in kvist.ok("verify", "main", "--trusted", str(trusted)).out
    assert kvist.ok("verify", "main", "--quick", "--json").json["signed_by"] is None
    with kvist.opened() as repo:
        (segment,) = repo.store.list("segments/")
        whole = repo.store.get(segment.key)
        repo.store.put(segment.key, b"\xff" + whole[1:])
    damaged = kvist("verify", "main", "--json")
    assert (damaged.code, damaged.error["kind"]) == (20, "damaged_page")


def test_quota(kvist: Kvist, committed: str) -> None:
    told = kvist.ok("quota", "--json").json
    assert told["bytes"]["limit"] is None and told["bytes"]["used"] > 0 and told["snapshots"] == {
        "used": 1, "limit": None,
    }  # fmt: skip
    told = kvist.ok("quota", "--bytes", "50GB", "--snapshots", "1", "--json").json
    assert (told["bytes"]["limit"], told["snapshots"]["limit"]) == (50 * 10**9, 1)
    refused = kvist("fork", "main", "-n", "1", "--json")
    assert (refused.code, refused.error["kind"]) == (30, "store_full")
    assert kvist.ok("quota", "--snapshots", "5", "--json").json["bytes"]["limit"] == 50 * 10**9
    kvist.ok("fork", "main", "-n", "1")
    assert "none" in kvist.ok("quota", "--none").out
    assert kvist("quota", "--none", "--bytes", "1").code == 2
    assert kvist("quota", "--bytes", "much").code == 2


def test_a_salted_repository(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    made = run(["init", "--salted", "--store", url, "--json"], {})
    assert made.code == 0, made.err
    with Repository.open(url) as repo:
        assert len(repo.config.salt) == 64 and repo.config.salt not in made.out + made.err
    for words in (["stats", "--json"], ["log", "--json"], ["fsck", "--json"]):
        ran = run([*words, "--store", url], {})
        assert ran.code == 0 and repo.config.salt not in ran.out + ran.err


def test_a_server_is_not_opened_to_everybody(tmp_path: Path) -> None:
    env = {"KVIST_STORE": (tmp_path / "store").as_uri()}
    for words in (["serve", "--model", str(tmp_path)], ["mock", "serve"], ["init"], ["ui"]):
        if words == ["init"]:
            assert not (tmp_path / "store").exists()
            assert run(words, env).code == 0
            continue
        refused = run([*words, "--host", "0.0.0.0", "--port", "0", "--json"], env)
        assert (refused.code, refused.error["kind"]) == (2, "unguarded"), words
        assert "kvist token add" in refused.error["hint"]
