"""The registry, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import json
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sql
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.cartridge import database
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.registry import SCHEMA, Registry
from kvist.errors import AlreadyExists, InvalidCartridge, InvalidInput, StoreError

from .databases import manifest, postgres_server, registry, url

__all__ = ["postgres_server", "registry", "url"]


def ids(found: list[object]) -> list[str]:
    return [one.cartridge_id for one in found]


def fill(registry: Registry) -> None:
    registry.register(manifest("law", labels={"area": "law", "tier": "1"}), "/c/law")
    registry.register(manifest("tax", labels={"area": "tax"}, model_id="org/other"), "/c/tax")
    registry.register(manifest("civil", labels={"area": "law"}), "/c/civil")


# -- what is kept ------------------------------------------------------------------------------------------------


def test_what_was_registered_is_found_as_it_was(registry: Registry) -> None:
    told = manifest("org/law+2@x", labels={"area": "law"}, provenance={"text": 'ä\u2028"{}\n'}, training_steps=7)
    before = datetime.now(UTC) - timedelta(seconds=1)
    made = registry.register(told, "/c/law")
    found = registry.lookup("org/law+2@x")
    assert found == made
    assert (found.manifest, found.manifest.identity) == (told, told.identity)
    assert (found.cartridge_id, found.location, found.size) == ("org/law+2@x", "/c/law", 1280)
    assert before < found.registered_at < datetime.now(UTC) + timedelta(seconds=1)


def test_what_was_not_is_not(registry: Registry) -> None:
    assert registry.lookup("a") is None
    assert (registry.list_all(), registry.count()) == ([], 0)


def test_count_and_list(registry: Registry) -> None:
    for number in range(5):
        registry.register(manifest(f"c{number}"), f"/c/{number}")
        assert registry.count() == number + 1
    assert ids(registry.list_all()) == ["c0", "c1", "c2", "c3", "c4"]


def test_by_label(registry: Registry) -> None:
    fill(registry)
    assert ids(registry.lookup_by_label("area", "law")) == ["law", "civil"]
    assert registry.ids_by_label("area", "law") == ["law", "civil"]
    assert ids(registry.lookup_by_label("tier", "1")) == ["law"]
    for nothing in (("area", "x"), ("absent", "law"), ("law", "area"), ("area", "LAW"), ("", "")):
        assert registry.lookup_by_label(*nothing) == registry.ids_by_label(*nothing) == []


def test_by_model(registry: Registry) -> None:
    fill(registry)
    assert ids(registry.lookup_by_model("org/tiny")) == ["law", "civil"]
    assert ids(registry.lookup_by_model("org/other")) == ["tax"]
    assert registry.lookup_by_model("tiny") == []


def test_unregister(registry: Registry) -> None:
    fill(registry)
    assert registry.unregister("law")
    assert not registry.unregister("law")
    assert not registry.unregister("never")
    assert ids(registry.list_all()) == ["tax", "civil"]
    assert ids(registry.lookup_by_label("area", "law")) == ["civil"]
    registry.register(manifest("law"), "/c/law")
    assert registry.lookup_by_label("tier", "1") == []


def test_registering_again_replaces_all_but_the_place(registry: Registry) -> None:
    fill(registry)
    registry.register(manifest("law", labels={"area": "tax"}, content="new"), "/c/law2")
    assert registry.count() == 3
    found = registry.lookup("law")
    assert (found.location, found.manifest.labels) == ("/c/law2", {"area": "tax"})
    assert ids(registry.list_all()) == ["law", "tax", "civil"]
    assert ids(registry.lookup_by_label("area", "tax")) == ["law", "tax"]
    assert ids(registry.lookup_by_label("area", "law")) == ["civil"]


def test_what_left_and_came_again_is_last(registry: Registry) -> None:
    fill(registry)
    registry.unregister("law")
    registry.register(manifest("law"), "/c/law")
    assert ids(registry.list_all()) == ["tax", "civil", "law"]


def test_replacing_can_be_refused(registry: Registry) -> None:
    fill(registry)
    version = registry.version()
    with pytest.raises(AlreadyExists, match=r"law is registered, at /c/law") as refused:
        registry.register(manifest("law"), "/c/law2", replace=False)
    assert refused.value.hint == "to take it out: kvist cartridge remove law"
    assert (registry.lookup("law").location, registry.version()) == ("/c/law", version)
    registry.register(manifest("new"), "/c/new", replace=False)


@pytest.mark.parametrize(
    "location",
    ["c/law", "", "~/law", "{", "[1]", "{]", "/c\0", "/c\ud800", "/" + "c" * 70000, '{"a":' * 9999 + "1" + "}" * 9999],
    ids=range(10),
)
def test_a_location_means_the_same_to_every_process(registry: Registry, location: str) -> None:
    with pytest.raises(InvalidInput, match="location"):
        registry.register(manifest(), location)
    assert (registry.count(), registry.version()) == (0, 0)


def test_a_manifest_of_another_project_is_refused(registry: Registry) -> None:
    told = manifest().to_dict() | {"created_by": "vllm"}
    with pytest.raises(InvalidCartridge):
        registry.register(CartridgeManifest.from_dict(told, lenient=True), "/c/a")
    assert registry.version() == 0


@pytest.mark.parametrize("field", ["model_id", "model_revision", "tokenizer_hash"])
@pytest.mark.parametrize("text", ["org/ti\u200bny", "a\n", "\x1b[31m"])
def test_what_no_model_is_called_is_no_manifest(field: str, text: str) -> None:
    """Else it would be registered, and nobody could open it."""
    with pytest.raises(InvalidCartridge, match=f"{field} must be printable"):
        CartridgeManifest.from_dict(manifest().to_dict() | {field: text})


def test_a_location_may_be_a_source(registry: Registry) -> None:
    source = json.dumps({"hub": "org/law", "revision": "main"})
    registry.register(manifest(), source)
    assert registry.lookup("a").location == source


# -- any text ----------------------------------------------------------------------------------------------------

ODD = ["a.b", "$.a", 'a"b', "a'b", "%", "_", "a' OR '1'='1", "[0]", "", " ", "\n", "ключ", "🗝", "\x01", "a" * 512]


def test_odd_keys_and_values_mean_themselves(registry: Registry) -> None:
    for number, odd in enumerate(ODD):
        registry.register(manifest(f"c{number}", labels={odd: odd, f"v{number}": odd}), "/c")
    for number, odd in enumerate(ODD):
        assert registry.ids_by_label(odd, odd) == [f"c{number}"], odd
        assert registry.ids_by_label(f"v{number}", odd) == [f"c{number}"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.dictionaries(st.text(max_size=40), st.text(max_size=40), max_size=4), st.text(max_size=40))
def test_any_labels(registry: Registry, labels: dict[str, str], other: str) -> None:
    registry.unregister("a")
    try:
        told = manifest(labels=labels)
    except InvalidCartridge:
        return  # no UTF-8
    if any("\0" in text for label in labels.items() for text in label):
        with pytest.raises(InvalidInput, match="label"):
            registry.register(told, "/c")
        assert registry.lookup("a") is None
        return
    registry.register(told, "/c")
    assert registry.lookup("a").manifest == told
    for key in {*labels, other}:
        for value in {*labels.values(), other}:
            assert registry.ids_by_label(key, value) == (["a"] if labels.get(key) == value else [])


@pytest.mark.parametrize("odd", ["\0", "a\0", "\ud800"])
def test_what_no_database_holds_is_not_there(registry: Registry, odd: str) -> None:
    fill(registry)
    assert registry.lookup(odd) is None
    assert not registry.unregister(odd)
    assert registry.lookup_by_label(odd, "law") == registry.lookup_by_label("area", odd) == []
    assert registry.ids_by_label(odd, "law") == registry.lookup_by_model(odd) == []


def test_labels_have_a_bound_and_cost_one_statement(registry: Registry) -> None:
    labels = {f"k{number}": "v" for number in range(65)}
    with pytest.raises(InvalidInput, match="at most 64, got 65"):
        registry.register(manifest(labels=labels), "/c")
    statements: list[str] = []
    sql.event.listen(registry._engine, "before_cursor_execute", lambda *said: statements.append(said[2]))
    labels.popitem()
    registry.register(manifest(labels=labels), "/c")
    assert sum("INSERT INTO kvist_labels" in one for one in statements) == 1
    assert registry.ids_by_label("k63", "v") == ["a"]


@pytest.mark.parametrize("labels", [{"k" * 513: "v"}, {"k": "v" * 2049}, {"é" * 257: "v"}])
def test_a_label_fits_every_index(registry: Registry, labels: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="bytes"):
        registry.register(manifest(labels=labels), "/c")
    registry.register(manifest(labels={"k" * 512: "v" * 2048}), "/c")


# -- versions, and other processes -------------------------------------------------------------------------------


def test_the_version_tells_every_change_and_nothing_else(registry: Registry, url: str) -> None:
    with Registry(url) as other:
        seen = [other.version()]
        acts: list[tuple[Callable[[], object], bool]] = [
            (lambda: registry.register(manifest("a"), "/c"), True),
            (lambda: registry.lookup("a"), False),
            (lambda: registry.unregister("b"), False),
            (lambda: registry.register(manifest("a"), "/d"), True),
            (lambda: registry.register(manifest("b"), "/d"), True),
            (lambda: registry.list_all(), False),
            (lambda: registry.unregister("a"), True),
        ]
        for act, changes in acts:
            act()
            assert (other.version() != seen[-1]) == changes
            seen.append(other.version())
        assert seen == sorted(seen)
        assert ids(other.list_all()) == ["b"]


CHILD = """
import sys
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.registry import Registry
with Registry(sys.argv[1]) as registry:
    print(registry.version(), flush=True)
    for line in sys.stdin:
        act, _, rest = line.strip().partition(" ")
        if act == "remove":
            registry.unregister(rest)
        elif act == "add":
            registry.register(CartridgeManifest.from_json(rest), "/c/child")
        print(registry.version(), *[one.cartridge_id for one in registry.list_all()], flush=True)
