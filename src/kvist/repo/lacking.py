"""Lacking: what a target repository lacks of some snapshots of a source; no page is read but to heal it.

Knows lineage, manifests and which pages they name. Must not know which refs are to move.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from kvist.errors import IntegrityError, InvalidManifest, NotFound
from kvist.repo import fsck, lineage, marks, signing
from kvist.repo.holdings import Holdings, attempt
from kvist.repo.manifest import Manifest
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot
from kvist.store import Store
from kvist.store.parallel import in_parallel

_FEW: Final = 1000
"""Records of which all are read at once, though perhaps only some are needed: one after the other takes longer."""


@dataclass(frozen=True)
class Lacking:
    """What a target lacks.

    Attributes:
        snapshots: cids of the records to send, parents before children.
        manifests: cids to send.
        pages: digests to send.
        page_bytes: bytes of those.
        signatures: keys to send.
        pruned: cids of snapshots whose record alone is sent, as the source has pruned the rest.
        held: cids of snapshots that lie at the target whole, and that some of those sent continue.
        needed_keys: of all snapshots and manifests that must be there in the end, sent or not.
        needed_pages: digests of all pages that must.
    """

    snapshots: tuple[str, ...] = ()
    manifests: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()
    page_bytes: int = 0
    signatures: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    needed_keys: frozenset[str] = field(default=frozenset(), repr=False)
    needed_pages: tuple[str, ...] = field(default=(), repr=False)

    @property
    def is_empty(self) -> bool:
        """Nothing is lacking."""
        return not (self.snapshots or self.manifests or self.pages or self.signatures)

    def concerns(self, cid: str) -> bool:
        """Whether the target lacks the snapshot, or something that it needs; not if it is only continued."""
        return snapshot_key(cid) in self.needed_keys and cid not in self.held

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return {
            "snapshots": self.snapshots,
            "manifests": self.manifests,
            "pages": len(self.pages),
            "page_bytes": self.page_bytes,
            "signatures": len(self.signatures),
            "pruned": self.pruned,
        }


def survey(
    source: Repository, target: Repository, holdings: Holdings, tips: frozenset[str], *, ahead: bool = False
) -> Lacking:
    """Walk from ``tips`` down to what the target has whole.

    Args:
        source: has the tips, and all that they reach.
        target: is to have it.
        holdings: of the target.
        tips: cids of snapshots that are to be named at the target.
        ahead: read every record that the target lacks at once: for when most of them are needed.

    Raises:
        NotFound: the source lacks a snapshot or manifest.
        DamagedPage, MissingPage, DamagedObject, InvalidManifest: it cannot give what the target lacks.
    """
    if ahead or not holdings.snapshots:
        new = [cid for cid, _ in source.objects.snapshots() if cid not in holdings.snapshots]
        if ahead or len(new) <= _FEW:
            reads = in_parallel(lambda cid: attempt(source.objects.snapshot, cid), new, source.store)
            collections.deque(reads, maxlen=0)  # `Objects` keeps them
    return _Survey(source, target, holdings, tips).run()


class _Survey:
    def __init__(self, source: Repository, target: Repository, holdings: Holdings, tips: frozenset[str]) -> None:
        self.source, self.target, self.holdings, self.tips = source, target, holdings, tips
        self.pruned = frozenset(marks.pruned(source.store))
        self.walked: dict[str, Snapshot] = {}
        self.sizes: dict[str, int] = {}  # of every page needed

    def run(self) -> Lacking:
        collections.deque(lineage.ancestors(self.tips, self._parents), maxlen=0)
        order = lineage.newest_first(self.walked)[::-1]
        bare = {cid for cid in order if self._is_bare(cid)}
        needed = dict.fromkeys(cid for one in order if one not in bare for cid in self.walked[one].manifests)
        manifests = tuple(self._look_into(needed))
        pages = tuple(self.holdings.missing(self.sizes))
        self._require_sizes(frozenset(pages))
        parents = {cid for snapshot in self.walked.values() for cid in snapshot.parents}
        keys = set(map(snapshot_key, parents.union(order)))
        return Lacking(
            snapshots=tuple(cid for cid in order if self.holdings.snapshot(cid) is None),
            manifests=manifests,
            pages=pages,
            page_bytes=sum(self.sizes[digest] for digest in pages),
            signatures=tuple(self._signatures()),
            pruned=tuple(cid for cid in order if cid in bare and cid not in self.holdings.snapshots),
            held=frozenset(filter(self.holdings.is_kept_whole, parents - self.walked.keys())),
            needed_keys=frozenset(keys.union(map(manifest_key, needed))),
            needed_pages=tuple(self.sizes),
        )

    def _parents(self, cid: str) -> tuple[str, ...]:
        """Where to go on from ``cid``: nowhere, where the target has it and all before it."""
        if self.holdings.has_all(cid) and (cid not in self.tips or self.holdings.is_kept_whole(cid)):
            return ()
        self.walked[cid] = self.holdings.snapshot(cid) or self.source.objects.snapshot(cid)
        return self.walked[cid].parents

    def _is_bare(self, cid: str) -> bool:
        """Whether the record of ``cid`` will do: one side has pruned the rest, and nobody asks for it by name."""
        if cid in self.tips:
            return False
        if not self.holdings.is_kept_whole(cid):
            return True
        return cid in self.pruned and not all(map(self._is_stored, self.walked[cid].manifests))

    def _is_stored(self, cid: str) -> bool:
        """Whether either side has a manifest of that cid."""
        return cid in self.holdings.manifests or self.source.objects.has(manifest_key(cid))

    def _look_into(self, needed: Iterable[str]) -> Iterator[str]:
        """Learn which pages the manifests name; yields the cids of those that the target lacks."""

        def read(cid: str) -> tuple[str, Manifest, bool]:
            there = self.holdings.manifest(cid)
            return cid, there or self.source.objects.manifest(cid), there is not None

        for cid, manifest, is_there in in_parallel(read, needed, self.source.store):
            size = manifest.layout.page_bytes
            for digest in manifest.digests:
                if self.sizes.setdefault(digest, size) != size:
                    raise InvalidManifest(
                        f"page {digest} has {size} bytes by manifest {cid}, and {self.sizes[digest]} by another"
                    )
            if not is_there:
                yield cid

    def _require_sizes(self, missing: frozenset[str]) -> None:
        """Refuse manifests whose layout does not fit their pages, and pages that the source cannot give."""
        for digest, size in self.sizes.items():
            pages = self.source.pages if digest in missing else self.target.pages
            found = pages.size(digest)
            if found is None:
                raise pages.absent(digest)
            if found != size:
                raise InvalidManifest(f"page {digest} has {found} bytes, its manifest's layout says {size}")

    def _signatures(self) -> Iterator[str]:
        """Keys of signatures that only the source has, of whatever snapshots the target has or gets; to heal, also of
        those that are whole only there."""
        keys = [info.key for info in self.source.store.list(signing.PREFIX)]
        there = frozenset(info.key for info in self.target.store.list(signing.PREFIX)) if keys else frozenset()
        for key in keys:
            cid = "sha256:" + key.removeprefix(signing.PREFIX).partition("/")[0]
            if cid not in self.walked and cid not in self.holdings.snapshots:
                continue
            if key not in there or (self.holdings.heals and self._heals(key)):
                yield key

    def _heals(self, key: str) -> bool:
        return not _is_signature(self.target.store, key) and _is_signature(self.source.store, key)


def _is_signature(store: Store, key: str) -> bool:
    try:
        fsck.require_signature(store, key)
    except (NotFound, IntegrityError, InvalidManifest):
        return False
    return True
