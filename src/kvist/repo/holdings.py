"""Holdings: which of a source's snapshots, manifests and pages a target repository has, whole.

Knows what makes a snapshot whole and what a repository may be trusted with. Moves nothing, and changes nothing but
marks on pages that it finds damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from kvist.errors import IntegrityError, InvalidManifest, KvistError, NotFound, StoreError
from kvist.repo import lineage, marks
from kvist.repo.manifest import Manifest
from kvist.repo.objects import snapshot_key
from kvist.repo.refs import Ref, RefKind
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot
from kvist.store.parallel import in_parallel

_T = TypeVar("_T")

_UNREADABLE: Final = (NotFound, IntegrityError, InvalidManifest)
"""What reading an object raises when it is not there, or not what its name says."""


class Holdings:
    """What one repository holds at one moment, asked for as little as will do.

    Whatever a ref reaches is whole: that is what a repository promises (docs/spec/repository.md), so nothing of it is
    read again. Unless the repository is known to be damaged: then every object is read, and every page looked up. Or it
    is to be healed: then every page is read too.

    Attributes:
        is_trusted: whether what refs reach counts as whole unseen.
        heals: whether whatever is asked for is read, so that damage which nobody has met is found.
        names: of all refs that have a record, readable or not, deleted ones too.
        refs: every ref that can be read and names a snapshot.
        unreadable: the refs that cannot be read, and why.
        pruned: cids whose records are kept without their manifests and pages.
    """

    def __init__(self, repo: Repository, *, heals: bool = False) -> None:
        """Look at ``repo``: its refs, marks and segments, but at no object."""
        self._repo = repo
        repo.objects.forget()
        repo.pages.refresh()
        self.heals: Final = heals
        self.is_trusted: Final = not heals and not _is_damaged(repo)
        self.refs: Final[dict[tuple[RefKind, str], Ref]] = {}
        self.unreadable: Final[dict[tuple[RefKind, str], KvistError]] = {}
        names = [(kind, name) for kind in RefKind for name in repo.refs.names(kind)]
        self.names: Final = frozenset(names)
        for key, found in zip(names, in_parallel(self._read_ref, names, repo.store), strict=True):
            if isinstance(found, Ref):
                self.refs[key] = found
            elif found is not None:
                self.unreadable[key] = found
        self.pruned: Final = frozenset(marks.pruned(repo.store))
        self._tips = frozenset(ref.cid for ref in self.refs.values() if ref.cid is not None)
        self._reached: set[str] = set()
        self._walk = lineage.ancestors(self._tips, lambda cid: _parents(repo, cid))
        self._snapshots: frozenset[str] | None = None
        self._manifests: frozenset[str] | None = None

    @property
    def snapshots(self) -> frozenset[str]:
        """Cids of the snapshot records that are stored, whole or not."""
        if self._snapshots is None:
            self._snapshots = frozenset(cid for cid, _ in self._repo.objects.snapshots())
        return self._snapshots

    @property
    def manifests(self) -> frozenset[str]:
        """Cids of the manifests that are stored, whole or not."""
        if self._manifests is None:
            self._manifests = frozenset(cid for cid, _ in self._repo.objects.manifests())
        return self._manifests

    def has_all(self, cid: str) -> bool:
        """Whether a snapshot, all that it needs, and all its ancestors can be taken to be there."""
        return self.is_trusted and cid in self.snapshots and self._is_reached(cid) and self.snapshot(cid) is not None

    def is_kept_whole(self, cid: str) -> bool:
        """Whether a snapshot, if it is there, is there with its manifests and pages: it is not pruned, or a ref names
        it."""
        return cid not in self.pruned or cid in self._tips

    def snapshot(self, cid: str) -> Snapshot | None:
        """A snapshot's record, read and verified; ``None`` if there is none that is whole."""
        return attempt(self._repo.objects.snapshot, cid) if cid in self.snapshots else None

    def manifest(self, cid: str) -> Manifest | None:
        """A manifest, likewise."""
        return attempt(self._repo.objects.manifest, cid) if cid in self.manifests else None

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those pages of which no undamaged copy is known; where it heals, of which none can be read."""
        pages, wanted = self._repo.pages, [*digests]
        if self.heals:
            pages.verify(wanted)
        return [digest for digest in wanted if pages.size(digest) is None]

    def _read_ref(self, key: tuple[RefKind, str]) -> Ref | KvistError | None:
        try:
            return self._repo.refs.read(*key)
        except StoreError:  # says nothing of the ref
            raise
        except KvistError as error:
            return error

    def _is_reached(self, cid: str) -> bool:
        """Whether a ref reaches ``cid``; walks only as far as it takes to find out."""
        if cid in self._tips:
            return True
        while cid not in self._reached:
            found = next(self._walk, None)
            if found is None:
                return False
            self._reached.add(found)
        return True


def descends(repo: Repository, cid: str, ancestor: str) -> bool:
    """Whether ``cid`` is ``ancestor`` or descends from it, as far as ``repo`` can read."""
    if not repo.objects.has(snapshot_key(ancestor)):
        return False
    return any(found == ancestor for found in lineage.ancestors([cid], lambda each: _parents(repo, each)))


def _parents(repo: Repository, cid: str) -> tuple[str, ...]:
    found = attempt(repo.objects.snapshot, cid)
    return () if found is None else found.parents


def _is_damaged(repo: Repository) -> bool:
    """Whether pages are known to be lost: all copies damaged, or in a segment that cannot be read."""
    lost = any(repo.pages.size(digest) is None for _, digest in repo.pages.damaged_places())
    return lost or bool(repo.pages.broken_segments())


def attempt(read: Callable[[str], _T], cid: str) -> _T | None:
    """What ``read`` makes of ``cid``; ``None`` where that is not stored, or not what its name says."""
    try:
        return read(cid)
    except _UNREADABLE:
        return None
