"""Chain: a prefix cache as it lies in a repository: one branch whose snapshots each name some blocks.

Knows manifests, snapshots and one ref. Must not know which blocks are worth keeping, nor what anybody holds in memory.

The first snapshot of the chain has no parent (the *base*); each further one continues the one before it and names only
blocks that are new. A snapshot has a manifest for every group of layers, without sequences. A writer appends, or puts
one snapshot in the place of the last ones, or of all; always by compare-and-swap on the branch as it was read, so that
what another writer has appended meanwhile is never cut off.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvist.errors import AlreadyExists, Conflict, InvalidInput, InvalidManifest, NotFound, RepositoryNotFound
from kvist.layout import Layout
from kvist.repo.config import CONFIG
from kvist.repo.manifest import Manifest, PageEntry
from kvist.repo.refs import Ref, RefKind
from kvist.repo.repository import Repository
from kvist.repo.wholeness import Wholeness

Key = tuple[int, str]
"""A block of one group: the group, and the block hash in lower-case hex."""
Halves = tuple[str, str]
"""Digests of a page's K and V half."""

_LOOKS: Final = 8
"""How often the branch is read again because it moved while its chain was being read."""


@dataclass(frozen=True, slots=True)
class Link:
    """One snapshot of a chain: its cid, and how many blocks it names."""

    cid: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Tip:
    """A branch as it was read.

    Attributes:
        ref: its record; ``None``: there is no such branch.
        links: its chain, the base first.
    """

    ref: Ref | None = None
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """How a branch differs from what was known of it.

    Attributes:
        tip: as it is now.
        added: the blocks that each new link names, the oldest link first; in a link the hottest block first.
        removed: keys that links which are gone named, and new ones may name again; ``None``: of what was known,
            everything that no new link names is gone.
    """

    tip: Tip
    added: tuple[Mapping[Key, Halves], ...] = ()
    removed: frozenset[Key] | None = frozenset()


