"""`kvist cartridge add`, `remove` and `list`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cartridge.making import make_cartridge
from kvist.cartridge import hub
from kvist.cartridge.library import Library
from kvist.cartridge.registry import Registry

from .conftest import Kvist, Ran


class Registered:
    """`kvist cartridge` on one registry, and cartridges to put there."""

    def __init__(self, kvist: Kvist, tmp_path: Path) -> None:
        self.kvist, self.root = kvist, tmp_path
        self.path = tmp_path / "registry.db"

    def __call__(self, act: str, *words: str) -> Ran:
        return self.kvist("cartridge", act, *words, env={"KVIST_REGISTRY": str(self.path)})

    def ok(self, act: str, *words: str) -> Any:
        ran = self(act, *words, "--json")
        assert ran.code == 0, ran.err
        return ran.json

    def saved(self, name: str, **said: Any) -> str:
        made = make_cartridge(tokens=20 + len(name), cartridge_id=name, **said)
        return str(made.save_pretrained(self.root / name))

    def refused(self, code: int, kind: str, act: str, *words: str) -> dict[str, Any]:
        before = self.ok("list")
        ran = self(act, *words, "--json")
        assert (ran.code, ran.error["kind"]) == (code, kind), ran.err
        assert self.ok("list") == before
        return ran.error


@pytest.fixture
def registered(kvist: Kvist, tmp_path: Path) -> Registered:
    return Registered(kvist, tmp_path)


def test_add_list_remove(registered: Registered) -> None:
    assert registered("list").out == ""
    law, tax = registered.saved("law", labels={"area": "law"}), registered.saved("taxes")
    made = registered.ok("add", law, "--label", "tier=1", "--label", "a=b=c")
    assert made["registry"] == f"sqlite:///{registered.path}"
    assert (made["id"], made["location"], made["tokens"], made["missing"]) == ("law", law, 23, False)
    assert made["labels"] == {"area": "law", "tier": "1", "a": "b=c"}
    assert registered("add", tax, "-q").lines == ["taxes"]

    listed = registered.ok("list")["cartridges"]
    assert [one["id"] for one in listed] == ["law", "taxes"]
    assert {key: made[key] for key in listed[0]} == listed[0]
    assert registered("list", "-q").lines == ["law", "taxes"]
    assert registered("list", "-q", "--label", "area=law", "--label", "tier=1").lines == ["law"]
    assert registered("list", "-q", "--label", "area=tax").lines == []
    assert registered("list", "-q", "--model", "org/tiny").lines == ["law", "taxes"]
    assert registered("list", "-q", "--model", "tiny").lines == []
    text = registered("list").out
    assert "org/tiny" in text and "area=law" in text and law in text and "missing" not in text

    assert registered("remove", "law").out == f"law is taken out of sqlite:///{registered.path}\n"
    assert registered("list", "-q").lines == ["taxes"]
    assert Path(law).is_dir()


def test_a_running_library_takes_them_up(registered: Registered) -> None:
    with Library(registry=Registry(registered.path)) as library:
        registered.ok("add", registered.saved("law"), "--id", "civil/law")
        entry = library.get("civil/law")
        assert (entry.directory, entry.manifest.num_tokens_raw) == (registered.root / "law", 23)
        registered.ok("remove", "civil/law")
        library.refresh()
        assert library.ids() == []


def test_a_relative_directory_is_registered_as_what_it_is(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = registered.saved("law")
    monkeypatch.chdir(registered.root)
    assert registered.ok("add", "law")["location"] == law


def test_adding_again(registered: Registered) -> None:
    law = registered.saved("law")
    registered.ok("add", law)
    assert registered.ok("add", law, "--label", "x=y")["labels"] == {"x": "y"}
    other = registered.saved("taxes")
    error = registered.refused(5, "already_exists", "add", other, "--id", "law")
    assert "--replace" in error["hint"]
    assert registered.ok("add", other, "--id", "law", "--replace")["location"] == other
    assert registered("list", "-q").lines == ["law"]


def test_a_missing_one_is_told(registered: Registered) -> None:
    law = registered.saved("law")
    registered.ok("add", law)
    shutil.rmtree(law)
    assert registered.ok("list")["cartridges"][0]["missing"]
    assert f"{law} (missing)" in registered("list").out


def test_one_in_the_repository(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(registered.root / "cache"))
    law = registered.saved("law")
    registered.kvist.ok("cartridge", "commit", law)
    made = registered.ok("add", "--rev", "cartridge/law")
    source = json.loads(made["location"])
    assert source["store"] == registered.kvist.url
    assert source["rev"].startswith("sha256:")
    with Library(registry=Registry(registered.path), cache_dir=registered.root / "other") as library:
        assert library.get("law").manifest.identity == made["identity"]


def test_one_on_the_hub_is_registered_by_its_commit(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch may move, and then no other host would find what was registered."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = make_cartridge(cartridge_id="law").save_pretrained(registered.root / "snapshots" / commit)
    asked: list[tuple[object, str | None]] = []

    def resolve(name: str | Path, *, revision: str | None = None, **options: Any) -> Path:
        if name == "org/law":
            asked.append((name, revision))
        return Path(snapshot)

    monkeypatch.setattr(hub, "resolve", resolve)
    for revision in ([], ["--revision", "main"]):
        made = registered.ok("add", "org/law", *revision)
        assert json.loads(made["location"]) == {"hub": "org/law", "revision": commit}
    assert asked == [("org/law", None), ("org/law", "main")]


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["add"], 2, "usage"),
        (["add", "DIR", "--rev", "main"], 2, "usage"),
        (["add", "--rev", "main", "--revision", "x"], 2, "usage"),
        (["add", "DIR", "--label", "x"], 2, "usage"),
        (["add", "DIR", "--label", "=x"], 2, "usage"),
        (["add", "DIR", "--revision", "main"], 2, "usage"),
        (["list", "--label", "=x"], 2, "usage"),
        (["add", "DIR", "--id", "../x"], 20, "invalid_cartridge"),
        (["add", "DIR/none"], 4, "not_found"),
        (["add", "DIR/.."], 20, "invalid_cartridge"),
        (["add", "--rev", "none"], 4, "not_found"),
        (["remove"], 2, "usage"),
        (["remove", "none"], 4, "unknown_cartridge"),
        (["remove", "kept", "none"], 4, "unknown_cartridge"),
    ],
)
def test_refused(registered: Registered, words: list[str], code: int, kind: str) -> None:
    registered.ok("add", registered.saved("kept"))
    law = registered.saved("law")
    registered.refused(code, kind, *[word.replace("DIR", law) for word in words])


def test_damaged_headers_are_not_registered(registered: Registered) -> None:
    law = Path(registered.saved("law"))
    (shard,) = law.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    registered.refused(20, "damaged_cartridge", "add", str(law))


def test_damaged_bytes_are_not_registered(registered: Registered) -> None:
    """They might be those of another cartridge, whose name they would have."""
    law = Path(registered.saved("law"))
    (shard,) = law.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    registered.refused(20, "damaged_cartridge", "add", str(law))
    assert registered.ok("add", str(law), "--no-verify")["id"] == "law"


def test_one_that_cannot_be_read_can_be_taken_out(registered: Registered, caplog: pytest.LogCaptureFixture) -> None:
    registered.ok("add", registered.saved("law"))
    with Registry(registered.path) as registry, registry._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE kvist_cartridges SET manifest = '{}'")
    other = registered.saved("taxes")
    registered.ok("add", other)
    listed = registered.ok("list")
    assert ([one["id"] for one in listed["cartridges"]], listed["unreadable"]) == (["taxes"], ["law"])
    assert registered("list", "-q").lines == ["taxes"]
    assert "kvist cartridge remove law" in caplog.text
    registered.ok("remove", "taxes")
    registered.ok("remove", "law")
    assert registered.ok("list")["cartridges"] == []


def test_one_is_taken_out_once(registered: Registered) -> None:
    registered.ok("add", registered.saved("law"))
    assert registered.ok("remove", "law", "law")["removed"] == ["law"]


def test_registries_that_cannot_be(registered: Registered, tmp_path: Path) -> None:
    assert registered("list", "--registry", "mysql://x/y", "--json").error["kind"] == "invalid_input"
    (tmp_path / "odd.db").write_bytes(b"odd" * 1000)
    ran = registered("list", "--registry", str(tmp_path / "odd.db"), "--json")
    assert (ran.code, ran.error["kind"]) == (30, "store")


def test_where_the_registry_is_by_default(kvist: Kvist, tmp_path: Path) -> None:
    ran = kvist("cartridge", "list", "--json", env={"XDG_DATA_HOME": str(tmp_path), "KVIST_REGISTRY": None})
    assert ran.json["registry"] == f"sqlite:///{tmp_path}/kvist/cartridges.db"
