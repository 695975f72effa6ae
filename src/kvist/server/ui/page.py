"""What the page shows, read from a repository and an engine, each at its own rate. Must not know HTTP or templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from kvist.errors import KvistError, PrunedSnapshot
from kvist.layout import Layout
from kvist.repo import Ref, Repository, Snapshot
from kvist.repo.stats import Stats, count
from kvist.server.aged import Aged, Reading
from kvist.server.history import sequence_record
from kvist.server.tiers import Flow, Tier, page_tiers, store_tier
from kvist.server.ui import figures
from kvist.server.ui.engine import EngineSide
from kvist.server.ui.graph import Canvas
from kvist.server.ui.lineage import Facts, Tree, Weigher, read_tree, title

if TYPE_CHECKING:
    from kvist.server.ui.curves import Drawing  # NumPy, which not every server has

_TREE_S: Final = 2.0
_SPACE_S: Final = 30.0
_CURVES_S: Final = 20.0
"""Seconds between two readings, at least."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the lineage.

    Attributes:
        cid, title, tokens, created_ns: of the snapshot.
        svg: its part of the graph.
        refs: that name it.
        is_pruned: whether only the record is kept.
        facts: ``None``: it was pruned, or its manifest cannot be read.
    """

    cid: str
    title: str
    tokens: int
    created_ns: int
    svg: Markup
    refs: Sequence[Ref]
    is_pruned: bool
    facts: Facts | None


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at the top.

    Attributes:
        name, value, unit: what it says.
        means: what is counted.
    """

    name: str
    value: str
    means: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One manifest of a snapshot.

    Attributes:
        layout: of its pages.
        pages: how many.
    """

    layout: Layout
    pages: int


@dataclass(frozen=True, slots=True)
class Detail:
    """One snapshot, whole.

    Attributes:
        snapshot: the record.
        title: one line for it.
        refs: that name it.
        is_pruned: whether only the record is kept.
        facts: ``None``: it was pruned, or a manifest cannot be read.
        parents, children: as far as they can be read.
        sequences: see `kvist.server.history.sequence_record`.
        layouts: by rank and group.
        trouble: why it is not whole.
    """

    snapshot: Snapshot
    title: str
    refs: Sequence[Ref]
    is_pruned: bool
    facts: Facts | None
    parents: Sequence[Link]
    children: Sequence[Link]
    sequences: Sequence[dict[str, Any]]
    layouts: Sequence[Layer]
    trouble: KvistError | None


@dataclass(frozen=True, slots=True)
class Link:
    """Another snapshot."""

    cid: str
    title: str


class Page:
    """See the module. Thread-safe; every method may read the store.

    Attributes:
        repo: what is shown.
        engine: ``None``: there is none here.
        tree, space: what is read of the repository, and how old it is.
        curves: drawn; ``None``: there is no traffic to draw them of.
        may_write: whether anybody may change anything by way of the page.
    """

    def __init__(
        self,
        repo: Repository,
        *,
        flow: Flow | None,
        engine: EngineSide | None = None,
        trace: Path | None = None,
        may_write: bool = False,
    ) -> None:
        """
        Args:
            repo: what is shown; not closed.
            flow: records what goes to and from its store; ``None``: not to be shown.
            engine: in front of it.
            trace: whose curves are drawn, where there is no engine.
            may_write: whether forms are offered.
        """
        self.repo, self.engine, self.may_write = repo, engine, may_write
        self.tree: Aged[Tree] = Aged(lambda: read_tree(repo), least_s=_TREE_S)
        self.space: Aged[Stats] = Aged(lambda: count(repo), least_s=_SPACE_S)
        self._curves: Aged[Drawing | None] = Aged(self._draw, least_s=_CURVES_S)
        self._trace, self._flow = trace, flow
        self._weigher = Weigher(repo)

    @property
    def about(self) -> str:
        """Whose page it is, in a line."""
        serving = f"{self.engine.name} · " if self.engine is not None else ""
        return f"{serving}{self.repo.store.url}"

    @property
    def name(self) -> str:
        """The same, in a word."""
        return self.repo.store.url.rstrip("/").rpartition("/")[2] or self.repo.store.url

    # -- lineage --------------------------------------------------------------------------------------------------

    def lines(self, tree: Tree, start: int, count: int) -> list[Line]:
        """Rows of the lineage, as they are drawn."""
        shown = tree.rows[start : start + count]
        canvas = Canvas.of(shown)
        return [self._line(tree, canvas, row) for row in shown]

    def _line(self, tree: Tree, canvas: Canvas, row: Any) -> Line:
        snapshot = tree.snapshots[row.cid]
        refs = tree.refs.get(row.cid, ())
        what = title(snapshot)
        svg = canvas.draw(row, tree.parents, is_head=bool(refs), label=f"snapshot {what}")
        is_pruned = row.cid in tree.pruned
        facts = None if is_pruned else self._facts(snapshot)
        return Line(row.cid, what, snapshot.tokens, snapshot.created_ns, svg, refs, is_pruned, facts)

    def _facts(self, snapshot: Snapshot) -> Facts | None:
        try:
            return self._weigher.weigh(snapshot)
        except KvistError:
            return None  # its page says why

    def detail(self, rev: str) -> Detail:
        """One snapshot.

        Raises:
            NotFound, InvalidInput, …: there is no such snapshot, or its record cannot be read.
        """
        snapshot = self.repo.snapshot(rev)
        tree = self.tree.fresh().value
        trouble: KvistError | None = None
        is_pruned = tree is not None and snapshot.cid in tree.pruned
        manifests = []
        try:
            if is_pruned:
                raise PrunedSnapshot("it was pruned: the record is kept, its pages need not be there")
            manifests = self.repo.manifests(snapshot.cid)
        except KvistError as error:
            trouble = error
        return Detail(
            snapshot=snapshot,
            title=title(snapshot),
            refs=tree.refs.get(snapshot.cid, ()) if tree is not None else (),
            is_pruned=is_pruned,
            facts=None if is_pruned else self._facts(snapshot),
            parents=list(self._links(snapshot.parents)),
            children=list(self._links(tree.children.get(snapshot.cid, ()) if tree is not None else ())),
            sequences=[sequence_record(seq, manifests[0]) for seq in manifests[0].sequences] if manifests else [],
            layouts=[Layer(manifest.layout, len(manifest.pages)) for manifest in manifests],
            trouble=trouble,
        )

    def _links(self, cids: Iterable[str]) -> Iterator[Link]:
        for cid in cids:
            try:
                yield Link(cid, title(self.repo.objects.snapshot(cid)))
            except KvistError:
                yield Link(cid, "cannot be read")

    # -- the other panels -----------------------------------------------------------------------------------------

    def tiles(self, tree: Tree | None, stats: Stats | None) -> list[Tile]:
        """The figures at the top."""
        found = []
        if tree is not None:
            names = f"{figures.count(tree.branches)} branches and {figures.count(tree.tags)} tags reach them"
            found.append(Tile("snapshots", figures.count(len(tree.snapshots)), f"immutable records; {names}"))
            found.append(Tile("branches", figures.count(tree.branches), "movable names of snapshots"))
            found.append(Tile("tags", figures.count(tree.tags), "names that never move"))
        if stats is not None:
            logical = "pages of all snapshots that refs reach, as if each had its own"
            found.append(_tile_of_bytes("logical", stats.logical_bytes, logical))
            stored = "everything in the store"
            found.append(_tile_of_bytes("stored", stats.stored_bytes, stored))
            found.append(Tile("dedup", figures.times(stats.dedup), "logical bytes over distinct bytes of pages"))
        if self.engine is not None:
            requests = self.engine.recent.requests()
            prompt, cached = (
                sum(getattr(one, name) for one in requests) for name in ("prompt_tokens", "cached_tokens")
            )
            means = f"of the last {len(requests)} requests' {figures.count(prompt)} prompt tokens, found in the cache"
            found.append(Tile("from cache", figures.percent(cached / prompt) if prompt else "–", means))
        return found

    def tiers(self) -> list[Tier]:
        """From the engine's pool down to the store."""
        upper = self.engine.tiers() if self.engine is not None else ()
        return [*upper, *page_tiers(self.repo), store_tier(self.repo, self._flow)]

    def curves(self) -> Reading[Drawing | None] | None:
        """Hit curves; ``None``: they are not drawn yet."""
        return self._curves.peek()

    def _draw(self) -> Drawing | None:
        try:
            from kvist.server.ui import curves
            from kvist.sim.trace import read_trace
        except ModuleNotFoundError as error:
            raise KvistError(
                f"the curves need the Python package {error.name}", hint="pip install 'kvist[sim]'"
            ) from None
        engine = self.engine
        if engine is not None and (trace := curves.trace_of(engine.recent)) is not None:
            return curves.draw(trace, capacity=engine.pool_blocks, block_bytes=engine.block_bytes)
        return curves.draw(read_trace(self._trace)) if self._trace is not None else None

    # -- acts -----------------------------------------------------------------------------------------------------

    def fork(self, rev: str, n: int, name: str | None) -> list[str]:
        """Fork a snapshot; the new branches."""
        try:
            return [str(fork.name) for fork in self.repo.fork(rev, n, name=name)]
        finally:
            self.tree.expire()

    def tag(self, rev: str, name: str) -> None:
        """Tag a snapshot."""
        try:
            self.repo.tag(name, rev)
        finally:
            self.tree.expire()


def _tile_of_bytes(name: str, size: int, means: str) -> Tile:
    value, _, unit = figures.nbytes(size).partition(" ")
    return Tile(name, value, f"{means}: {figures.count(size)} bytes", unit)
