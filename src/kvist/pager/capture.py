"""Capture: from a running engine's pages to a snapshot in a repository.

Knows the `CachePager` contract and the repository's. Must not know which engine it is, nor how it schedules.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvist.errors import NotFound, PrunedSnapshot
from kvist.layout import Layout
from kvist.pager.arena import Arena
from kvist.pager.base import CachePager
from kvist.repo.manifest import LogicalSeq, Manifest, PageEntry
from kvist.repo.refs import RefKind
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Captured:
    """Result of a capture.

    Attributes:
        snapshot: what was committed.
        pages: pages it holds (a page is two halves, K and V).
        pages_copied: of those, copied out of the engine; the others were known by their block hash.
        new_bytes: bytes of page halves that the repository did not have yet.
        pause_s: seconds for which the engine stood still.
        total_s: seconds until the snapshot was durable.
    """

    snapshot: Snapshot
    pages: int
    pages_copied: int
    new_bytes: int
    pause_s: float
    total_s: float


def capture(
    pager: CachePager,
    repo: Repository,
    *,
    sequences: Collection[str] | None = None,
    parents: Sequence[str] | None = None,
    name: str | None = None,
    message: str = "",
    branch: str | None = None,
    arena: Arena | None = None,
) -> Captured:
    """Snapshot an engine, or some of its sequences.

    The engine is paused only while tables are read and pages are copied out; hashing, writing and committing come
    after `CachePager.resume`, which is called whatever happens.

    A page whose block hash is found in a parent's manifest, made under the same layout and numerics, is neither
    copied nor hashed: the engine promises that a block's bytes do not change, so it is the parent's page.

    Args:
        pager: the engine.
        repo: where to.
        sequences: ids to capture; ``None``: every sequence, and the pages kept only as prefix cache.
        parents: cids of the snapshots that the engine's state continues: what it checked out, or its last capture.
            ``None``: the tip of ``branch``, if there is one.
        name, message, branch: see `Repository.commit`.
        arena: reused buffer; the time to allocate one else falls into the call, not into the pause.

    Raises:
        NotFound: the engine has no sequence of an id.
        Conflict, StoreFull, …: see `Repository.commit` and `PageStore.put`; the engine goes on unharmed.
    """
    started = time.perf_counter()
    if parents is None:
        tip = repo.refs.read(RefKind.BRANCH, branch) if branch is not None else None
        parents = [tip.cid] if tip is not None and tip.cid is not None else []
    layout, numerics = pager.meta(), pager.numerics()
    known = _known_pages(repo, parents, layout, numerics)
    page_bytes = 2 * layout.page_bytes
    roomy = (len(pager.occupied_pages()) + 1) * page_bytes
    with (arena or Arena()).borrow(roomy) as buffer:
        paused = time.perf_counter()
        pager.pause()
        try:
            seqs = _choose(pager.logical_seqs(), sequences)
            ixs = pager.occupied_pages() if sequences is None else sorted({ix for seq in seqs for ix in seq.page_ixs})
            blocks = pager.page_blocks(ixs)
            new = [ix for ix, block in zip(ixs, blocks, strict=True) if block not in known]
            size = len(new) * page_bytes
            # the engine may have filled more pages between the estimate and the pause
            copied = buffer[:size] if size <= roomy else memoryview(bytearray(size))
            pager.read_pages(new, copied)
        finally:
            pager.resume()
            pause_s = time.perf_counter() - paused
        half = layout.page_bytes
        put = repo.put_pages([copied[i * half : (i + 1) * half] for i in range(2 * len(new))])
        halves = dict(zip(new, zip(put.digests[::2], put.digests[1::2], strict=True), strict=True))
    entries = (
        PageEntry(ix, *(halves[ix] if ix in halves else known[block]), block)
        for ix, block in zip(ixs, blocks, strict=True)
    )
    manifest = Manifest(layout, tuple(entries), tuple(seqs), numerics)
    snapshot = repo.commit([manifest], parents=parents, name=name, message=message, branch=branch)
    return Captured(snapshot, len(ixs), len(new), put.new_bytes, pause_s, time.perf_counter() - started)


def _choose(live: Sequence[LogicalSeq], wanted: Collection[str] | None) -> list[LogicalSeq]:
    if wanted is None:
        return list(live)
    by_id = {seq.id: seq for seq in live}
    missing = sorted(set(wanted) - by_id.keys())
    if missing:
        raise NotFound(f"the engine has no sequence {missing[0]!r}")
    return [by_id[name] for name in sorted(set(wanted))]


def _manifests(repo: Repository, cid: str) -> list[Manifest]:
    try:
        return repo.manifests(cid)
    except PrunedSnapshot:  # it can be continued, but has nothing left to share
        return []


def _known_pages(
    repo: Repository, parents: Sequence[str], layout: Layout, numerics: dict[str, object]
) -> dict[str | None, tuple[str, str]]:
    """Digests by block hash, from the parents' manifests, as far as the repository still has the pages whole."""
    known: dict[str | None, tuple[str, str]] = {}
    if parents:
        repo.pages.refresh()  # another process may have found a page damaged
    for parent in parents:
        for manifest in _manifests(repo, parent):
            if manifest.layout != layout or manifest.numerics != numerics:
                continue
            for page in manifest.pages:
                if page.block is not None and all(repo.pages.size(half) is not None for half in (page.k, page.v)):
                    known[page.block] = page.k, page.v
    return known
