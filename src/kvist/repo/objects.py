"""Objects: manifests and snapshots in the store, each under the SHA-256 of its bytes.

Knows how to put and get one object, verified. Must not know pages or refs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from kvist.errors import DamagedObject, IntegrityError, KvistError, NotFound
from kvist.hashing import sha256_cid
from kvist.ids import digest_hex, parse_cid
from kvist.repo.manifest import Manifest
from kvist.repo.snapshot import Snapshot
from kvist.store import ObjectInfo, Store

MANIFESTS: Final = "manifests/"
SNAPSHOTS: Final = "snapshots/"
_MANIFESTS_KEPT: Final = 64


def manifest_key(cid: str) -> str:
    """Where the manifest of that cid lies."""
    return MANIFESTS + digest_hex(cid)


def snapshot_key(cid: str) -> str:
    """Where the snapshot of that cid lies."""
    return SNAPSHOTS + digest_hex(cid)


class Objects:
    """Manifests and snapshots of one repository. Thread-safe. What is decoded once is kept: objects never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._snapshots: dict[str, Snapshot] = {}
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._lock = threading.Lock()

    def put_manifests(self, manifests: Sequence[Manifest]) -> None:
        """Store manifests, durably, with one barrier; those that are there and whole are left alone."""
        self._put([(manifest_key(manifest.cid), manifest.encode()) for manifest in manifests])
        for manifest in manifests:
            self._keep(manifest.cid, manifest)

    def put_snapshots(self, snapshots: Sequence[Snapshot]) -> None:
        """Store snapshots, durably, with one barrier."""
        self._put([(snapshot_key(snapshot.cid), snapshot.encode()) for snapshot in snapshots])

    def manifest(self, cid: str) -> Manifest:
        """The manifest of that cid.

        Raises:
            NotFound: there is none.
            DamagedObject: its bytes do not hash to the cid.
            InvalidManifest: they do, and are no manifest.
        """
        with self._lock:
            found = self._manifests.get(parse_cid(cid))
            if found is not None:
                self._manifests.move_to_end(cid)
                return found
        manifest = Manifest.decode(self._get(manifest_key(cid), cid, "manifest"))
        self._keep(cid, manifest)  # not manifest.cid: a foreign encoding has another than its canonical one
        return manifest

    def snapshot(self, cid: str) -> Snapshot:
        """The snapshot of that cid, raising as `manifest`."""
        found = self._snapshots.get(parse_cid(cid))
        if found is None:
            found = self._snapshots[cid] = Snapshot.decode(self._get(snapshot_key(cid), cid, "snapshot"))
        return found

    def snapshots(self) -> Iterator[tuple[str, ObjectInfo]]:
        """Cid and place of every snapshot stored, reachable or not, by cid. Files that are none are left out."""
        return self._list(SNAPSHOTS)

    def manifests(self) -> Iterator[tuple[str, ObjectInfo]]:
        """Cid and place of every manifest stored."""
        return self._list(MANIFESTS)

    def has(self, key: str) -> bool:
        """Whether the object under this key is there, asking the store."""
        return self._store.head(key) is not None

    def forget(self) -> None:
        """Drop what is kept in memory, so that the next get reads the store."""
        with self._lock:
            self._snapshots.clear()
            self._manifests.clear()

    def _list(self, prefix: str) -> Iterator[tuple[str, ObjectInfo]]:
        for info in self._store.list(prefix):
            try:
                yield parse_cid("sha256:" + info.key.removeprefix(prefix)), info
            except KvistError:
                continue  # not one of ours; fsck names it

    def _put(self, items: list[tuple[str, bytes]]) -> None:
        """Put what is absent or, after damage, different from what its key says."""
        whole = [item for item in items if self._is_whole(*item)]
        wrong = [item for item in items if item not in whole]
        self._store.put_many(wrong, mode="overwrite")
        self._store.put_many(whole, mode="create")  # for the barrier: their writer may not have reached its own yet

    def _is_whole(self, key: str, data: bytes) -> bool:
        try:
            return self._store.head(key) is not None and self._store.get(key) == data
        except (NotFound, IntegrityError):
            return False

    def _get(self, key: str, cid: str, what: str) -> bytes:
        try:
            data = self._store.get(key)
        except NotFound:
            raise NotFound(f"there is no {what} {cid}") from None
        if sha256_cid(data) != cid:
            raise DamagedObject(
                f"{what} {cid} is damaged: its {len(data)} bytes hash to {sha256_cid(data)}",
                hint="snapshot the session again, or pull it from a copy",
            )
        return data

    def _keep(self, cid: str, manifest: Manifest) -> None:
        with self._lock:
            self._manifests[cid] = manifest
            while len(self._manifests) > _MANIFESTS_KEPT:
                self._manifests.popitem(last=False)
