"""Directories of configured cartridges: as they are, or made once in a cache, by whichever process comes first."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.cartridge import sources
from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.formats import importing
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.snapshots import to_repository
from kvist.cartridge.sources import materialize
from kvist.errors import InvalidCartridge, InvalidInput, LayoutMismatch, NotFound, RepositoryNotFound, StoreError
from kvist.repo import Repository

from .checkpoints import hazy, knlp, peft, sample, sidecar
from .making import MODEL, make_cartridge


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "cartridges"


def open_at(directory: Path) -> Cartridge:
    """Read whole, and checked."""
    return Cartridge.from_pretrained(directory)


def test_a_directory_is_itself(tmp_path: Path, cache: Path) -> None:
    make_cartridge().save_pretrained(tmp_path / "one")
    for source in (tmp_path / "one", str(tmp_path / "one"), {"path": str(tmp_path / "one")}):
        assert materialize(source, cache_dir=cache, model=MODEL) == tmp_path / "one"
    assert not cache.exists()


def test_a_checkpoint_is_converted_once(tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample())
    first = materialize(path, cache_dir=cache, model=MODEL)
    times = {one: one.stat().st_mtime_ns for one in first.iterdir()}
    assert materialize(str(path), cache_dir=cache, model=MODEL) == first
    assert {one: one.stat().st_mtime_ns for one in first.iterdir()} == times
    with open_at(first) as made:
        assert torch.equal(made.layer(2)[1], sample()[2][1])
        assert made.manifest.cartridge_id == "cache-step100"
        assert made.manifest.model == MODEL


def test_what_decides_the_content_decides_the_place(tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample())
    other = ModelIdentity(model_id="org/tiny", num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16")
    places = [materialize(path, cache_dir=cache, model=model) for model in (MODEL, other)]
    places.append(materialize({"path": str(path), "cartridge_id": "a"}, cache_dir=cache, model=MODEL))
    hazy(tmp_path, sample(seed=1))
    places.append(materialize(path, cache_dir=cache, model=MODEL))
    path.with_name(path.name + ".json").write_text(json.dumps(sidecar(path, sample())))
    places.append(materialize(path, cache_dir=cache, model=MODEL))
    assert len(set(places)) == 5
    shutil.copy(path, tmp_path / "same.pt")
    made = [open_at(materialize(one, cache_dir=cache, model=MODEL)) for one in (path, tmp_path / "same.pt")]
    ids = [one.manifest.cartridge_id for one in made]
    assert ids == ["patient_04", "same"]


def test_a_manifest_elsewhere(tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample())
    (tmp_path / "elsewhere.json").write_text(json.dumps(sidecar(path, sample())))
    source = {"path": str(path), "manifest_path": str(tmp_path / "elsewhere.json")}
    assert open_at(materialize(source, cache_dir=cache, model=MODEL)).manifest.labels == {"doc_type": "medical_record"}
    with pytest.raises(NotFound, match=r"no\.json"):
        materialize(source | {"manifest_path": str(tmp_path / "no.json")}, cache_dir=cache, model=MODEL)


def test_a_configured_id_must_be_the_manifests(tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample())
    path.with_name(path.name + ".json").write_text(json.dumps(sidecar(path, sample())))
    with pytest.raises(InvalidCartridge, match="patient_04"):
        materialize({"path": str(path), "cartridge_id": "other"}, cache_dir=cache, model=MODEL)
    assert list(cache.glob("*/")) == []


@pytest.mark.parametrize(("name", "expected"), [("one two.pt", "one-two"), ("..pt.pt", "pt"), ("-.pt", "cartridge")])
def test_an_id_from_a_name(name: str, expected: str, tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample()).rename(tmp_path / name)
    assert open_at(materialize(path, cache_dir=cache, model=MODEL)).manifest.cartridge_id == expected


def test_directories_of_other_projects(tmp_path: Path, cache: Path) -> None:
    for name, writer in (("doc-a", knlp), ("doc-b", peft)):
        (tmp_path / name).mkdir()
        made = open_at(materialize(writer(tmp_path / name, sample()), cache_dir=cache, model=MODEL))
        assert made.manifest.cartridge_id == name


def test_a_checkpoint_without_a_model_is_told_of(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = hazy(tmp_path, sample())
    with caplog.at_level(logging.WARNING, "kvist.cartridge"):
        for _ in range(2):
            materialize(path, cache_dir=cache, model=MODEL)
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "org/tiny" in caplog.text
        caplog.clear()
        (tmp_path / "peft").mkdir()
        materialize(peft(tmp_path / "peft", sample()), cache_dir=cache, model=MODEL)
        assert caplog.records == []


def test_a_checkpoint_of_another_model_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    other = ModelIdentity(model_id="m", num_layers=3, num_kv_heads=1, head_dim=16, dtype="bfloat16")
    with pytest.raises(LayoutMismatch):
        materialize(hazy(tmp_path, sample()), cache_dir=cache, model=other)
    assert [one.suffix for one in cache.iterdir()] == [".lock"]


def test_what_is_damaged_in_the_cache_is_made_anew(tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample())
    made = materialize(path, cache_dir=cache, model=MODEL)
    shard = next(made.glob("*.safetensors"))
    for hurt in (lambda: os.truncate(shard, 100), shard.unlink, (made / "cartridge.json").unlink):
        hurt()
        open_at(materialize(path, cache_dir=cache, model=MODEL)).close()


def _convert(path: Path, cache: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(str(materialize(path, cache_dir=cache, model=MODEL)))


def test_processes_agree(tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample(400))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_convert, args=(path, cache, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    places = {results.get() for _ in workers}
    for worker in workers:
        worker.join()
    assert len(places) == 1
    assert len([one for one in cache.iterdir() if one.is_dir()]) == 1
    open_at(Path(places.pop())).close()


def test_threads_convert_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hazy(tmp_path, sample())
    calls: list[int] = []
    original = importing.import_checkpoint
    monkeypatch.setattr(importing, "import_checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(materialize(path, cache_dir=cache, model=MODEL))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), len(found), len(set(found))) == (1, 8, 1)


@pytest.mark.parametrize("changed", ["cartridge.pt", "meta.json", "prefix_token_ids.json", "cartridge.pt.json"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_is_replaced_while_it_is_converted_is_not_kept(
    changed: str, when: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the old file, once it is back, would be served as what the new one holds."""
    (tmp_path / "new").mkdir()
    for directory, seed in ((tmp_path, 1), (tmp_path / "new", 2)):
        knlp(directory, sample(seed=seed), note=seed)
        said = sidecar(directory / "cartridge.pt", sample(), has_frozen_prefix=False, num_frozen_tokens=0, checksum="")
        said |= {"file_size_bytes": 0, "training_steps": 0, "source_document": str(seed)}
        (directory / "cartridge.pt.json").write_text(json.dumps(said))
    (tmp_path / "new" / "prefix_token_ids.json").write_text(json.dumps(list(range(200, 232))))
    path, old = tmp_path / "cartridge.pt", {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()}
    (tmp_path / "meta.json").write_text("{}")
    old["meta.json"] = b"{}"
    original = importing.import_checkpoint

    def swapped(*words: Any, **said: Any) -> Cartridge:
        new = (tmp_path / "new" / changed).read_bytes()
        if when == "before":
            (tmp_path / changed).write_bytes(new)
        made = original(*words, **said)
        (tmp_path / changed).write_bytes(new)
        return made

    monkeypatch.setattr(importing, "import_checkpoint", swapped)
    if (changed, when) != ("cartridge.pt", "after"):  # read whole, and the same as its name says: that may stay
        with pytest.raises(InvalidCartridge, match="changed"):
            materialize(path, cache_dir=cache, model=MODEL)
        assert not [one for one in cache.iterdir() if one.is_dir()]
    else:
        materialize(path, cache_dir=cache, model=MODEL)
    monkeypatch.undo()
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    with open_at(materialize(path, cache_dir=cache, model=MODEL)) as made:
        assert torch.equal(made.layer(0)[0], sample(seed=1)[0][0])
        assert (made.token_ids, made.manifest.source_document) == (tuple(range(100, 132)), "1")


