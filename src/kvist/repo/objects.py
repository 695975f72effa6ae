"""Objects: manifests and snapshots in the store, each under the SHA-256 of its bytes.

Knows how to put and get one object, verified. Must not know pages or refs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from kvist.errors import DamagedObject, IntegrityError, InvalidManifest, KvistError, NotFound
from kvist.hashing import sha256_cid
from kvist.ids import digest_hex, parse_cid
from kvist.repo.manifest import MANIFEST_MAX, Manifest
from kvist.repo.snapshot import SNAPSHOT_MAX, Snapshot
from kvist.store import ObjectInfo, Store
from kvist.store.parallel import in_parallel

MANIFESTS: Final = "manifests/"
SNAPSHOTS: Final = "snapshots/"
_MANIFESTS_KEPT: Final = 64
_MOST: Final = {"manifest": MANIFEST_MAX, "snapshot": SNAPSHOT_MAX}
"""Bytes of an object that is read into memory, by what it is."""
_LOOKS: Final = 2
"""How often an object is read before it counts as damaged: a wrong byte may have been on the way."""


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
        self._put("manifest", [(manifest_key(manifest.cid), manifest.encode()) for manifest in manifests])
        for manifest in manifests:
            self._keep(manifest.cid, manifest)

    def put_snapshots(self, snapshots: Sequence[Snapshot]) -> None:
        """Store snapshots, durably, with one barrier."""
        self._put("snapshot", [(snapshot_key(snapshot.cid), snapshot.encode()) for snapshot in snapshots])

    def put_encoded_manifests(self, encoded: Sequence[bytes]) -> None:
        """Store manifests by their bytes, in whatever known encoding, as `put_manifests` does."""
        self._put("manifest", [(manifest_key(sha256_cid(data)), data) for data in encoded])

    def encoded_manifest(self, cid: str) -> bytes:
        """The bytes of the manifest of that cid, as they are stored: of a foreign encoding, not the canonical ones.

        Raises:
            NotFound: there is none.
            DamagedObject: its bytes do not hash to the cid.
        """
        return self._get(manifest_key(parse_cid(cid)), cid, "manifest")

    def manifest(self, cid: str) -> Manifest:
        """The manifest of that cid.

        Raises:
            NotFound: there is none.
            DamagedObject: its bytes do not hash to the cid.
            InvalidManifest: they do, and are no manifest, or too many.
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

    def _put(self, what: str, items: list[tuple[str, bytes]]) -> None:
        """Put what is absent or, after damage, different from what its key says."""
        for key, data in items:
            if len(data) > _MOST[what]:  # nobody could read it
                raise InvalidManifest(f"{what} {key}: expected at most {_MOST[what]} bytes, got {len(data)}")
        looked = [*zip(items, in_parallel(self._is_whole, items, self._store), strict=True)]
        self._store.put_many([item for item, is_whole in looked if not is_whole], mode="overwrite")
        # For the barrier: the writer of those that are there may not have reached its own yet.
        self._store.put_many([item for item, is_whole in looked if is_whole], mode="create")

    def _is_whole(self, item: tuple[str, bytes]) -> bool:
        key, data = item
        try:
            return self._store.get(key, size=len(data) + 1) == data
        except (NotFound, IntegrityError):
            return False

    def _get(self, key: str, cid: str, what: str) -> bytes:
        for _ in range(_LOOKS):
            try:
                data = self._store.get(key, size=_MOST[what] + 1)
            except NotFound:
                raise NotFound(f"there is no {what} {cid}") from None
            if sha256_cid(data) == cid:
                break
        if len(data) > _MOST[what]:
            raise InvalidManifest(f"{what} {cid}: expected at most {_MOST[what]} bytes, it has more")
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
