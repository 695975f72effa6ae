"""What is too large to be read into memory is neither written, nor read, nor brought by a push."""

import pytest

from kvist.errors import InvalidManifest
from kvist.repo import RefKind, Repository, fsck, objects, transfer
from kvist.repo.fsck import Code
from kvist.repo.manifest import MANIFEST_MAX, Manifest
from kvist.store import MemoryStore

from .making import halves, manifest, snapshot

ROOM = {"manifest": 100, "snapshot": 50}


@pytest.fixture(params=ROOM)
def what(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shrink(patch: pytest.MonkeyPatch, what: str) -> None:
    patch.setitem(objects._MOST, what, ROOM[what])


def test_it_is_not_written(repo: Repository, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.put_pages(halves(1))
    shrink(monkeypatch, what)
    before = [info.key for info in repo.store.list(f"{what}s/")]
    with pytest.raises(InvalidManifest, match=f"{what} .*expected at most {ROOM[what]} bytes, got"):
        repo.commit([manifest(halves(1))], branch="main")
    assert [info.key for info in repo.store.list(f"{what}s/")] == before
    assert not [*repo.refs.all()]


def test_it_is_not_read(repo: Repository, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = snapshot(repo, halves(1))
    shrink(monkeypatch, what)
    with Repository.open(repo.store) as again:
        with pytest.raises(InvalidManifest, match=f"{what} .*expected at most {ROOM[what]} bytes, it has more"):
            again.manifests("main")
        codes = {"manifest": Code.DAMAGED_MANIFEST, "snapshot": Code.DAMAGED_SNAPSHOT}
        assert [(one.code, one.affects) for one in fsck.check(again).findings] == [(codes[what], (made.cid,))]


def test_it_is_not_pushed(repo: Repository, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a source that does not keep to it."""
    snapshot(repo, halves(1))
    with Repository.open(repo.store) as source, Repository.init(MemoryStore()) as target:
        planned = transfer.plan(source, target, ["main"])
        shrink(monkeypatch, what)
        source.objects.forget()
        with pytest.raises(InvalidManifest, match=f"expected at most {ROOM[what]} bytes"):
            transfer.apply(source, target, planned)
        with pytest.raises(InvalidManifest, match=f"expected at most {ROOM[what]} bytes"):
            transfer.apply(source, target, transfer.plan(source, target, ["main"]))
        assert target.refs.names(RefKind.BRANCH) == [] and not [*target.store.list(f"{what}s/")]


def test_a_manifest_is_not_decoded() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return MANIFEST_MAX + 1

    with pytest.raises(InvalidManifest, match=f"at most {MANIFEST_MAX} bytes"):
        Manifest.decode(Huge(b"{}"))