"""


def test_two_processes_see_each_others_changes(registry: Registry, url: str) -> None:
    child = [sys.executable, "-c", CHILD, url]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:

        def ask(line: str = "look") -> str:
            other.stdin.write(line + "\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        assert other.stdout.readline().strip() == "0"
        registry.register(manifest("a"), "/c")
        assert ask() == "1 a"
        assert ask("add " + json.dumps(manifest("b").to_dict())) == "2 a b"
        assert (registry.version(), ids(registry.list_all())) == (2, ["a", "b"])
        assert ask("remove a") == "3 b"
        assert (registry.version(), registry.lookup("a"), registry.lookup("b").location) == (3, None, "/c/child")
        other.stdin.close()
    assert other.returncode == 0


def test_many_writers_lose_nothing(url: str) -> None:
    def write(number: int) -> None:
        with Registry(url) as own:  # all make it at once
            for turn in range(5):
                own.register(manifest(f"c{number}.{turn}", labels={"writer": str(number)}), "/c")
                own.register(manifest("shared", content=f"{number}.{turn}"), "/c")
            own.unregister(f"c{number}.0")

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(write, number) for number in range(6)]:
            done.result()
    with Registry(url) as registry:
        assert (registry.count(), registry.version()) == (25, 66)
        assert [registry.ids_by_label("writer", str(number)) for number in range(6)] == [
            [f"c{number}.{turn}" for turn in range(1, 5)] for number in range(6)
        ]


def test_threads_share_one(registry: Registry) -> None:
    fill(registry)

    def read(number: int) -> None:
        for turn in range(5):
            assert registry.lookup("law").cartridge_id == "law"
            assert "tax" in ids(registry.list_all())
            registry.register(manifest(f"t{number}.{turn}"), "/c")

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(read, number) for number in range(8)]:
            done.result()
    assert registry.count() == 43


# -- failures ----------------------------------------------------------------------------------------------------


def test_it_stays_when_it_is_opened_again(url: str) -> None:
    for number in range(3):
        with Registry(url) as registry:
            assert registry.count() == number
            registry.register(manifest(f"c{number}"), "/c")


def test_closed(registry: Registry) -> None:
    fill(registry)
    for _ in range(2):
        registry.close()
    for act in (
        lambda: registry.lookup("law"),
        registry.list_all,
        registry.count,
        registry.version,
        lambda: registry.unregister("law"),
        lambda: registry.register(manifest(), "/c"),
    ):
        with pytest.raises(StoreError, match="closed"):
            act()


def test_one_of_another_version_is_not_touched(url: str) -> None:
    with Registry(url) as registry:
        name = registry.name
        fill(registry)
        engine = registry._engine
        with engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE kvist_registry SET schema = {SCHEMA + 1}")
    with pytest.raises(StoreError, match=f"version {SCHEMA + 1}, expected {SCHEMA}") as refused:
        Registry(url)
    assert name in str(refused.value)


def test_a_row_of_a_later_version_hides_no_other(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    fill(registry)
    with registry._engine.begin() as connection:
        later = "UPDATE kvist_cartridges SET manifest = replace(manifest, '_version\": 1', '_version\": 2')"
        assert connection.execute(sql.text(later + " WHERE cartridge_id = 'tax'")).rowcount
    with caplog.at_level(logging.WARNING, "kvist.cartridge"):
        for _ in range(3):
            assert ids(registry.list_all()) == ["law", "civil"]
        assert ids(registry.lookup_by_model("org/other")) == ids(registry.lookup_by_label("area", "tax")) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tax" in caplog.text and "kvist cartridge remove tax" in caplog.text
    with pytest.raises(InvalidCartridge, match="tax") as refused:
        registry.lookup("tax")
    assert refused.value.hint == "to take it out: kvist cartridge remove tax"
    assert registry.lookup("law") is not None
    assert registry.ids() == ["law", "tax", "civil"]
    assert registry.unregister("tax")
    assert ids(registry.list_all()) == ["law", "civil"]


def test_a_write_that_fails_changes_nothing(registry: Registry) -> None:
    fill(registry)
    with registry._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE kvist_labels")
    version = registry.version()
    with pytest.raises(StoreError, match="kvist_labels"):
        registry.register(manifest("law"), "/c/new")
    assert (registry.lookup("law").location, registry.version()) == ("/c/law", version)


@pytest.mark.parametrize("odd", ["mysql://h/d", "sqlite://", "sqlite:///:memory:", "://", "", "nonsense://x"])
def test_other_databases_are_refused(odd: str) -> None:
    with pytest.raises(InvalidInput, match="registry"):
        Registry(odd)


# -- SQLite ------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_made_and_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "new" / "registry.db"
    for told in (str(path), path, f"sqlite:///{path}"):
        with Registry(told) as registry:
            assert registry.name == f"sqlite:///{path}"
    assert path.is_file()


def test_a_file_that_was_deleted_is_empty_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with Registry(path) as registry:
        fill(registry)
    path.unlink()
    with Registry(path) as registry:
        assert (registry.count(), registry.version()) == (0, 0)


def test_it_is_a_database_that_readers_and_a_writer_share(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with Registry(path) as registry:
        fill(registry)
        raw = sqlite3.connect(path)
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        raw.execute("BEGIN IMMEDIATE")
        raw.execute("DELETE FROM kvist_labels")
        assert registry.ids_by_label("area", "law") == ["law", "civil"]  # while another writes
        raw.rollback()
        raw.close()


@pytest.mark.parametrize("content", [b"not a database, but of some length" * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="database"):
        Registry(path)
    assert path.read_bytes() == content


def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Registry(tmp_path / "file" / "registry.db")
    with pytest.raises(StoreError):
        Registry(tmp_path)


# -- PostgreSQL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_connections_that_were_cut_are_made_anew(registry: Registry) -> None:
    def cut() -> None:
        engine = sql.create_engine(registry._url)
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        engine.dispose()

    fill(registry)
    cut()
    assert registry.version() == 3
    cut()
    registry.register(manifest("new"), "/c/new")
    assert registry.count() == 4


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_urls_of_all_spellings(url: str) -> None:
    plain = url.replace("postgresql+psycopg://", "postgresql://")
    assert plain != url
    with Registry(plain) as registry:
        registry.register(manifest(), "/c")
    with Registry(url) as registry:
        assert registry.count() == 1


def test_a_server_that_is_not_there_is_told_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError) as refused:
        Registry(f"postgresql://me:secret@/d?host={tmp_path}")
    assert "secret" not in str(refused.value)
    assert "postgresql" in str(refused.value)


@pytest.mark.parametrize("secret", ["password", "sslpassword", "oauth_client_secret", "of_a_later_version"])
def test_a_password_of_whatever_name_is_not_shown(secret: str) -> None:
    url = database.parse(f"postgresql://me:hidden@db/d?host=/run/one&{secret}=hidden")
    assert url.query[secret] == "hidden"
    shown = database.shown(url)
    assert "hidden" not in shown
    assert "me:***@db/d" in shown and "one" in shown