class Chain:
    """The chain of the prefix cache of one rank. Holds no state of its own: safe from any thread.

    Attributes:
        branch: ``cache/`` and the first 12 digits of a fingerprint over the layouts.
        layouts: of the rank's groups, ascending.
    """

    def __init__(self, repo: Repository, layouts: Sequence[Layout]) -> None:
        """The chain of these layouts in ``repo``, whether there is one yet or not. Reads nothing.

        Raises:
            InvalidInput: the layouts are not those of all groups of one rank in order, or one has no bytes a page.
        """
        groups = [layout.group for layout in layouts]
        if not layouts or groups != list(range(layouts[0].n_groups)):
            raise InvalidInput(f"expected the layouts of all groups of a rank in order, got groups {groups!r:.200}")
        places = {(layout.tp_rank, layout.tp_size, layout.n_groups) for layout in layouts}
        if len(places) > 1 or not all(layout.page_bytes for layout in layouts):
            raise InvalidInput("the layouts of a prefix cache are of one rank, and their pages hold at least one byte")
        self._repo: Final = repo
        self._wholeness: Final = Wholeness(repo.store, repo.objects, repo.pages)
        self.layouts: Final = tuple(layouts)
        names = "\n".join(layout.fingerprint for layout in layouts)
        self.branch: Final = f"cache/{hashlib.sha256(names.encode()).hexdigest()[:12]}"

    # -- reading -------------------------------------------------------------------------------------------------

    def look(self, known: Tip) -> Change | None:
        """What changed since ``known``; ``None``: nothing did, which costs one read of the ref.

        Raises:
            RepositoryNotFound: there is no branch, and no repository around it either.
            NotFound, DamagedObject: the branch names what is not stored, or not whole.
            InvalidManifest: the branch is no chain of prefix cache snapshots.
            LayoutMismatch: its pages are of other layouts.
        """
        failed: NotFound | None = None
        before: str | None = None
        for _ in range(_LOOKS):
            ref = self._repo.refs.read(RefKind.BRANCH, self.branch)
            if ref is None or ref.cid is None:
                if self._repo.store.head(CONFIG) is None:  # an unmounted disk looks like a deleted branch
                    raise RepositoryNotFound(f"{self._repo.store.url} holds no kvist repository any more")
                return None if known.ref is None else Change(Tip(), removed=None)
            if known.ref is not None and ref.cid == known.ref.cid:
                return None if ref.etag == known.ref.etag else Change(Tip(ref, known.links))
            if failed is not None and before == ref.cid:
                raise failed
            try:
                return self._read(ref, ref.cid, known)
            except NotFound as error:  # replaced, and taken by a gc, between the ref and its chain
                self._repo.objects.forget()
                failed, before = error, ref.cid
        assert failed is not None
        raise failed

    def blocks(self, cid: str) -> dict[Key, Halves]:
        """The blocks that one snapshot names, the hottest first; those of several groups mixed evenly.

        Raises:
            NotFound, DamagedObject: the snapshot or a manifest is not stored, or not whole.
            LayoutMismatch: its pages are of another layout.
        """
        found: list[tuple[float, Key, Halves]] = []
        for manifest in map(self._repo.manifest, self._repo.objects.snapshot(cid).manifests):
            group, n = manifest.layout.group, len(manifest.pages)
            if group >= len(self.layouts):
                raise InvalidManifest(f"snapshot {cid} on branch {self.branch} has a group {group}")
            self.layouts[group].require(manifest.layout, of=f"snapshot {cid}", into=f"branch {self.branch}")
            found += [
                ((rank + 1) / n, (group, page.block), (page.k, page.v))
                for rank, page in enumerate(manifest.pages)
                if page.block is not None
            ]
        if len(self.layouts) > 1:
            found.sort(key=lambda entry: entry[0])
        return {key: halves for _, key, halves in found}

    def _read(self, ref: Ref, tip: str, known: Tip) -> Change:
        """The change up to a tip that is not the known one."""
        places = {link.cid: place for place, link in enumerate(known.links)}
        cids: list[str] = []
        cid: str | None = tip
        while cid is not None and cid not in places:
            parents = self._repo.objects.snapshot(cid).parents
            if len(parents) > 1:
                raise InvalidManifest(
                    f"branch {self.branch} is no prefix cache: snapshot {cid} has {len(parents)} parents",
                    hint=f"kvist branch --delete {self.branch}",
                )
            cids.append(cid)
            cid = parents[0] if parents else None
        cids.reverse()
        added = tuple(map(self.blocks, cids))
        kept = 0 if cid is None else places[cid] + 1
        links = known.links[:kept] + tuple(Link(*pair) for pair in zip(cids, map(len, added), strict=True))
        if kept:
            with contextlib.suppress(NotFound):
                gone = frozenset(key for link in known.links[kept:] for key in self.blocks(link.cid))
                return Change(Tip(ref, links), added, gone)
            earlier = tuple(self.blocks(link.cid) for link in known.links[:kept])
            return Change(Tip(ref, links), earlier + added, None)
        return Change(Tip(ref, links), added, None)

    # -- writing -------------------------------------------------------------------------------------------------

    def publish(self, tip: Tip, keep: int, blocks: Mapping[Key, Halves], message: str) -> Tip:
        """Put one snapshot after the first ``keep`` links of the chain, in the place of the others.

        ``Repository.commit`` alone would not do: with ``replace`` it moves the branch from wherever it stands, and so
        could cut off what another writer appended after ``tip`` was read.

        Args:
            tip: as the branch was read.
            keep: how many links stay; all of them: the snapshot is appended; 0: it is a new base.
            blocks: what it names, the hottest first; their pages are stored.
            message: of the snapshot.

        Returns:
            The new tip.

        Raises:
            Conflict: the branch is not as it was read, or a gc took what the snapshot needs; nothing is named.
            MissingPage, DamagedPage, NotFound: see `Repository.commit`.
        """
        entries: list[list[PageEntry]] = [[] for _ in self.layouts]
        for (group, block), (k, v) in blocks.items():
            entries[group].append(PageEntry(len(entries[group]), k, v, block))
        manifests = [Manifest(layout, tuple(pages)) for layout, pages in zip(self.layouts, entries, strict=True)]
        parents = [tip.links[keep - 1].cid] if keep else []
        snapshot = self._repo.commit(manifests, parents=parents, message=message)
        ref = self._move(tip.ref, snapshot.cid)
        try:  # publish, then look: see `kvist.repo.lock`
            self._wholeness.confirm([snapshot])
        except BaseException:
            with contextlib.suppress(Conflict):  # somebody has moved the branch on: it is theirs now
                if tip.ref is None or tip.ref.cid is None:
                    self._repo.refs.delete(ref)
                else:
                    self._repo.refs.move(ref, tip.ref.cid)
            raise
        return Tip(ref, (*tip.links[:keep], Link(snapshot.cid, len(blocks))))

    def _move(self, ref: Ref | None, cid: str) -> Ref:
        if ref is not None:
            return self._repo.refs.move(ref, cid)
        try:
            return self._repo.refs.create(RefKind.BRANCH, self.branch, cid)
        except AlreadyExists as error:
            raise Conflict(f"{error}; there was no such branch before", hint="read it again and retry") from None
