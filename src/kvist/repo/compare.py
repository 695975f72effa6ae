"""What two snapshots share, and what a repository holds: numbers for people and programs. Reads, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kvist.repo.manifest import LogicalSeq, Manifest
from kvist.repo.repository import Repository


@dataclass(frozen=True, slots=True)
class SequenceDiff:
    """One sequence id in two snapshots; a side that lacks it counts 0 tokens.

    Attributes:
        id: of the sequence.
        tokens_a, tokens_b: length on each side, in tokens (known ids, or else cached tokens).
        tokens_shared: length of the common prefix of their token ids.
    """

    id: str
    tokens_a: int
    tokens_b: int
    tokens_shared: int


@dataclass(frozen=True, slots=True)
class Diff:
    """What two snapshots share. Pages are page halves, counted once a snapshot.

    Attributes:
        a, b: cids.
        same_layout: whether pages of one fit the engine of the other.
        pages_shared, pages_only_a, pages_only_b: page halves.
        bytes_shared, bytes_only_a, bytes_only_b: their bytes.
        sequences: by id.
    """

    a: str
    b: str
    same_layout: bool
    pages_shared: int
    pages_only_a: int
    pages_only_b: int
    bytes_shared: int
    bytes_only_a: int
    bytes_only_b: int
    sequences: tuple[SequenceDiff, ...]

    @property
    def tokens_shared(self) -> int:
        """Tokens of common prefixes, over all sequences."""
        return sum(sequence.tokens_shared for sequence in self.sequences)

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return asdict(self) | {"tokens_shared": self.tokens_shared}


def diff(repo: Repository, a: str, b: str) -> Diff:
    """Compare two snapshots, by anything that `Repository.resolve` takes."""
    cids = repo.resolve(a), repo.resolve(b)
    manifests_a, manifests_b = ([repo.manifest(m) for m in repo.snapshot(cid).manifests] for cid in cids)
    sizes_a = {digest: m.layout.page_bytes for m in manifests_a for digest in m.digests}
    sizes_b = {digest: m.layout.page_bytes for m in manifests_b for digest in m.digests}
    shared = sizes_a.keys() & sizes_b.keys()
    only_a, only_b = sizes_a.keys() - shared, sizes_b.keys() - shared
    return Diff(
        a=cids[0],
        b=cids[1],
        same_layout=[m.layout for m in manifests_a] == [m.layout for m in manifests_b],
        pages_shared=len(shared),
        pages_only_a=len(only_a),
        pages_only_b=len(only_b),
        bytes_shared=sum(sizes_a[digest] for digest in shared),
        bytes_only_a=sum(sizes_a[digest] for digest in only_a),
        bytes_only_b=sum(sizes_b[digest] for digest in only_b),
        sequences=tuple(_sequences(manifests_a[0], manifests_b[0])),
    )


def _sequences(a: Manifest, b: Manifest) -> Iterable[SequenceDiff]:
    by_id_a, by_id_b = {seq.id: seq for seq in a.sequences}, {seq.id: seq for seq in b.sequences}
    none = LogicalSeq("none", ())
    for name in sorted(by_id_a.keys() | by_id_b.keys()):
        left, right = by_id_a.get(name, none), by_id_b.get(name, none)
        common = 0
        for x, y in zip(left.token_ids, right.token_ids, strict=False):
            if x != y:
                break
            common += 1
        yield SequenceDiff(
            name,
            len(left.token_ids) or left.cached_tokens(a.layout.page_size_tokens),
            len(right.token_ids) or right.cached_tokens(b.layout.page_size_tokens),
            common,
        )


@dataclass(frozen=True, slots=True)
class Stats:
    """What a repository holds.

    Attributes:
        branches, tags, snapshots, manifests: how many; snapshots that no ref reaches are counted too.
        unreachable_snapshots: of those.
        tokens: over all reachable snapshots.
        logical_bytes: pages of all reachable snapshots, as if each had its own.
        page_bytes: distinct pages of all reachable snapshots.
        stored_bytes: everything in the store.
        segments: how many.
        damaged_pages: page copies known to be damaged.
    """

    branches: int
    tags: int
    snapshots: int
    unreachable_snapshots: int
    manifests: int
    tokens: int
    logical_bytes: int
    page_bytes: int
    stored_bytes: int
    segments: int
    damaged_pages: int

    @property
    def dedup(self) -> float:
        """Logical bytes over distinct bytes; 1.0 for an empty repository."""
        return self.logical_bytes / self.page_bytes if self.page_bytes else 1.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return asdict(self) | {"dedup": self.dedup}


def stats(repo: Repository) -> Stats:
    """Count a repository."""
    repo.pages.refresh()
    refs = list(repo.refs.all())
    snapshots = repo.reachable()
    sizes: dict[str, int] = {}
    logical = 0
    for snapshot in snapshots.values():
        for cid in snapshot.manifests:
            manifest = repo.manifest(cid)
            half = manifest.layout.page_bytes
            logical += 2 * half * len(manifest.pages)
            sizes.update(dict.fromkeys(manifest.digests, half))
    stored = sum(1 for _ in repo.objects.snapshots())
    tags = sum(1 for ref in refs if ref.kind.noun == "tag")
    return Stats(
        branches=len(refs) - tags,
        tags=tags,
        snapshots=stored,
        unreachable_snapshots=stored - len(snapshots),
        manifests=sum(1 for _ in repo.objects.manifests()),
        tokens=sum(snapshot.tokens for snapshot in snapshots.values()),
        logical_bytes=logical,
        page_bytes=sum(sizes.values()),
        stored_bytes=sum(info.size for info in repo.store.list()),
        segments=len(repo.pages.segments()),
        damaged_pages=len(repo.pages.damaged_places()),
    )