def test_a_lock_empties_no_file(tmp_path: Path, cache: Path) -> None:
    """Others may write into the cache, too."""
    path = hazy(tmp_path, sample())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    made = materialize(path, cache_dir=cache, model=MODEL)
    shutil.rmtree(cache)
    cache.mkdir()
    (cache / f"{made.name}.lock").symlink_to(victim)
    materialize(path, cache_dir=cache, model=MODEL)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["manifest_path", "cache-step100.pt.json", "cache-step100.pt"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path, cache: Path) -> None:
    path = hazy(tmp_path, sample())
    source = {"path": str(path)}
    if name == "manifest_path":
        source[name] = str(tmp_path / name)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name.endswith(".json"):  # which is none, so there is none
        materialize(source, cache_dir=cache, model=MODEL)
        return
    with pytest.raises(InvalidCartridge, match="file"):
        materialize(source, cache_dir=cache, model=MODEL)


# -- repositories and the hub ------------------------------------------------------------------------------------


def test_a_snapshot(tmp_path: Path, cache: Path) -> None:
    cartridge = make_cartridge(32)
    url = (tmp_path / "store").as_uri()
    with Repository.init(url) as repo:
        snapshot = to_repository(cartridge, repo, name="doc")
    source = {"store": url, "rev": "cartridge/doc"}
    made = materialize(source, cache_dir=cache, model=MODEL)
    assert open_at(made).identity == cartridge.identity
    assert materialize(source | {"rev": snapshot.cid}, cache_dir=cache, model=MODEL) == made
    with Repository.open(url) as repo:
        to_repository(make_cartridge(32, seed=1), repo, name="doc")
    moved = materialize(source, cache_dir=cache, model=MODEL)
    assert moved != made, "the branch has moved"
    with pytest.raises(NotFound):
        materialize(source | {"rev": "cartridge/other"}, cache_dir=cache, model=MODEL)
    with pytest.raises(RepositoryNotFound):
        materialize(source | {"store": (tmp_path / "no").as_uri()}, cache_dir=cache, model=MODEL)


def test_a_repository_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    """What is downloaded, and how, is the hub's test."""
    asked: list[Any] = []

    def resolve(name: str, **options: Any) -> Path:
        asked.append((name, options))
        return tmp_path

    monkeypatch.setattr(sources, "resolve", resolve)
    assert materialize({"hub": "org/name", "revision": "v1"}, cache_dir=cache, model=MODEL) == tmp_path
    assert asked == [("org/name", {"revision": "v1", "subfolder": None})]


# -- what is no source -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"path": "a", "store": "b"},
        {"path": "a", "rev": "b"},
        {"path": 5},
        {"path": ""},
        {"path": "a\0b"},
        {"store": "file:///a"},
        {"hub": "org/name", "token": "secret"},
        {5: "a"},
    ],
)
def test_sources_that_are_none(source: Mapping[str, Any], cache: Path) -> None:
    with pytest.raises(InvalidInput):
        materialize(source, cache_dir=cache, model=MODEL)


def test_nothing_there(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "no.pt", tmp_path / "empty"):
        with pytest.raises(NotFound):
            materialize(path, cache_dir=cache, model=MODEL)
    assert not cache.exists()


def test_a_cache_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cache"):
        materialize(hazy(tmp_path, sample()), cache_dir=tmp_path / "file", model=MODEL)
