"""Convert: a snapshot whose pages are those tokens in another layout. Plans, then applies.

Knows manifests, and repositories as places of pages. Must not know engines: a layout is all that is said of one.

What is made holds the same keys and values, bit by bit, but they are those that the first engine's kernels computed:
the other one would have computed others in their last bits. So the new snapshot says of itself that it was converted
(`kvist.pager.carry.CONVERTED`), a checkout of it is not bit-exact, and its parent is the snapshot it was made of.

Pages are read, moved and stored a window at a time. Nothing is named before all of them are stored: the snapshot is
committed last, and its branch moves with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from kvist.errors import Conflict, InvalidInput, LayoutMismatch, NotFound, PrunedSnapshot, UnsupportedModel
from kvist.ids import check_name, short
from kvist.layout import REPAGED, Layout
from kvist.pager.carry import carry, numerics
from kvist.pager.conversion import ConversionPlan, Converted
from kvist.pager.repage import Bytes, Repager, Run, runs_of
from kvist.repo import lease
from kvist.repo.manifest import LogicalSeq, Manifest, PageEntry, parse_json
from kvist.repo.refs import RefKind
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot, check_parts
from kvist.telemetry import operation

BRANCHES: Final = "converted/"
"""Branches of converted snapshots begin so, where none was named."""

WINDOW: Final = 64 << 20
"""Bytes of old and new pages together that are in hand at a time; converting takes about twice as much memory."""

Progress = Callable[[int, int], None]


# -- the layout that is wanted -----------------------------------------------------------------------------------


def layouts_of(data: bytes, what: str) -> list[Layout]:
    """The layouts in a JSON document: one layout, or an object with a list of them, ``layouts``, one a part.

    The latter is what an engine answers to ``GET /v1/processfork/layout``, and tells of a snapshot; a layout may come
    with its ``fingerprint``, which is compared.

    Raises:
        InvalidInput: neither; ``what`` says whose document it is.
    """
    document = parse_json(data, what)
    listed = document.get("layouts", [document])
    if not isinstance(listed, list) or not listed:
        raise InvalidInput(f"{what}: layouts must be a list of at least one layout, got {listed!r:.80}")
    return [_layout_of(fields, what) for fields in listed]


def _layout_of(fields: object, what: str) -> Layout:
    if not isinstance(fields, Mapping):
        raise InvalidInput(f"{what}: expected the fields of a layout, got {fields!r:.80}")
    layout = Layout.from_dict({name: value for name, value in fields.items() if name != "fingerprint"})
    if fields.get("fingerprint", layout.fingerprint) != layout.fingerprint:
        raise InvalidInput(f"{what}: expected fingerprint {layout.fingerprint}, got {fields['fingerprint']!r:.80}")
    return layout


def _first_rank(layouts: Sequence[Layout], of: str) -> Layout:
    """The layout of the first rank, of which all others follow.

    Raises:
        UnsupportedModel: anything but full attention of all layers in one group, or elements that mean nothing by
            themselves.
        LayoutMismatch: the ranks differ in more than their number.
    """
    for layout in layouts:
        if layout.attention != "full":
            raise UnsupportedModel(f"{of} holds {layout.attention} attention, only full attention can be converted")
        if layout.n_groups != 1:
            raise UnsupportedModel(f"{of} holds layers in {layout.n_groups} groups, expected all of them in one")
        if layout.dtype.startswith("fp8"):
            raise UnsupportedModel(f"{of} holds {layout.dtype}, whose scales are its engine's own and in no layout")
        if not layout.page_bytes:
            raise InvalidInput(f"{of}: its pages hold no bytes")
    ranks = {dataclasses.replace(layout, tp_rank=0) for layout in layouts}
    if len(ranks) > 1:
        raise LayoutMismatch(f"the ranks of {of} differ in their layouts")
    return ranks.pop()


# -- planning ----------------------------------------------------------------------------------------------------


def plan(repo: Repository, rev: str, wanted: Sequence[Layout], *, branch: str | None = None) -> ConversionPlan:
    """Look what a conversion would do. Reads no page.

    Args:
        repo: where the snapshot is, and the new one will be.
        rev: names it; see `Repository.resolve`.
        wanted: layouts of the other engine's parts; that of one rank is enough.
        branch: of the new snapshot; default ``converted/<short cid>``. One that exists moves if it names the source
            or what that continues.

    Raises:
        NotFound: no such snapshot, or it lacks a rank.
        UntrustedSnapshot: the repository has such a policy, and no trusted key signed it.
        PrunedSnapshot: its pages are gone.
        InvalidInput: it has that layout already, it has no sequences, or its manifests are in no order.
        Conflict: the branch names something else.
        LayoutMismatch: the layouts are not of one model, revision and dtype, or heads do not fit.
        UnsupportedModel: sliding or latent attention, several groups, fp8, or an order that only its engine can read.
    """
    snapshot = repo.snapshot(rev)
    repo.require_trusted(snapshot.cid)
    branch = check_name(BRANCHES + short(snapshot.cid) if branch is None else branch)
    of = f"snapshot {snapshot.cid}"
    ranks = repo.manifests(snapshot.cid)
    check_parts(ranks)  # a record that no commit of ours made may name them in any order
    source, target = ranks[0].layout, wanted[0]
    if other := {name: two for name, two in target.differences(source).items() if name not in REPAGED | {"group"}}:
        told = "; ".join(f"{name} {there!r} there, {here!r} wanted" for name, (there, here) in other.items())
        raise LayoutMismatch(f"{of} cannot be converted: {told}")
    source = _first_rank([rank.layout for rank in ranks], of)
    target = _first_rank(wanted, "the layout that is wanted")
    if source == target:
        raise InvalidInput(f"{of} has that layout already", hint="check it out as it is")
    if missing := sorted(set(range(source.tp_size)) - {rank.layout.tp_rank for rank in ranks}):
        raise NotFound(f"{of} lacks ranks {missing} of {source.tp_size}")
    Repager(source, target)  # refuses what cannot be
    tables = _Tables(ranks, of)
    sequences, lost = [], {}
    for number, seq in enumerate(ranks[0].sequences):
        made = tables.convert(number, target.page_size_tokens)
        state, texts = carry(seq)
        sequences.append(dataclasses.replace(made, state=state))
        if texts:
            lost[seq.id] = texts
    if not sequences:
        raise InvalidInput(f"{of} holds no sequences, only blocks of a prefix cache, whose tokens nobody knows")
    found = ConversionPlan(
        source=snapshot.cid,
        source_layout=source,
        layout=target,
        sources=tables.sources,
        runs=tables.runs,
        sequences=tuple(sequences),
        numerics=numerics(ranks[0].numerics, source),
        lost=lost,
        left_out=tables.left_out,
        branch=branch,
        name=snapshot.name,
    )
    existing = _existing(repo, found)
    return dataclasses.replace(found, existing=existing, mends=existing is not None and not _is_whole(repo, existing))


class _Tables:
    """The sequences' tables of pages, old and new. Pages that sequences share are shared again where they can be.

    Attributes:
        sources: the old pages, by number: one of each rank.
        runs: the new ones, by number.
    """

    def __init__(self, ranks: Sequence[Manifest], of: str) -> None:
        self._ranks, self._of = ranks, of
        self._entries = [{page.ix: page for page in rank.pages} for rank in ranks]
        self._numbers: dict[tuple[int, ...], int] = {}
        self._made: dict[Run, int] = {}
        if any(len(rank.sequences) != len(ranks[0].sequences) for rank in ranks):
            raise LayoutMismatch(f"the ranks of {of} hold different sequences")

    @property
    def sources(self) -> tuple[tuple[PageEntry, ...], ...]:
        """In the order of their numbers."""
        return tuple(
            tuple(entries[ix] for entries, ix in zip(self._entries, ixs, strict=True)) for ixs in self._numbers
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """In the order of their numbers."""
        return tuple(self._made)

    @property
    def left_out(self) -> int:
        """Pages of the first rank that no sequence names."""
        return len(self._entries[0].keys() - {ixs[0] for ixs in self._numbers})

    def convert(self, number: int, into: int) -> LogicalSeq:
        """Sequence ``number``, in pages of ``into`` tokens; its state is that of the first rank.

        Raises:
            LayoutMismatch: on another rank it is another one.
        """
        rows = [rank.sequences[number] for rank in self._ranks]
        seq, size = rows[0], self._ranks[0].layout.page_size_tokens
        tokens = seq.cached_tokens(size)
        if any((row.id, row.token_ids, row.cached_tokens(size)) != (seq.id, seq.token_ids, tokens) for row in rows):
            raise LayoutMismatch(f"the ranks of {self._of} hold different sequences: {[row.id for row in rows]!r:.200}")
        table = [
            self._numbers.setdefault(ixs, len(self._numbers))
            for ixs in zip(*(row.page_ixs for row in rows), strict=True)
        ]
        runs = runs_of(table, tokens, size=size, into=into)
        ixs = tuple(self._made.setdefault(run, len(self._made)) for run in runs)
        return LogicalSeq(seq.id, ixs, tokens % into, seq.token_ids)


def _existing(repo: Repository, plan: ConversionPlan) -> str | None:
    """The tip of the plan's branch, if that is what the plan would make.

    Raises:
        Conflict: it is something else, and nothing that the source continues.
    """
    tip = repo.refs.read(RefKind.BRANCH, plan.branch)
    if tip is None or tip.cid is None:
        return None
    if repo.snapshot(tip.cid).parents == (plan.source,) and _is_made(repo, plan, tip.cid):
        return tip.cid
    if tip.cid not in repo.reachable([plan.source]):
        raise Conflict(
            f"branch {plan.branch} names {tip.cid}, which {plan.source} does not continue",
            hint="say --as BRANCH, with another branch",
        )
    return None


def _is_made(repo: Repository, plan: ConversionPlan, cid: str) -> bool:
    """Whether a snapshot says what the plan's would."""
    try:
        ranks = repo.manifests(cid)
    except PrunedSnapshot:
        return False
    return [rank.layout for rank in ranks] == _ranks_of(plan.layout) and all(
        (rank.sequences, rank.numerics) == (plan.sequences, plan.numerics) for rank in ranks
    )


