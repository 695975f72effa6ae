"""The lineage of one repository, read for the page: snapshots with their names, what they hold, and what they share.

Knows a repository; must not know HTTP or how a graph is drawn.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvist.ids import short
from kvist.repo import Ref, RefKind, Repository, Snapshot
from kvist.repo.lineage import Row, lanes

_FACTS_MAX: Final = 100_000
_DIGESTS_KEPT: Final = 4
"""Sets of digests kept: in a history read row by row, the next row's are mostly those of this row's parent."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a snapshot holds.

    Attributes:
        nbytes: of its distinct page halves.
        shared_bytes: of those, the ones that its first parent has too; ``None``: it has no parent.
    """

    nbytes: int
    shared_bytes: int | None

    @property
    def new_bytes(self) -> int:
        """Bytes that its first parent does not have."""
        return self.nbytes - (self.shared_bytes or 0)

    @property
    def shared(self) -> float | None:
        """The shared part of its bytes, 0 to 1; ``None``: it has no parent."""
        if self.shared_bytes is None:
            return None
        return self.shared_bytes / self.nbytes if self.nbytes else 1.0


@dataclass(frozen=True)
class Tree:
    """All that refs reach, at one moment.

    Attributes:
        rows: children before parents, newest first.
        snapshots: by cid.
        refs: by the cid that they name, branches first.
        children: cids by parent, newest first.
        pruned: cids of those of which only the record is kept.
    """

    rows: tuple[Row, ...]
    snapshots: Mapping[str, Snapshot]
    refs: Mapping[str, Sequence[Ref]]
    children: Mapping[str, Sequence[str]]
    pruned: Collection[str]

    def parents(self, cid: str) -> tuple[str, ...]:
        """Of a snapshot in the tree."""
        return self.snapshots[cid].parents

    @property
    def branches(self) -> int:
        """How many."""
        return sum(ref.kind is RefKind.BRANCH for refs in self.refs.values() for ref in refs)

    @property
    def tags(self) -> int:
        """How many."""
        return sum(ref.kind is RefKind.TAG for refs in self.refs.values() for ref in refs)


def read_tree(repo: Repository) -> Tree:
    """Read the refs, and what they reach.

    Raises:
        KvistError: something that a ref reaches cannot be read.
    """
    refs: dict[str, list[Ref]] = {}
    for ref in repo.refs.all():
        refs.setdefault(ref.cid, []).append(ref)
    snapshots = {snapshot.cid: snapshot for snapshot in repo.log()}
    children: dict[str, list[str]] = {}
    for cid, snapshot in snapshots.items():
        for parent in snapshot.parents:
            children.setdefault(parent, []).append(cid)
    rows = tuple(lanes(snapshots, lambda cid: snapshots[cid].parents))
    return Tree(rows, snapshots, refs, children, repo.pruned())


def title(snapshot: Snapshot) -> str:
    """One line for a snapshot: its message's first, else its name, else its cid."""
    first = snapshot.message.strip().splitlines()[:1]
    return first[0] if first else snapshot.name or short(snapshot.cid)


class Weigher:
    """Tells what snapshots hold. What is found once is kept: snapshots never change. Thread-safe."""

    def __init__(self, repo: Repository) -> None:
        self._repo = repo
        self._lock = threading.Lock()
        self._facts: OrderedDict[str, Facts] = OrderedDict()
        self._digests: OrderedDict[tuple[str, ...], dict[str, int]] = OrderedDict()

    def weigh(self, snapshot: Snapshot) -> Facts:
        """What a snapshot holds.

        Raises:
            KvistError: a manifest of it, or of its parent, cannot be read.
        """
        with self._lock:
            found = self._facts.get(snapshot.cid)
            if found is None:
                found = self._facts[snapshot.cid] = self._weigh(snapshot)
                while len(self._facts) > _FACTS_MAX:
                    self._facts.popitem(last=False)
            return found

    def _weigh(self, snapshot: Snapshot) -> Facts:
        mine = self._sizes(snapshot.manifests)
        nbytes = sum(mine.values())
        if not snapshot.parents:
            return Facts(nbytes, None)
        parent = self._repo.objects.snapshot(snapshot.parents[0])
        if parent.manifests == snapshot.manifests:  # a fork
            return Facts(nbytes, nbytes)
        theirs = self._sizes(parent.manifests)
        return Facts(nbytes, sum(size for digest, size in mine.items() if digest in theirs))

    def _sizes(self, manifests: tuple[str, ...]) -> dict[str, int]:
        """Bytes of each page half of a snapshot, by digest."""
        found = self._digests.get(manifests)
        if found is None:
            found = {}
            for manifest in map(self._repo.manifest, manifests):
                found.update(dict.fromkeys(manifest.digests, manifest.layout.page_bytes))
            self._digests[manifests] = found
            while len(self._digests) > _DIGESTS_KEPT:
                self._digests.popitem(last=False)
        self._digests.move_to_end(manifests)
        return found
