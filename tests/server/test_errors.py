"""The error map, each entry over real HTTP."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist import errors
from kvist.engines.hf import Engine
from kvist.layout import Layout
from kvist.pager.capture import capture
from kvist.pager.synthetic import SyntheticCachePager
from kvist.repo import Repository
from kvist.server.errors import STATUS, BodyTooLarge, status_of

from .conftest import Api, error_of, serving

PROMPT = list(range(20, 60))


def classes(root: type[errors.KvistError]) -> Iterator[type[errors.KvistError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


def test_every_error_has_a_status() -> None:
    found = {
        kind.__name__: status_of(kind("x")) for kind in classes(errors.KvistError) if kind.__module__ == errors.__name__
    }
    assert found == {
        "KvistError": 500, "InvalidInput": 400, "InvalidName": 400, "InvalidManifest": 422, "NotFound": 404,
        "RepositoryNotFound": 404, "AlreadyExists": 409, "Conflict": 409, "Locked": 409, "LayoutMismatch": 409,
        "IntegrityError": 500, "DamagedPage": 500, "MissingPage": 500, "DamagedObject": 500, "StoreError": 503,
        "StoreFull": 507, "EngineError": 503, "PoolExhausted": 503, "UnsupportedModel": 501,
        "InvalidCartridge": 422, "UnsafeCheckpoint": 422, "UnknownCartridge": 404, "DamagedCartridge": 500,
        "ResidencyFull": 503, "CartridgeTooLarge": 503, "CartridgeNotReady": 503,
        "PageNameMismatch": 409, "PrunedSnapshot": 404, "AccessDenied": 403, "Unauthorized": 401, "Forbidden": 403,
        "UntrustedSnapshot": 403,
    }  # fmt: skip
    assert STATUS[BodyTooLarge] == 413


@pytest.mark.parametrize(
    ("change", "there", "here"),
    [
        ({"model": "other"}, "'other'", "'tiny'"),
        ({"revision": "blake3:0"}, "'blake3:0'", "'blake3:"),
        ({"dtype": "bf16"}, "'bf16'", "'f32'"),
        ({"page_size_tokens": 32}, "32", "16"),
    ],
)
def test_snapshots_of_other_layouts(own: Api, change: dict[str, Any], there: str, here: str) -> None:
    layout: Layout = dataclasses.replace(own.engine.layout, **change)
    pager = SyntheticCachePager(layout)
    pager.populate(2, seed=1)
    capture(pager, own.repo, branch="foreign")
    before = own.engine.stats()
    for path, body in (
        ("/v1/processfork/checkout", {"cid": "foreign"}),
        ("/v1/completions", {"kv_transfer_params": {"snapshot": "foreign"}}),
    ):
        message = error_of(own.post(path, body), 409, "layout_mismatch")["message"]
        assert f"{next(iter(change))} {there} there, {here}" in message
    assert own.get("/v1/processfork/snapshots/foreign")["layout"][next(iter(change))] == next(iter(change.values()))
    assert own.engine.stats() == before


def test_sequences_without_token_ids(own: Api) -> None:
    pager = SyntheticCachePager(own.engine.layout)
    pager.populate(2, seed=1)
    capture(pager, own.repo, branch="bare")
    assert own.fork("checkout", cid="bare")["pages_loaded"] == 2
    message = error_of(own.post("/v1/completions", {"kv_transfer_params": {"snapshot": "bare"}}), 400, "invalid_input")
    assert "without token ids" in message["message"]


@pytest.fixture
def fresh(own: Api, model_dir: Path, tmp_path: Path) -> Iterator[Api]:
    """A second server over the repository of ``own``, which has read nothing of it yet; ``own`` took snapshot ``s``."""
    answer = own.complete(PROMPT, max_tokens=3)
    own.fork("snapshot", request_id=answer["id"], name="s")
    own.engine.drop(answer["id"])
    own.engine.clear_prefix_cache()
    with Repository.open(str(tmp_path / "store")) as repo, serving(own.engine, repo, model_dir) as api:
        yield api


def the_files(tmp_path: Path, folder: str) -> list[Path]:
    found = [path for path in (tmp_path / "store" / folder).rglob("*") if path.is_file() and path.name != ".lock"]
    assert found
    return found


def test_truncated_manifest(fresh: Api, tmp_path: Path) -> None:
    (path,) = the_files(tmp_path, "manifests")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-10])
    error_of(fresh.post("/v1/processfork/checkout", {"cid": "s"}), 500, "damaged_object")
    error_of(fresh.http.get("/v1/processfork/snapshots/s"), 500, "damaged_object")


def test_stored_nonsense(own: Api) -> None:
    from kvist.hashing import sha256_cid
    from kvist.repo.objects import snapshot_key

    data = b'{"kind":"nonsense"}'
    own.repo.store.put(snapshot_key(sha256_cid(data)), data)
    error_of(own.post("/v1/processfork/checkout", {"cid": sha256_cid(data)}), 422, "invalid_manifest")


def test_missing_segment(fresh: Api, tmp_path: Path) -> None:
    for path in the_files(tmp_path, "segments"):
        path.unlink()
    before = fresh.engine.stats()
    error_of(fresh.post("/v1/processfork/checkout", {"cid": "s"}), 500, "missing_page")
    error_of(fresh.post("/v1/completions", {"kv_transfer_params": {"snapshot": "s"}}), 500, "missing_page")
    assert fresh.engine.stats() == before


def test_damaged_page(fresh: Api, tmp_path: Path) -> None:
    for path in the_files(tmp_path, "segments"):
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[5] ^= 1
        path.write_bytes(data)
    before = fresh.engine.stats()
    error_of(fresh.post("/v1/processfork/checkout", {"cid": "s"}), 500, "damaged_page")
    assert fresh.engine.stats() == before


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a b", "-x", "a.lock", "", "x" * 201])
def test_names_that_are_none(own: Api, name: str, tmp_path: Path) -> None:
    for body in ({"name": name}, {"branch": name}, {"branch": name, "name": "fine"}):
        error_of(own.post("/v1/processfork/snapshot", body), 400, "invalid_name")
    cid = own.fork("snapshot")["cid"]
    error_of(own.post("/v1/processfork/fork", {"cid": cid, "name": name}), 400, "invalid_name")
    assert [ref.name for ref in own.repo.refs.all()] == ["main"]


def test_full_disk(own: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = own.complete(PROMPT, max_tokens=3, temperature=0)

    def full(*_: Any, **__: Any) -> Any:
        raise errors.StoreFull("no space left on device")

    for method in ("writer", "put_many", "put"):
        with monkeypatch.context() as patch:
            patch.setattr(own.repo.store, method, full)
            error_of(own.post("/v1/processfork/snapshot", {"request_id": answer["id"]}), 507, "store_full")
    assert own.get("/v1/processfork/snapshots")["total"] == 0
    assert own.tokens(PROMPT, max_tokens=3, temperature=0) == answer["choices"][0]["token_ids"]
    assert own.fork("snapshot", request_id=answer["id"])["pages"] == 3


def test_failures_below(own: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(own.repo.store, "get", failing(errors.StoreError("the disk is gone")))
        error_of(own.http.get("/v1/processfork/snapshots/" + "0" * 64), 404, "not_found")
        patch.setattr(own.repo.store, "head", failing(errors.StoreError("the disk is gone")))
        error_of(own.http.get("/v1/processfork/snapshots/" + "0" * 64), 503, "store")
    with monkeypatch.context() as patch:
        patch.setattr(own.engine, "submit", failing(errors.UnsupportedModel("a strange model")))
        error_of(own.post("/v1/completions", {"prompt": "a"}), 501, "unsupported_model")
        patch.setattr(own.engine, "submit", failing(errors.EngineError("the engine is closed")))
        error_of(own.post("/v1/completions", {"prompt": "a"}), 503, "engine")


def test_bugs_of_ours_stay_in_the_log(
    own: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "kvist.server"):
        patch.setattr(own.engine, "submit", bug)
        error = error_of(own.post("/v1/completions", {"prompt": "a", "stream": True}), 500, "internal")
    assert "secret" not in str(error)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "a secret" in caplog.text


def test_pool_exhausted(load: Callable[..., Engine], own: Api, model_dir: Path) -> None:
    with load(pages=4) as small, serving(small, own.repo, model_dir) as api:
        error_of(api.post("/v1/completions", {"prompt": [5] * 100}), 400, "invalid_input")
        big = own.complete([7] * 100, max_tokens=1)
        own.fork("snapshot", request_id=big["id"], name="big")
        answer = api.post("/v1/processfork/checkout", {"cid": "big"})
        error_of(answer, 503, "pool_exhausted")
        assert answer.headers["retry-after"] == "1"
        assert len(api.tokens([5] * 20, max_tokens=4, ignore_eos=True)) == 4
        small.check_integrity()


def test_errors_after_the_first_event(own: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    events = own.events({"prompt": "a", "max_tokens": 1500, "ignore_eos": True})
    next(events)
    with own.engine.exclusive() as scheduler:
        scheduler.fail_all(errors.EngineError("the engine was closed"))
    *_, last = events
    assert last["error"]["code"] == "engine"
