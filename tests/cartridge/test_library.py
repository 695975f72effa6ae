"""The library: configured cartridges and registered ones, which come and go while it is used."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvist.cartridge.library import Entry, Library, open_source
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.registry import Registry
from kvist.errors import (
    CartridgeNotReady,
    DamagedCartridge,
    InvalidInput,
    LayoutMismatch,
    NotFound,
    StoreError,
    UnknownCartridge,
)
from kvist.repo import Repository

from .databases import postgres_server, registry, url
from .making import MODEL, make_cartridge

__all__ = ["postgres_server", "registry", "url"]


def save(tmp_path: Path, name: str, **said: Any) -> tuple[Path, CartridgeManifest]:
    made = make_cartridge(tokens=20 + len(name), cartridge_id=name, **said)
    return made.save_pretrained(tmp_path / name), made.manifest


def entry(tmp_path: Path, name: str, **said: Any) -> Entry:
    return Entry(name, *save(tmp_path, name, **said))


def add(registry: Registry, tmp_path: Path, name: str, **said: Any) -> CartridgeManifest:
    directory, manifest = save(tmp_path, name, **said)
    registry.register(manifest, str(directory))
    return manifest


def test_configured_ones(tmp_path: Path) -> None:
    law, tax = entry(tmp_path, "law", labels={"area": "law"}), entry(tmp_path, "taxes")
    library = Library([law, tax], model=MODEL)
    assert (library.ids(), library.default_id, library.configured_ids) == (["law", "taxes"], "law", {"law", "taxes"})
    assert library.get("law") is law
    assert library.by_identity(tax.manifest.identity) is tax
    assert library.by_identity("0" * 64) is None
    assert library.ids_by_label("area", "law") == ["law"]
    assert not library.refresh()
    with pytest.raises(UnknownCartridge, match="'x'; there are: law, taxes") as unknown:
        library.get("x")
    assert unknown.value.hint is None


def test_configured_ones_that_cannot_be(tmp_path: Path) -> None:
    law = entry(tmp_path, "law")
    with pytest.raises(InvalidInput, match="law twice"):
        Library([law, law])
    with pytest.raises(LayoutMismatch, match="head_dim"):
        Library([law], model=dataclasses.replace(MODEL, head_dim=16))
    assert Library([law]).ids() == ["law"]
    assert (Library().ids(), Library().default_id) == ([], None)


def test_registered_ones_come_and_go(tmp_path: Path, url: str, registry: Registry) -> None:
    law = add(registry, tmp_path, "law", labels={"area": "law"})
    with Library([entry(tmp_path, "configured")], registry=Registry(url), model=MODEL) as library:
        assert (library.ids(), library.default_id) == (["configured", "law"], "configured")
        found = library.get("law")
        assert found == Entry("law", tmp_path / "law", law)
        assert library.get("law") is library.by_identity(law.identity) is found
        assert not library.refresh()

        taxes = add(registry, tmp_path, "taxes", labels={"area": "law"})
        assert library.get("taxes").manifest == taxes  # without a refresh
        assert library.ids_by_label("area", "law") == ["law", "taxes"]
        assert library.get("law") is found  # not opened again

        registry.unregister("law")
        assert library.refresh()
        assert library.ids() == ["configured", "taxes"]
        assert library.by_identity(law.identity) is None
        with pytest.raises(UnknownCartridge, match="configured, taxes") as unknown:
            library.get("law")
        assert "kvist cartridge add" in str(unknown.value.hint)
        assert found.directory.is_dir()


def soon(ask: Callable[[], Any]) -> Any:
    """What ``ask`` comes to when the library's threads have done their work."""
    while True:
        try:
            if (found := ask()) is not None:
                return found
        except CartridgeNotReady:
            pass
        time.sleep(0.005)