def _is_whole(repo: Repository, cid: str) -> bool:
    return all(repo.pages.size(digest) is not None for rank in repo.manifests(cid) for digest in rank.digests)


# -- applying ----------------------------------------------------------------------------------------------------


def apply(
    repo: Repository, plan: ConversionPlan, *, window: int = WINDOW, progress: Progress | None = None
) -> Converted:
    """Make the snapshot of a plan. A gc beside it takes neither the source nor what was made of it so far.

    Args:
        repo: that of the plan.
        plan: from `plan`.
        window: bytes of pages in hand at a time; at least those of one new page, whatever it says.
        progress: called with bytes of new pages that are stored, and of all of them.

    Raises:
        MissingPage, DamagedPage: a page of the source cannot be had; no snapshot was made.
        Conflict: the branch moved meanwhile, or a gc took the source before this began; retry.
        StoreFull, …: see `Repository.commit`.
    """
    if plan.existing is not None and not plan.mends:
        return Converted(plan.existing, 0)
    with operation("convert", cid=plan.source) as told, lease.hold(repo, cids=[plan.source], since=True) as held:
        repager, done, new_bytes = plan.repager, 0, 0
        entries: list[list[PageEntry]] = [[] for _ in range(plan.layout.tp_size)]
        for runs in _windows(plan, repager, window):
            made = _make(repo, plan, repager, runs)
            flat = made.reshape(-1, plan.layout.page_bytes)
            put = repo.put_pages([half.data for half in flat])
            held.renew()
            names = iter(put.digests)
            for pages in entries:
                pages += [PageEntry(len(pages) + n, next(names), next(names)) for n in range(len(runs))]
            done, new_bytes = done + flat.nbytes, new_bytes + put.new_bytes
            if progress is not None:
                progress(done, plan.made_bytes)
        cid = plan.existing if plan.existing is not None else _commit(repo, plan, entries).cid
        told.add(nbytes=new_bytes, pages=2 * len(plan.runs) * plan.layout.tp_size)
    return Converted(cid, new_bytes)


