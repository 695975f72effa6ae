"""Reach: what refs need, followed through a repository that is not whole, with a second one to look things up in.

Knows snapshots, manifests and which pages they name. Must not know what is done about what is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kvist.errors import NotFound
from kvist.hashing import sha256_cid
from kvist.repo import lineage, marks
from kvist.repo.fsck import WRONG
from kvist.repo.manifest import Manifest
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.repo.repository import Repository
from kvist.repo.scan import Copy
from kvist.repo.snapshot import Snapshot

_T = TypeVar("_T")
_GONE: Final = (NotFound, *WRONG)


def stored(repo: Repository, key: str, cid: str) -> bytes | None:
    """The bytes of an object, if they are there and hash to its cid."""
    try:
        data = repo.store.get(key)
    except _GONE:
        return None
    return data if sha256_cid(data) == cid else None


@dataclass(slots=True)
class Reach:
    """What some snapshots need, and which of it is not whole.

    Attributes:
        repo: where it is looked for.
        source: where what is not whole there is looked for; ``None``: nowhere.
        damaged: page copies that do not count, though they are not marked.
        whole: segment key and digest of copies that do count, though they are marked.
        snapshots: those found, in ``repo`` or ``source``.
        fetched: keys of snapshots and manifests that only ``source`` has whole, by cid.
        lost: cids of snapshots and manifests that neither has.
        pages: size by digest of those of which no whole copy in ``repo`` is known.
        users: snapshots that name it, by cid of a snapshot or manifest, or digest of one of `pages`.
    """

    repo: Repository
    source: Repository | None = None
    damaged: Collection[Copy] = ()
    whole: Collection[tuple[str, str]] = ()
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    fetched: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    pages: dict[str, int] = field(default_factory=dict)
    users: dict[str, set[str]] = field(default_factory=dict)

    def follow(self, tips: Iterable[str]) -> None:
        """Look for all that ``tips`` need, themselves included. Of what was pruned only the record is needed."""
        roots = set(tips)
        waiting = [(cid, cid) for cid in roots]
        while waiting:
            cid, user = waiting.pop()
            if cid in self.snapshots:
                continue
            snapshot = self._find(Snapshot.decode, snapshot_key(cid), cid, [user])
            if snapshot is not None:
                self.snapshots[cid] = snapshot
                waiting += [(parent, cid) for parent in snapshot.parents]
        bare = marks.pruned(self.repo.store).keys() - roots
        self._pages({cid for cid in self.snapshots if cid not in bare})

    def broken(self, names: Collection[str]) -> set[str]:
        """Snapshots that need one of these snapshots, manifests or pages, or descend from such."""
        found = {user for name in names for user in self.users.get(name, ())} | set(names)
        for cid in reversed(lineage.newest_first(self.snapshots)):
            if not found.isdisjoint(self.snapshots[cid].parents):
                found.add(cid)
        return found

    def _find(self, decode: Callable[[bytes], _T], key: str, cid: str, users: Iterable[str]) -> _T | None:
        """An object, from wherever it is whole; ``None``: from nowhere."""
        self.users.setdefault(cid, set()).update(users)
        data = stored(self.repo, key, cid)
        if data is None and self.source is not None:
            data = stored(self.source, key, cid)
            if data is not None:
                self.fetched[cid] = key
        if data is not None:
            with contextlib.suppress(*WRONG):  # its bytes are its own, and nothing that can be read
                return decode(data)
        self.lost.add(cid)
        return None

    def _pages(self, needed: Collection[str]) -> None:
        bad = {(copy.segment, copy.digest) for copy in self.damaged}
        good = {digest for _, digest in self.whole}
        manifests: dict[str, set[str]] = {}
        for cid in needed:
            for name in self.snapshots[cid].manifests:
                manifests.setdefault(name, set()).add(cid)
        for name, users in manifests.items():
            manifest = self._find(Manifest.decode, manifest_key(name), name, users)
            if manifest is None:
                continue
            for digest in manifest.digests:
                if digest not in good and not any((home, digest) not in bad for home in self.repo.pages.homes(digest)):
                    self.pages[digest] = manifest.layout.page_bytes
                    self.users.setdefault(digest, set()).update(users)
