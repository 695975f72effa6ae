"""Wholeness: whether a snapshot has all that it names, and keeps it while a gc runs.

Knows what a snapshot needs, and the writers' half of the protocol in `kvist.repo.lock`. Must not know refs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvist.errors import Conflict, DamagedPage, InvalidManifest, NotFound
from kvist.ids import parse_cid
from kvist.repo import lock
from kvist.repo.manifest import Manifest
from kvist.repo.objects import Objects, manifest_key, snapshot_key
from kvist.repo.pages import PageStore
from kvist.repo.snapshot import Snapshot
from kvist.store import Store


class Wholeness:
    """Checks on the snapshots of one repository. Thread-safe."""

    def __init__(self, store: Store, objects: Objects, pages: PageStore) -> None:
        self._store, self._objects, self._pages = store, objects, pages
        self._whole: set[str] = set()  # cids that were confirmed; a gc keeps or deletes them as a whole

    def learn(self, snapshot: Snapshot) -> None:
        """Remember that a snapshot was confirmed."""
        self._whole.add(snapshot.cid)

    def confirm(self, snapshots: Sequence[Snapshot]) -> None:
        """Raise `Conflict` if a gc deletes, or deleted, what the snapshots need."""
        lost = self._lost(snapshots, lock.condemned(self._store))
        if lost is not None:
            self._objects.forget()  # what it took may still be in our memory
            raise Conflict(f"a gc took {lost} while this was being named; nothing was named", hint="retry")

    def require_stored(self, cids: Iterable[str]) -> None:
        """Raise `NotFound` unless the store, not only our memory, has every one of these snapshots."""
        for cid in cids:
            if not self._objects.has(snapshot_key(parse_cid(cid))):
                self._objects.forget()
                raise NotFound(f"there is no snapshot {cid}")

    def require_whole(self, snapshot: Snapshot) -> None:
        """Refuse what its maker could not confirm: what was confirmed has whole ancestors, and stays so."""
        if snapshot.cid in self._whole:
            return
        for key in (*map(snapshot_key, snapshot.parents), *map(manifest_key, snapshot.manifests)):
            if not self._objects.has(key):
                raise NotFound(f"snapshot {snapshot.cid} was never finished: {key} is not stored")
        self.require_pages(map(self._objects.manifest, snapshot.manifests), or_damaged=True)
        self.learn(snapshot)

    def require_pages(self, manifests: Iterable[Manifest], *, or_damaged: bool = False) -> None:
        """Refuse manifests that name a page that is not stored, or not of their layout's size.

        Args:
            manifests: what is checked.
            or_damaged: whether a page of which only damaged copies are stored will do.
        """
        # by digest and size: two groups may name one page, and only one of them by its real size
        named = dict.fromkeys(
            (digest, manifest.layout.page_bytes) for manifest in manifests for digest in manifest.digests
        )
        self._pages.refresh()  # another process may have put them, or found them damaged
        for digest, size in named:
            found = self._pages.size(digest)
            if found is None:
                error = self._pages.absent(digest)
                if not (or_damaged and isinstance(error, DamagedPage)):
                    raise error
            elif found != size:
                raise InvalidManifest(f"page {digest} has {found} bytes, the manifest's layout says {size}")

    def _lost(self, snapshots: Sequence[Snapshot], condemned: lock.Condemned) -> str | None:
        keys = {snapshot_key(cid) for snapshot in snapshots for cid in (snapshot.cid, *snapshot.parents)}
        cids = {cid for snapshot in snapshots for cid in snapshot.manifests}
        for key in keys | {manifest_key(cid) for cid in cids}:
            if key in condemned.objects or not self._objects.has(key):
                return key
        self._pages.refresh()
        for cid in cids:
            for digest in self._objects.manifest(cid).digests:
                if condemned.loses(digest, self._pages.homes(digest)):
                    return f"page {digest}"
        return None