def test_who_does_not_wait_is_told_to_come_again(
    tmp_path: Path, url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = entry(tmp_path, "own")
    with Library([own], registry=Registry(url), model=MODEL) as library:
        assert library.ready("own") is own
        assert library.ids_by_label("area", "law") == []
        law = add(registry, tmp_path, "law", labels={"area": "law"})
        assert soon(lambda: library.ids_by_label("area", "law") or None) == ["law"]
        may_open = threading.Event()

        def slow(*args: Any, **said: Any) -> Any:
            may_open.wait()
            return open_source(*args, **said)

        monkeypatch.setattr("kvist.cartridge.library.open_source", slow)
        for _ in range(3):
            with pytest.raises(CartridgeNotReady, match="law is being fetched"):
                library.ready("law")
        assert library.ready("own") is own
        assert library.known() == [("own", own.manifest, None), ("law", law, None)]
        may_open.set()
        assert soon(lambda: library.ready("law")) is library.get("law")
        with pytest.raises(CartridgeNotReady, match="is being asked"):
            library.ready("later")
        with pytest.raises(UnknownCartridge, match="there are: own, law"):
            soon(lambda: library.ready("nobody"))
        later = add(registry, tmp_path, "later")
        assert soon(lambda: _found(library, "later")).manifest == later
        with pytest.raises(UnknownCartridge):
            Library([own]).ready("law")


def _found(library: Library, name: str) -> Entry | None:
    try:
        return library.ready(name)
    except UnknownCartridge:
        return None


def test_who_does_not_wait_is_told_why_it_cannot_be_opened(tmp_path: Path, url: str, registry: Registry) -> None:
    add(registry, tmp_path, "law")
    shutil.rmtree(tmp_path / "law")
    with Library(registry=Registry(url)) as library:
        for _ in range(2):
            with pytest.raises(NotFound, match="law"):
                soon(lambda: library.ready("law"))
        with pytest.raises(NotFound):
            library.get("law")
        ((name, _, error),) = library.known()
        assert (name, type(error)) == ("law", NotFound)
        save(tmp_path, "law")
        library.get("law")
        assert library.known()[0][2] is None


def test_nobody_waits_twice_for_a_registry_that_does_not_answer(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One asks; those who came meanwhile, or come in the seconds after, do not."""
    add(registry, tmp_path, "law")
    library, asked, may_fail, now = Library(registry=registry), threading.Semaphore(0), threading.Event(), [100.0]
    monkeypatch.setattr("kvist.cartridge.library.time", SimpleNamespace(monotonic=lambda: now[0]))
    calls: list[int] = []

    def hangs() -> int:
        calls.append(1)
        asked.release()
        may_fail.wait()
        raise StoreError("no route to the database")

    version = registry.version
    monkeypatch.setattr(registry, "version", hangs)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(library.refresh) for _ in range(8)]
        asked.acquire()
        library.nudge()
        assert library.get("law").cartridge_id == "law", "while it hangs"
        may_fail.set()
        assert not any(one.result() for one in waiting)
    assert not library.refresh()
    assert len(calls) == 1
    monkeypatch.setattr(registry, "version", version)
    add(registry, tmp_path, "taxes")
    assert not library.refresh(), "it is not asked yet"
    now[0] += 5.1
    assert library.refresh() or library.ids() == ["law", "taxes"]  # the other thread may have been first
    assert library.get("taxes").cartridge_id == "taxes"
    library.close()


def test_what_is_registered_again_is_opened_again(tmp_path: Path, url: str, registry: Registry) -> None:
    add(registry, tmp_path, "law")
    with Library(registry=Registry(url), model=MODEL) as library:
        before = library.get("law")
        made = make_cartridge(tokens=50, cartridge_id="law")
        registry.register(made.manifest, str(made.save_pretrained(tmp_path / "law2")))
        assert library.get("law") is before
        assert library.refresh()
        after = library.get("law")
        assert (after.directory, after.manifest.num_tokens_raw) == (tmp_path / "law2", 50)


def test_a_configured_one_hides_a_registered_one(tmp_path: Path, url: str, registry: Registry) -> None:
    own = entry(tmp_path, "law", labels={"area": "own"})
    other = make_cartridge(tokens=50, cartridge_id="law", labels={"area": "other"})
    registry.register(other.manifest, str(other.save_pretrained(tmp_path / "other")))
    with Library([own], registry=Registry(url)) as library:
        assert library.ids() == ["law"]
        assert library.get("law") is own
        assert library.by_identity(other.manifest.identity) is None
        assert library.ids_by_label("area", "other") == []


def test_registered_ones_of_other_models_are_passed_over(tmp_path: Path, url: str, registry: Registry) -> None:
    other = dataclasses.replace(MODEL, model_id="org/other", num_layers=2)
    add(registry, tmp_path, "theirs", model=other, labels={"area": "law"})
    add(registry, tmp_path, "ours", labels={"area": "law"})
    with Library(registry=Registry(url), model=MODEL) as library:
        assert library.ids() == library.ids_by_label("area", "law") == ["ours"]
        with pytest.raises(LayoutMismatch, match=r"org/other.*num_layers: the cartridge has 2, the model 3"):
            library.get("theirs")
    with Library(registry=Registry(url)) as library:
        assert library.ids() == ["theirs", "ours"]


def test_what_is_not_what_was_registered_is_not_used(tmp_path: Path, url: str, registry: Registry) -> None:
    add(registry, tmp_path, "law")
    shutil.rmtree(tmp_path / "law")
    make_cartridge(tokens=50, cartridge_id="law").save_pretrained(tmp_path / "law")
    add(registry, tmp_path, "taxes")
    shutil.rmtree(tmp_path / "taxes")
    with Library(registry=Registry(url)) as library:
        for _ in range(2):
            with pytest.raises(DamagedCartridge, match="was registered") as damaged:
                library.get("law")
            with pytest.raises(NotFound, match="taxes"):
                library.get("taxes")
        assert damaged.value.hint == f"if that is meant: kvist cartridge add {tmp_path / 'law'}"
        save(tmp_path, "taxes")
        assert library.get("taxes").cartridge_id == "taxes"


def test_one_in_a_repository_is_written_out_once(tmp_path: Path, url: str, registry: Registry) -> None:
    from kvist.cartridge.snapshots import to_repository

    made = make_cartridge(tokens=32, cartridge_id="law")
    store = (tmp_path / "store").as_uri() + "?durable=0"
    with Repository.init(store) as repo:
        to_repository(made, repo, name="law")
    source = {"store": store, "rev": "cartridge/law"}
    registry.register(made.manifest, json.dumps(source))
    with Library(registry=Registry(url), cache_dir=tmp_path / "cache") as library:
        with ThreadPoolExecutor(4) as pool:
            found = {id(one) for one in pool.map(library.get, ["law"] * 8)}
        assert len(found) == 1
        assert library.get("law").directory.parent == tmp_path / "cache"


def test_a_registry_that_cannot_be_read_changes_nothing(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    add(registry, tmp_path, "law")
    library = Library(registry=registry)
    registry.close()
    with caplog.at_level(logging.WARNING, "kvist.cartridge"):
        for _ in range(3):
            assert not library.refresh()
        assert library.get("law").cartridge_id == "law"
        with pytest.raises(UnknownCartridge):
            library.get("taxes")
    assert len(caplog.records) == 1
    with pytest.raises(StoreError):
        Library(registry=registry)


def test_a_row_of_a_later_version_freezes_nothing(
    tmp_path: Path, url: str, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """It is passed over: what was removed is gone, what was added is there, and new servers start."""
    add(registry, tmp_path, "gone")
    add(registry, tmp_path, "stays")
    with Library(registry=Registry(url), model=MODEL) as library:
        add(registry, tmp_path, "later")
        with registry._engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE kvist_cartridges SET manifest = replace(manifest, '_version\": 1', '_version\": 2') "
                "WHERE cartridge_id = 'later'"
            )
        registry.unregister("gone")
        add(registry, tmp_path, "new")
        with caplog.at_level(logging.WARNING, "kvist.cartridge"):
            assert library.refresh()
            assert not library.refresh()
        assert library.ids() == ["stays", "new"]
        assert library.get("new").cartridge_id == "new"
        for name in ("gone", "later"):
            with pytest.raises(UnknownCartridge):
                library.get(name)
        assert len(caplog.records) == 1 and "later" in caplog.text
        with Library(registry=Registry(url), model=MODEL) as another:
            assert another.ids() == ["stays", "new"]


def test_threads_look_up_while_cartridges_come_and_go(tmp_path: Path, url: str, registry: Registry) -> None:
    add(registry, tmp_path, "stays")
    comes = save(tmp_path, "comes")
    with Library(registry=Registry(url), model=MODEL) as library:

        def look(_: int) -> int:
            seen = 0
            for _turn in range(40):
                library.refresh()
                assert library.get("stays").cartridge_id == "stays"
                try:
                    seen += library.get("comes").directory == comes[0]
                except UnknownCartridge:
                    continue
            return seen

        with ThreadPoolExecutor(4) as pool:
            looking = [pool.submit(look, number) for number in range(4)]
            for _ in range(10):
                registry.register(comes[1], str(comes[0]))
                registry.unregister("comes")
            for one in looking:
                one.result()
        library.refresh()
        assert library.ids() == ["stays"]
