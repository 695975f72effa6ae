"""Wholeness: whether a snapshot has all that it names, and keeps it while a gc runs.

Knows what a snapshot needs, and the writers' half of the protocol in `kvist.repo.lock`. Must not know refs.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from typing import Final

from kvist.errors import Conflict, DamagedPage, InvalidManifest, MissingPage, NotFound, PrunedSnapshot
from kvist.ids import parse_cid
from kvist.repo import lineage, lock
from kvist.repo.manifest import Manifest
from kvist.repo.marks import pruned_key
from kvist.repo.objects import Objects, manifest_key, snapshot_key
from kvist.repo.pages import PageStore
from kvist.repo.snapshot import Snapshot
from kvist.store import Store
from kvist.store.parallel import in_parallel

_LOOKUPS_MAX: Final = 64
"""More objects than this are looked up by listing all."""


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
        keys = {snapshot_key(cid) for snapshot in snapshots for cid in (snapshot.cid, *snapshot.parents)}
        manifests = {cid for snapshot in snapshots for cid in snapshot.manifests}
        digests = (digest for cid in manifests for digest in self._objects.manifest(cid).digests)
        self.confirm_stored(keys | {manifest_key(cid) for cid in manifests}, digests)

    def confirm_stored(self, keys: Collection[str], digests: Iterable[str]) -> None:
        """Raise `Conflict` if a gc deletes, or deleted, one of these objects or pages.

        Args:
            keys: of snapshots and manifests.
            digests: of pages; asked for only once the objects are confirmed.
        """
        lost = self._lost(keys, digests, lock.condemned(self._store))
        if lost is not None:
            self._objects.forget()  # what it took may still be in our memory
            raise Conflict(f"a gc took {lost} while this was being named; nothing was named", hint="retry")

    def require_stored(self, cids: Iterable[str]) -> None:
        """Raise `NotFound` unless the store, not only our memory, has every one of these snapshots."""
        keys = {snapshot_key(parse_cid(cid)): cid for cid in cids}
        for key in keys.keys() - self._stored(keys):
            self._objects.forget()
            raise NotFound(f"there is no snapshot {keys[key]}")

    def require_past(self, snapshots: Iterable[Snapshot], reached: Container[str]) -> None:
        """Raise `NotFound` unless the store has all that some stored snapshots descend from.

        Args:
            snapshots: these.
            reached: cids of what a ref names: what that descends from is there, and is not looked for.
        """
        known = {snapshot.cid: snapshot for snapshot in snapshots}

        def parents(cid: str) -> tuple[str, ...]:
            return () if cid in reached else (known.get(cid) or self._objects.snapshot(cid)).parents

        try:
            past = set(lineage.ancestors(known, parents)) - known.keys()
            self.require_stored(cid for cid in past if cid not in reached)
        except NotFound as error:
            raise NotFound(
                f"{error}, and what was to be named descends from it: it is what a gc that was cut short has left",
                hint="kvist gc",
            ) from None

    def manifests(self, snapshot: Snapshot) -> list[Manifest]:
        """The manifests of a snapshot, in its order.

        Raises:
            NotFound: one is not stored.
            PrunedSnapshot: so it is, and should be.
        """
        try:
            return [self._objects.manifest(cid) for cid in snapshot.manifests]
        except NotFound:
            if not self._objects.has(pruned_key(snapshot.cid)):
                raise
            raise PrunedSnapshot(f"snapshot {snapshot.cid} was pruned: its record is kept, its pages are not") from None

    def require_whole(self, snapshot: Snapshot) -> None:
        """Refuse what its maker could not confirm: what was confirmed has whole ancestors, and stays so.

        What was pruned since was finished once: its record will do.
        """
        if snapshot.cid in self._whole:
            return
        try:
            for key in (*map(snapshot_key, snapshot.parents), *map(manifest_key, snapshot.manifests)):
                if not self._objects.has(key):
                    raise NotFound(f"snapshot {snapshot.cid} was never finished: {key} is not stored")
            self.require_pages(map(self._objects.manifest, snapshot.manifests), or_damaged=True)
        except (NotFound, MissingPage):
            if not self._objects.has(pruned_key(snapshot.cid)):
                raise
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

    def _lost(self, keys: Collection[str], digests: Iterable[str], condemned: lock.Condemned) -> str | None:
        stored = self._stored(keys)
        for key in keys:
            if key in condemned.objects or key not in stored:
                return key
        self._pages.refresh()
        for digest in digests:
            if condemned.loses(digest, self._pages.homes(digest)):
                return f"page {digest}"
        return None

    def _stored(self, keys: Collection[str]) -> set[str]:
        """Those of the keys that the store has, and where they are many perhaps others."""
        if len(keys) <= _LOOKUPS_MAX:
            stored = in_parallel(self._objects.has, keys, self._store)
            return {key for key, is_stored in zip(keys, stored, strict=True) if is_stored}
        prefixes = {key[: key.index("/") + 1] for key in keys}
        return {info.key for prefix in prefixes for info in self._store.list(prefix)}
