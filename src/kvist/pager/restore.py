"""Restore: from a snapshot in a repository to pages and sequences in a running engine.

Knows the `CachePager` contract and the repository's. Must not know which engine it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kvist.errors import NotFound
from kvist.layout import Layout
from kvist.pager.arena import Arena
from kvist.pager.base import CachePager
from kvist.pager.carry import apart
from kvist.repo.manifest import LogicalSeq, Manifest, PageEntry
from kvist.repo.repository import Repository


@dataclass(frozen=True, slots=True)
class Restored:
    """Result of a restore.

    Attributes:
        cid: the snapshot.
        sequences: ids under which its sequences are now in the engine.
        tokens: tokens whose KV became reachable.
        pages: pages it holds.
        pages_loaded: of those, read, verified and written into the engine; the others were already there.
        same_numerics: whether the engine computes as the one that made the snapshot; if not, what follows may differ
            in its last bits.
        pause_s: seconds for which the engine stood still.
        total_s: seconds in all.
    """

    cid: str
    sequences: tuple[str, ...]
    tokens: int
    pages: int
    pages_loaded: int
    same_numerics: bool
    pause_s: float
    total_s: float


def restore(
    pager: CachePager,
    repo: Repository,
    rev: str,
    *,
    sequences: Collection[str] | None = None,
    rename: Callable[[str], str] = lambda sequence_id: sequence_id,
    arena: Arena | None = None,
) -> Restored:
    """Put a snapshot's pages and sequences into an engine, beside whatever it is doing. All or nothing.

    Pages the engine already holds, by block hash, are shared. The others are read and verified while the engine
    runs; it is paused to look up the former and to write the latter.

    Pages that were computed under other numerics are not those of the engine's blocks, equal tokens or not: they are
    not shared with these, they bring no block hash, and their sequences say so (`kvist.pager.carry.NUMERICS`).

    Args:
        pager: the engine, or one group of one rank of it; its layout must equal that of one of the snapshot's
            manifests, which is then the one that is restored.
        repo: where from.
        rev: see `Repository.resolve`.
        sequences: ids to restore; ``None``: all, and the pages that were kept only as prefix cache.
        rename: gives each sequence the id it gets in the engine.
        arena: reused buffer.

    Raises:
        LayoutMismatch: the pages do not fit this engine.
        NotFound: no such snapshot, or no sequence of an id in it.
        UntrustedSnapshot: the repository has such a policy, and no trusted key signed it.
        MissingPage, DamagedPage: a page cannot be had; the engine is as it was.
        PoolExhausted, Conflict: too few free slots, or an id is taken or given twice; the engine is as it was.
    """
    started = time.perf_counter()
    cid = repo.resolve(rev)
    repo.require_trusted(cid)
    layout = pager.meta()
    manifest = _manifest_for(repo, cid, layout)
    same_numerics = dict(manifest.numerics) == pager.numerics()
    seqs = _choose(manifest, cid, sequences)
    if not same_numerics:
        seqs = [apart(seq, manifest.numerics) for seq in seqs]
    needed = {ix for seq in seqs for ix in seq.page_ixs}
    pages = [page for page in manifest.pages if sequences is None or page.ix in needed]
    blocks = {page.ix: page.block if same_numerics else None for page in pages}
    clock = _PauseClock(pager)
    with clock.paused():
        shared = pager.share_pages([blocks[page.ix] for page in pages])
    held = [ix for ix in shared if ix is not None]
    missing = [page for page, ix in zip(pages, shared, strict=True) if ix is None]
    try:
        with (arena or Arena()).borrow(2 * layout.page_bytes * len(missing)) as buffer:
            _read(repo, missing, layout.page_bytes, buffer)
            with clock.paused():
                slots = pager.allocate_pages(len(missing))
                held += slots
                pager.write_pages(slots, buffer, [blocks[page.ix] for page in missing])
                fresh = iter(slots)
                place = {page.ix: next(fresh) if ix is None else ix for page, ix in zip(pages, shared, strict=True)}
                installed = [
                    replace(seq, id=rename(seq.id), page_ixs=tuple(place[ix] for ix in seq.page_ixs)) for seq in seqs
                ]
                pager.install_logical_seqs(installed)
    except BaseException:
        with clock.paused():
            pager.release_pages(held)
        raise
    return Restored(
        cid=cid,
        sequences=tuple(seq.id for seq in installed),
        tokens=replace(manifest, pages=tuple(pages), sequences=tuple(seqs)).tokens,
        pages=len(pages),
        pages_loaded=len(missing),
        same_numerics=same_numerics,
        pause_s=clock.seconds,
        total_s=time.perf_counter() - started,
    )


def _manifest_for(repo: Repository, cid: str, layout: Layout) -> Manifest:
    """The manifest of the engine's rank and group, refused unless its layout is the engine's."""
    manifests = repo.manifests(cid)
    for manifest in manifests:
        if manifest.layout == layout:
            return manifest
    nearest = max(
        (manifest.layout for manifest in manifests),
        key=lambda other: (other.tp_rank == layout.tp_rank, other.group == layout.group),
    )
    layout.require(nearest, of=f"snapshot {cid}", into="the engine")
    raise AssertionError("a layout that is not equal differs in a field")


def _choose(manifest: Manifest, cid: str, wanted: Collection[str] | None) -> list[LogicalSeq]:
    if wanted is None:
        return list(manifest.sequences)
    found = [(name, manifest.sequence(name)) for name in sorted(set(wanted))]
    for name, seq in found:
        if seq is None:
            raise NotFound(f"snapshot {cid} has no sequence {name!r}")
    return [seq for _, seq in found if seq is not None]


def _read(repo: Repository, pages: list[PageEntry], half: int, buffer: memoryview) -> None:
    digests = [digest for page in pages for digest in (page.k, page.v)]
    repo.get_pages(digests, [buffer[i * half : (i + 1) * half] for i in range(len(digests))])


class _PauseClock:
    """Pauses an engine, and adds up for how long."""

    def __init__(self, pager: CachePager) -> None:
        self._pager = pager
        self.seconds = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.perf_counter()
        self._pager.pause()
        try:
            yield
        finally:
            self._pager.resume()
            self.seconds += time.perf_counter() - started
