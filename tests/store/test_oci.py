"""A store in an OCI image layout does what every store does, and its directory is one that other tools understand."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from kvist.errors import IntegrityError, InvalidInput, NotFound, StoreError
from kvist.store import Store, open_store
from kvist.store.oci import OciStore
from kvist.testing.store import StoreTests


class TestDurable(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return OciStore(tmp_path / "not" / "yet" / "there", "v1")

    def reopen(self, store: Store) -> Store:
        return open_store(store.url)


class TestNotDurable(StoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return OciStore(tmp_path / "s", durable=False)

    def reopen(self, store: Store) -> Store:
        return open_store(store.url)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "layout"


@pytest.fixture
def store(root: Path) -> OciStore:
    return OciStore(root, "v1", durable=False)


def document(path: Path) -> dict:  # type: ignore[type-arg]
    return json.loads(path.read_text())


def require_layout(root: Path) -> set[str]:
    """What image-layout.md asks for: every blob is what its name says, every descriptor is right; the blobs."""
    assert document(root / "oci-layout") == {"imageLayoutVersion": "1.0.0"}
    index = document(root / "index.json")
    assert index["schemaVersion"] == 2 and index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    named = set()
    for one in index["manifests"]:
        manifest = document(root / "blobs" / "sha256" / one["digest"].removeprefix("sha256:"))
        assert manifest["mediaType"] == one["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
        assert manifest["artifactType"] == one["artifactType"] == "application/vnd.kvist.repository.v1"
        assert manifest["layers"], "one at least"
        for descriptor in (one, manifest["config"], *manifest["layers"]):
            blob = root / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")
            assert blob.stat().st_size == descriptor["size"]
            named.add(blob.name)
    for blob in (root / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    return named


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs" / "sha256").iterdir()}


def test_it_is_an_image_layout(store: OciStore, root: Path) -> None:
    store.put("a/b", b"one")
    store.put_many([("c", b""), ("d", b"one")], mode="create")
    assert require_layout(root) == blobs(root), "nothing is left over"
    index = document(root / "index.json")
    assert index["manifests"][0]["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
    manifest = document(root / "blobs" / "sha256" / index["manifests"][0]["digest"].removeprefix("sha256:"))
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]]
    assert titles == ["a/b", "c", "d"]
    store.delete(["a/b", "c", "d"])
    assert require_layout(root) == blobs(root) and [*store.list()] == []


def test_tags_are_stores_of_their_own(store: OciStore, root: Path) -> None:
    other = OciStore(root, "v2", durable=False)
    store.put("a", b"same")
    other.put("b", b"same")
    assert [one.key for one in store.list()] == ["a"] and [one.key for one in other.list()] == ["b"]
    store.delete(["a"])
    assert other.get("b") == b"same", "a blob that another artifact names stays"
    store.put("a", b"mine")
    other.delete(["b"])
    assert store.get("a") == b"mine"
    assert require_layout(root) == blobs(root)


def test_what_others_put_there_stays(store: OciStore, root: Path) -> None:
    sha = root / "blobs" / "sha256"
    sha.mkdir(parents=True)
    layer = hashlib.sha256(b"layer").hexdigest()
    (sha / layer).write_bytes(b"layer")
    image = json.dumps(
        {"schemaVersion": 2, "config": {}, "layers": [{"digest": f"sha256:{layer}", "size": 5}]}
    ).encode()
    inner = hashlib.sha256(image).hexdigest()
    (sha / inner).write_bytes(image)
    nested = json.dumps({"schemaVersion": 2, "manifests": [{"digest": f"sha256:{inner}"}]}).encode()
    outer = hashlib.sha256(nested).hexdigest()
    (sha / outer).write_bytes(nested)
    theirs = {
        "digest": f"sha256:{outer}",
        "size": len(nested),
        "annotations": {"org.opencontainers.image.ref.name": "x"},
    }
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [theirs], "annotations": {"k": "v"}}))
    store.put("a", b"layer")
    store.put("a", b"other")
    store.clean(-1)
    assert {layer, inner, outer} < blobs(root)
    index = document(root / "index.json")
    assert index["manifests"][0] == theirs and index["annotations"] == {"k": "v"}
    with pytest.raises(StoreError, match="no kvist repository"):
        OciStore(root, "x").get("a")
    (sha / inner).unlink()  # now nobody can tell what is named
    store.put("a", b"third")
    assert store.clean(-1) == 0 and layer in blobs(root) and store.get("a") == b"third"


def test_leftovers_are_cleaned(store: OciStore, root: Path) -> None:
    store.put("a", b"kept")
    (root / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"left")
    assert store.clean(3600) == 0 and store.clean(-1) == 4
    assert store.get("a") == b"kept" and require_layout(root) == blobs(root)
    assert OciStore(root / "none").clean(0) == 0


def test_a_put_heals_its_blob(store: OciStore, root: Path) -> None:
    store.put("a", b"good")
    path = root / "blobs" / "sha256" / hashlib.sha256(b"good").hexdigest()
    path.write_bytes(b"bad!")
    assert store.get("a") == b"bad!", "whoever reads verifies"
    store.put("a", b"good")
    assert store.get("a") == b"good"
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        store.get("a")
    store.put("a", b"good")
    assert store.get("a") == b"good"


def test_damage_of_what_lists(store: OciStore, root: Path) -> None:
    store.put("a", b"x")
    index = root / "index.json"
    kept = index.read_text()
    for broken in (
        "{",
        "[]",
        '{"manifests":3}',
        '{"manifests":[3]}',
        kept.replace('"digest":"sha256:', '"digest":"md5:'),
    ):
        index.write_text(broken)
        with pytest.raises(IntegrityError):
            store.get("a")
    index.write_text(kept)
    manifest = root / "blobs" / "sha256" / document(index)["manifests"][0]["digest"].removeprefix("sha256:")
    content = manifest.read_bytes()
    for change in (lambda: manifest.write_bytes(content.replace(b'"a"', b'"b"')), manifest.unlink):
        change()
        with pytest.raises(IntegrityError):
            OciStore(root, "v1").get("a")


@pytest.mark.parametrize(
    "layer",
    [
        {"digest": "sha256:0"},
        {"size": -1},
        {"size": "1"},
        {"annotations": {}},
        {"annotations": {"org.opencontainers.image.title": "../x", "org.opencontainers.image.created": "2026-01-01"}},
        {"annotations": {"org.opencontainers.image.title": "x", "org.opencontainers.image.created": "2026-01-01"}},
        {"annotations": {"org.opencontainers.image.title": "x", "org.opencontainers.image.created": "today"}},
    ],
)
def test_layers_that_make_no_sense(root: Path, layer: dict[str, object]) -> None:
    """A hostile artifact names no file outside, and is refused as a whole."""
    good = {"mediaType": "x/y", "digest": f"sha256:{'0' * 64}", "size": 1}
    data = json.dumps({"artifactType": "application/vnd.kvist.repository.v1", "layers": [good | layer]}).encode()
    sha = root / "blobs" / "sha256"
    sha.mkdir(parents=True)
    name = hashlib.sha256(data).hexdigest()
    (sha / name).write_bytes(data)
    one = {"digest": f"sha256:{name}", "annotations": {"org.opencontainers.image.ref.name": "latest"}}
    (root / "index.json").write_text(json.dumps({"manifests": [one]}))
    with pytest.raises(IntegrityError, match="cannot be read"):
        [*OciStore(root).list()]


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("oci:there").url == f"oci:{tmp_path}/there:latest"
    assert open_store("oci:there:v1.0").url == f"oci:{tmp_path}/there:v1.0"
    store = OciStore(tmp_path / "x", "v1")
    assert open_store(store.url) == store and open_store(store.url).url == store.url
    for url in ("oci:", "oci:x:", "oci:x:-y", "oci:x:" + "y" * 129, "oci::v1", "oci:a:b/c"):
        with pytest.raises(InvalidInput):
            open_store(url)
    assert not [*tmp_path.iterdir()], "opening touches nothing"


def test_a_reader_that_meets_a_writer(store: OciStore, root: Path) -> None:
    """What it saw before may be gone; it then sees what is there now."""
    reader = OciStore(root, "v1")
    store.put("a", b"first")
    assert reader.get("a") == b"first"
    stale = reader._tree()
    store.put("a", b"second")
    calls = iter([stale])
    real = reader._tree
    reader._tree = lambda: next(calls, None) or real()  # type: ignore[method-assign]
    assert reader.get("a") == b"second"
    store.delete(["a"])
    calls = iter([stale])
    with pytest.raises(NotFound):
        reader.get("a")


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_copies_it(store: OciStore, root: Path, tmp_path: Path) -> None:
    store.put("a/b", b"one")
    store.put("c", bytes(100_000))
    words = ["skopeo", "--insecure-policy", "copy", "--preserve-digests", f"oci:{root}:v1", f"oci:{tmp_path}/copy:v9"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copy = OciStore(tmp_path / "copy", "v9")
    assert {info.key: copy.get(info.key) for info in copy.list()} == {"a/b": b"one", "c": bytes(100_000)}
    assert [*copy.list()] == [*store.list()]
