"""Makes one broken repository per fsck finding; writes the fixtures: ``cd tests; python -m repo.damaged --force``."""

import shutil
import sys
from pathlib import Path

from kvist.repo import Manifest, RefKind, Repository, Snapshot, lease, lock
from kvist.repo.fsck import Code
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.store import LocalStore

from .making import LAYOUT, digest, halves, manifest, snapshot

FIXTURES = Path(__file__).parent.parent / "data" / "damaged"


def build(root: Path, code: Code) -> None:
    """A repository with three snapshots on ``main`` and one unnamed, broken so that fsck finds ``code`` and no more."""
    store = LocalStore(root, durable=False)
    with Repository.init(store) as repo:
        first, second, third = (snapshot(repo, halves(2, seed)) for seed in range(3))
        unnamed = snapshot(repo, halves(1, 9), branch=None)
        match code:
            case Code.DAMAGED_REF:
                store.put("refs/branches/main.ref", b'{"cid":"sha256:12')
            case Code.DANGLING_REF:
                repo.refs.create(RefKind.TAG, "lost", "sha256:" + "0" * 64)
            case Code.DAMAGED_SNAPSHOT:
                _flip(store, snapshot_key(third.cid), 20)
            case Code.MISSING_PARENT:
                store.delete([snapshot_key(second.cid)])
            case Code.MISSING_MANIFEST:
                store.delete([manifest_key(second.manifests[0])])
            case Code.DAMAGED_MANIFEST:
                _flip(store, manifest_key(first.manifests[0]), 30)
            case Code.MISSING_PAGE:
                lost = manifest([bytes([1]) * LAYOUT.page_bytes] * 2)
                _name_anyway(repo, lost, third)
            case Code.DAMAGED_PAGE:
                key = repo.pages.homes(next(iter(repo.manifest(third.manifests[0]).digests)))[0]
                _flip(store, key, 5)
            case Code.DAMAGED_COPY:
                before = {info.key for info in store.list("segments/")}
                repo.pages.rewrite([digest(halves(2, 2)[0])])  # now it lies in two segments
                (key,) = {info.key for info in store.list("segments/")} - before
                _flip(store, key, 5)
            case Code.WRONG_PAGE_SIZE:
                data = [bytes([1]) * (LAYOUT.page_bytes - 1)] * 2
                repo.pages.put(data)
                _name_anyway(repo, manifest(data), third)
            case Code.DAMAGED_SEGMENT:
                key = repo.pages.homes(next(iter(repo.manifest(unnamed.manifests[0]).digests)))[0]
                _flip(store, key, -1)
            case Code.DAMAGED_LOCK:
                store.put(lock.KEY, b"{}")
            case Code.DAMAGED_LEASE:
                store.put(f"{lease.PREFIX}{0:032x}", b"{}")
            case Code.DAMAGED_SIGNATURE:
                store.put(f"signatures/{third.cid.removeprefix('sha256:')}/{0:064x}", b"{}")
            case Code.STRAY_OBJECT:
                _flip(store, snapshot_key(unnamed.cid), 20)
    shutil.rmtree(root / ".tmp", ignore_errors=True)
    (root / ".lock").unlink(missing_ok=True)


def _flip(store: LocalStore, key: str, at: int) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 1
    store.put(key, data)


def _name_anyway(repo: Repository, broken: Manifest, parent: Snapshot) -> None:
    """What a commit would refuse."""
    made = Snapshot((broken.cid,), (parent.cid,), broken.tokens)
    repo.objects.put_manifests([broken])
    repo.objects.put_snapshots([made])
    tip = repo.refs.read(RefKind.BRANCH, "main")
    assert tip is not None
    repo.refs.move(tip, made.cid)


if __name__ == "__main__":
    for each in Code:
        target = FIXTURES / each.value
        if "--force" in sys.argv:
            shutil.rmtree(target, ignore_errors=True)
        if not target.exists():
            build(target, each)
