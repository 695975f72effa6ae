"""A snapshot as an engine takes it: its manifests by rank and group, checked against the engine's layouts.

Knows manifests and what the engine says of itself. Must not know sessions, branches or HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from kvist.errors import InvalidManifest, LayoutMismatch, NotFound
from kvist.repo import LogicalSeq, Manifest, Repository
from kvist.server.history import parts_of_rank
from kvist.server.live.client import Description


@dataclass(frozen=True, slots=True)
class Parts:
    """A snapshot with its manifests, as they fit an engine.

    Attributes:
        cid: the snapshot's.
        manifests: ascending by rank, then by group.
        groups: those of the first rank. The other ranks' differ in the pages' digests only.
    """

    cid: str
    manifests: tuple[Manifest, ...]
    groups: tuple[Manifest, ...]

    def sequence(self, sequence_id: str) -> LogicalSeq:
        """A sequence of it, by the first group, or raise `NotFound`."""
        found = self.groups[0].sequence(sequence_id)
        if found is None:
            raise NotFound(f"snapshot {self.cid} has no sequence {sequence_id!r:.200}")
        return found

    def chosen(self, sequence_ids: Collection[str] | None) -> Parts:
        """Only these sequences and their pages."""
        if sequence_ids is None:
            return self
        for name in sequence_ids:
            self.sequence(name)
        return Parts(
            self.cid,
            tuple(_chosen(manifest, sequence_ids) for manifest in self.manifests),
            tuple(_chosen(manifest, sequence_ids) for manifest in self.groups),
        )


def read_parts(repo: Repository, rev: str, here: Description) -> Parts:
    """A snapshot's manifests.

    Args:
        repo: where it is.
        rev: names it.
        here: what the engine says of itself.

    Raises:
        NotFound: there is no such snapshot.
        UntrustedSnapshot: the repository's policy asks for a signature that it has not.
        LayoutMismatch: a manifest does not fit the engine, or it lacks a rank's or a group's.
        InvalidManifest: its manifests do not name the same sequences.
    """
    cid = repo.resolve(rev)
    repo.require_trusted(cid)
    manifests = tuple(repo.manifests(cid))
    layouts = {(layout.tp_rank, layout.group): layout for row in here.layouts for layout in row}
    of = f"snapshot {cid}"
    for manifest in manifests:
        place = manifest.layout.tp_rank, manifest.layout.group
        layouts.get(place, here.layouts[0][0]).require(manifest.layout, of=of, into="the engine")
    missing = layouts.keys() - {(manifest.layout.tp_rank, manifest.layout.group) for manifest in manifests}
    if missing:
        rank, group = min(missing)
        raise LayoutMismatch(f"{of} does not fit the engine: it has no pages of rank {rank}, group {group}")
    parts = Parts(cid, manifests, tuple(parts_of_rank(list(manifests), 0)))
    for manifest in manifests:
        if [seq.id for seq in manifest.sequences] != [seq.id for seq in parts.groups[0].sequences]:
            raise InvalidManifest(f"{of}: its manifests name different sequences")
    return parts


def verify_pages(repo: Repository, manifests: Iterable[Manifest]) -> None:
    """Read every page of these manifests, or raise for the first that is damaged or gone."""
    digests = list(dict.fromkeys(digest for manifest in manifests for digest in manifest.digests))
    repo.pages.refresh()  # the engine's ranks have put most of them, in other processes
    bad = repo.pages.verify(digests)
    if bad:
        raise repo.pages.absent(bad[0])


def payload_of(repo: Repository, parts: Parts) -> dict[str, Any]:
    """What the engine must know of a snapshot to find its pages."""
    rows: dict[int, list[str]] = {}
    for manifest, name in zip(parts.manifests, repo.snapshot(parts.cid).manifests, strict=True):
        rows.setdefault(manifest.layout.tp_rank, []).append(name)
    return {
        "cid": parts.cid,
        "manifests": list(rows.values()),
        "groups": [{"pages": [[page.ix, page.block] for page in manifest.pages]} for manifest in parts.groups],
        "sequences": [
            {
                "id": seqs[0].id,
                "token_ids": list(seqs[0].token_ids),
                "state": seqs[0].state,
                "groups": [
                    {"first_page": seq.first_page, "page_ixs": list(seq.page_ixs), "fill": seq.fill_in_last_page}
                    for seq in seqs
                ],
            }
            for seqs in zip(*(manifest.sequences for manifest in parts.groups), strict=True)
        ],
    }


def _chosen(manifest: Manifest, sequence_ids: Collection[str]) -> Manifest:
    sequences = tuple(seq for seq in manifest.sequences if seq.id in sequence_ids)
    needed = {ix for seq in sequences for ix in seq.page_ixs}
    return replace(manifest, pages=tuple(page for page in manifest.pages if page.ix in needed), sequences=sequences)
