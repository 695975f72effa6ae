"""Repage: the same keys and values in pages of another layout. Pure: bytes in, bytes out.

Knows page sizes, memory orders and how heads are dealt out to ranks. Must not know repositories or sequences, nor what
an element means: elements are moved as bits, so that every value, not a number included, arrives as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvist.errors import LayoutMismatch
from kvist.layout import DTYPE_BYTES, Layout
from kvist.pager.orders import axes_of, shape_of
from kvist.pager.sharding import rank_heads

Bytes = NDArray[np.uint8]

_WORDS: Final[dict[int, type[np.unsignedinteger[Any]]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True)
class Run:
    """What a new page is made of. Equal runs make equal pages.

    Attributes:
        sources: numbers of the old pages that hold its tokens, in token order.
        skip: tokens of the first of them that come before.
        rows: tokens that it holds, from its first row on; its other rows are zeros.
    """

    sources: tuple[int, ...]
    skip: int
    rows: int


def runs_of(table: Sequence[int], tokens: int, *, size: int, into: int) -> Iterator[Run]:
    """The pages that a sequence has in the new layout, in token order.

    Args:
        table: numbers of its old pages, in token order.
        tokens: that are in them, from the first on.
        size: tokens of an old page.
        into: tokens of a new one.
    """
    for start in range(0, tokens, into):
        end = min(start + into, tokens)
        yield Run(tuple(table[start // size : -(-end // size)]), start % size, end - start)


def heads_of(source: Layout, target: Layout) -> int:
    """How many KV heads the ranks of both layouts hold between them.

    A rank with one head may hold a copy of its neighbour's, so one layout alone does not always tell. Where neither
    does and both have as many ranks, rank goes to rank, and it does not matter.

    Raises:
        LayoutMismatch: they cannot be of one model, or do not tell which of several numbers it is.
    """
    if (source.n_heads, source.tp_size) == (target.n_heads, target.tp_size):
        return source.n_heads * source.tp_size
    common = sorted(_possible_heads(source) & _possible_heads(target))
    if len(common) == 1:
        return common[0]
    told = (
        f"{source.n_heads} KV heads on each of {source.tp_size} ranks there, "
        f"{target.n_heads} on each of {target.tp_size} wanted"
    )
    if not common:
        raise LayoutMismatch(f"the heads of the two layouts are not those of one model: {told}")
    raise LayoutMismatch(
        f"whether the model has {' or '.join(map(str, common))} KV heads decides which rank holds which: {told}",
        hint="convert it to the layout of one rank first, which says how many there are",
    )


def _possible_heads(layout: Layout) -> set[int]:
    """How many KV heads a model may have, of which each rank holds so many."""
    if layout.n_heads != 1:
        return {layout.n_heads * layout.tp_size}
    return {count for count in range(1, layout.tp_size + 1) if layout.tp_size % count == 0}


class Repager:
    """From the pages of one layout, all its ranks together, to those of another.

    Attributes:
        ranks: of the old layout that must be read: where ranks hold copies of one another's heads, not all.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        """
        Args:
            source: of the old pages; any rank's.
            target: of the new ones; differs from it in fields of `kvist.layout.REPAGED` only.

        Raises:
            UnsupportedModel: a memory order that only its engine can read.
            LayoutMismatch: the heads do not fit; see `heads_of`.
        """
        self._source, self._target = source, target
        self._axes = axes_of(source, "the source"), axes_of(target, "the layout that is wanted")
        self._heads = heads_of(source, target)
        self._word = _WORDS[DTYPE_BYTES[source.dtype]]
        first = {rank_heads(self._heads, source.tp_size, rank): rank for rank in reversed(range(source.tp_size))}
        self.ranks: Final = tuple(sorted(first.values()))

    def repage(self, pages: Bytes, runs: Sequence[Run]) -> Bytes:
        """Make new pages.

        Args:
            pages: ``[len(ranks), pages, 2, source.page_bytes]``: the old pages by rank, K and V of each; only read.
            runs: what to make, in which a source ``n`` is ``pages[:, n]``.

        Returns:
            ``[target.tp_size, len(runs), 2, target.page_bytes]``, the caller's own.
        """
        count, size = pages.shape[1], self._source.page_size_tokens
        ranks, layout = self._target.tp_size, self._target
        index = self._rows(runs, nothing=count * size)
        made = np.empty((ranks, len(runs), 2, layout.page_bytes), dtype=np.uint8)
        # one row more than there are tokens: the zeros with which a page ends
        whole = np.empty((count * size + 1, layout.n_layers, self._heads, layout.head_dim), dtype=self._word)
        whole[-1] = 0
        old = whole[:-1].reshape(count, size, *whole.shape[1:])
        for half in range(2):
            for place, rank in enumerate(self.ranks):
                heads = rank_heads(self._heads, self._source.tp_size, rank)
                old[:, :, :, heads.start : heads.stop] = self._tokens(pages[place, :, half], half, is_target=False)
            tokens = whole[index]
            for rank in range(ranks):
                heads = rank_heads(self._heads, ranks, rank)
                self._tokens(made[rank, :, half], half, is_target=True)[...] = tokens[:, :, :, heads.start : heads.stop]
        return made

    def _tokens(self, halves: Bytes, half: int, *, is_target: bool) -> NDArray[np.unsignedinteger[Any]]:
        """Halves of pages, ``[pages, page_bytes]``, as ``[pages, tokens, layers, heads, head_dim]``; a view."""
        layout, axes = (self._target if is_target else self._source), self._axes[is_target][half]
        shaped = halves.view(self._word).reshape(len(halves), *shape_of(layout, axes))
        return shaped.transpose(0, *(1 + axes.index(axis) for axis in "NLHD"))

    def _rows(self, runs: Sequence[Run], *, nothing: int) -> NDArray[np.intp]:
        """For each token of each new page the row that it is among those of all old ones, or ``nothing``."""
        size = self._source.page_size_tokens
        index = np.full((len(runs), self._target.page_size_tokens), nothing, dtype=np.intp)
        for number, run in enumerate(runs):
            rows = np.arange(run.skip, run.skip + run.rows)
            index[number, : run.rows] = np.asarray(run.sources)[rows // size] * size + rows % size
        return index