def _commit(repo: Repository, plan: ConversionPlan, entries: Sequence[Sequence[PageEntry]]) -> Snapshot:
    layouts = _ranks_of(plan.layout)
    return repo.commit(
        [_manifest(plan, layout, pages) for layout, pages in zip(layouts, entries, strict=True)],
        parents=[plan.source],
        name=plan.name,
        message=f"converted from {short(plan.source)}, not bit-exact: {plan.summary}",
        branch=plan.branch,
    )


def _ranks_of(layout: Layout) -> list[Layout]:
    return [dataclasses.replace(layout, tp_rank=rank) for rank in range(layout.tp_size)]


def _manifest(plan: ConversionPlan, layout: Layout, pages: Iterable[PageEntry]) -> Manifest:
    return Manifest(layout, tuple(pages), plan.sequences, plan.numerics)


def _windows(plan: ConversionPlan, repager: Repager, most: int) -> Iterator[Sequence[Run]]:
    """New pages, in order, of which the bytes are ``most`` together with the old ones that they are made of."""
    old, new = (
        2 * plan.source_layout.page_bytes * len(repager.ranks),
        2 * plan.layout.page_bytes * plan.layout.tp_size,
    )
    start, needed, size = 0, set[int](), 0
    for number, run in enumerate(plan.runs):
        more = new + old * len(set(run.sources) - needed)
        if size and size + more > most:
            yield plan.runs[start:number]
            start, needed, size = number, set(), 0
            more = new + old * len(run.sources)
        needed.update(run.sources)
        size += more
    if start < len(plan.runs):
        yield plan.runs[start:]


def _make(repo: Repository, plan: ConversionPlan, repager: Repager, runs: Sequence[Run]) -> Bytes:
    """New pages, ``[tp_size, len(runs), 2, page_bytes]``, of old ones that are read now."""
    needed = {source: place for place, source in enumerate(dict.fromkeys(s for run in runs for s in run.sources))}
    pages = np.empty((len(repager.ranks), len(needed), 2, plan.source_layout.page_bytes), dtype=np.uint8)
    entries = [plan.sources[source][rank] for rank in repager.ranks for source in needed]
    digests = [digest for entry in entries for digest in (entry.k, entry.v)]
    outs = [half.data for half in pages.reshape(-1, plan.source_layout.page_bytes)]
    repo.get_pages(digests, outs)
    placed = [dataclasses.replace(run, sources=tuple(needed[source] for source in run.sources)) for run in runs]
    return repager.repage(pages, placed)
