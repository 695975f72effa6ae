"""What two snapshots share: numbers for people and programs. Reads, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvist.repo.manifest import Manifest
from kvist.repo.repository import Repository


@dataclass(frozen=True, slots=True)
class SequenceDiff:
    """One sequence id in two snapshots; a side that lacks it counts 0 tokens.

    Attributes:
        id: of the sequence.
        tokens_a, tokens_b: length on each side, in tokens (known ids, or else the most cached tokens of a manifest).
        tokens_shared: length of the common prefix of their token ids.
    """

    id: str
    tokens_a: int
    tokens_b: int
    tokens_shared: int


@dataclass(frozen=True, slots=True)
class PartDiff:
    """One group of one rank in two snapshots; a side that lacks it holds no pages of it.

    Attributes:
        tp_rank, group: which part.
        pages_shared, pages_only_a, pages_only_b: page halves, counted once a side.
    """

    tp_rank: int
    group: int
    pages_shared: int
    pages_only_a: int
    pages_only_b: int


@dataclass(frozen=True, slots=True)
class Diff:
    """What two snapshots share. Pages are page halves, counted once a snapshot.

    Attributes:
        a, b: cids.
        same_layout: whether pages of one fit the engine of the other.
        pages_shared, pages_only_a, pages_only_b: page halves.
        bytes_shared, bytes_only_a, bytes_only_b: their bytes.
        parts: the same pages by rank and group, in this order; a page that several parts name is counted in each.
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
    parts: tuple[PartDiff, ...]
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
    manifests_a, manifests_b = (repo.manifests(cid) for cid in cids)
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
        parts=tuple(_parts(manifests_a, manifests_b)),
        sequences=tuple(_sequences(manifests_a, manifests_b)),
    )


def _parts(a: Sequence[Manifest], b: Sequence[Manifest]) -> Iterable[PartDiff]:
    sides = [{(m.layout.tp_rank, m.layout.group): set(m.digests) for m in manifests} for manifests in (a, b)]
    for part in sorted(sides[0].keys() | sides[1].keys()):
        left, right = (side.get(part, set()) for side in sides)
        yield PartDiff(*part, len(left & right), len(left - right), len(right - left))


def _sequences(a: Sequence[Manifest], b: Sequence[Manifest]) -> Iterable[SequenceDiff]:
    left, right = _lengths(a), _lengths(b)
    none: tuple[tuple[int, ...], int] = (), 0
    for name in sorted(left.keys() | right.keys()):
        (ids_a, cached_a), (ids_b, cached_b) = left.get(name, none), right.get(name, none)
        common = 0
        for x, y in zip(ids_a, ids_b, strict=False):
            if x != y:
                break
            common += 1
        yield SequenceDiff(name, len(ids_a) or cached_a, len(ids_b) or cached_b, common)


def _lengths(manifests: Sequence[Manifest]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Token ids of each sequence, and its most cached tokens, over all parts."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for manifest in manifests:
        for seq in manifest.sequences:
            ids, cached = found.get(seq.id, ((), 0))
            found[seq.id] = ids or seq.token_ids, max(cached, seq.cached_tokens(manifest.layout.page_size_tokens))
    return found
