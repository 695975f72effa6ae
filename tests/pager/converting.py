"""Snapshots of known elements, written and read one by one: a plain reference for what a conversion must do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvist.layout import DTYPE_BYTES, Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository, Snapshot
from kvist.store import Store

LAYOUT = Layout(page_size_tokens=4, n_layers=2, n_heads=2, head_dim=4, dtype="bf16", model="org/m", revision="r1")
ORDERS = {
    "LNHD": ("layer token head dim", "layer token head dim"),
    "LHND": ("layer head token dim", "layer head token dim"),
    "vllm-cpu-vec": ("layer head dim token", "layer head token dim"),
    "vllm-cpu-vec16": ("layer head dim token", "layer head token dim"),
}
WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}

Elements = NDArray[Any]
"""``[2, layers, tokens, heads of the model, head_dim]``."""


def place(layout: Layout, half: int, layer: int, row: int, head: int, dim: int) -> int:
    """Where an element is in its half of a page, counted in elements."""
    sizes = {"layer": layout.n_layers, "token": layout.page_size_tokens, "head": layout.n_heads, "dim": layout.head_dim}
    at = {"layer": layer, "token": row, "head": head, "dim": dim}
    found = 0
    for axis in ORDERS[layout.memory_order][half].split():
        found = found * sizes[axis] + at[axis]
    return found


def heads_on(heads: int, tp_size: int, rank: int) -> list[int]:
    """Heads of the model that a rank holds."""
    if heads >= tp_size:
        return list(range(heads))[rank * heads // tp_size : (rank + 1) * heads // tp_size]
    return [rank * heads // tp_size]


def ranks_of(layout: Layout, heads: int, tp_size: int) -> list[Layout]:
    """The layout on each of so many ranks."""
    each = len(heads_on(heads, tp_size, 0))
    return [dataclasses.replace(layout, n_heads=each, tp_size=tp_size, tp_rank=rank) for rank in range(tp_size)]


def page(layout: Layout, heads: int, elements: Elements, first: int) -> list[bytes]:
    """K and V of the page that begins with token ``first``; rows past the last token are zeros."""
    halves = []
    for half in range(2):
        out = np.zeros(layout.page_bytes // DTYPE_BYTES[layout.dtype], dtype=WORDS[DTYPE_BYTES[layout.dtype]])
        mine = heads_on(heads, layout.tp_size, layout.tp_rank)
        rows = range(min(layout.page_size_tokens, elements.shape[2] - first))
        for layer, row, (number, head), dim in itertools.product(
            range(layout.n_layers), rows, enumerate(mine), range(layout.head_dim)
        ):
            out[place(layout, half, layer, row, number, dim)] = elements[half, layer, first + row, head, dim]
        halves.append(out.tobytes())
    return halves


def read(repo: Repository, manifest: Manifest, seq: LogicalSeq, heads: int, out: Elements) -> None:
    """Put what one rank holds of a sequence into ``out``, element by element."""
    layout, entries = manifest.layout, {entry.ix: entry for entry in manifest.pages}
    mine = heads_on(heads, layout.tp_size, layout.tp_rank)
    for number, ix in enumerate(seq.page_ixs):
        first = number * layout.page_size_tokens
        rows = range(min(layout.page_size_tokens, out.shape[2] - first))
        for half, digest in enumerate((entries[ix].k, entries[ix].v)):
            got = np.frombuffer(repo.pages.get(digest), dtype=WORDS[DTYPE_BYTES[layout.dtype]])
            for layer, row, (at, head), dim in itertools.product(
                range(layout.n_layers), rows, enumerate(mine), range(layout.head_dim)
            ):
                out[half, layer, first + row, head, dim] = got[place(layout, half, layer, row, at, dim)]


@dataclass(frozen=True)
class Grown:
    """A sequence: its tokens, of which the first may be those of another, whose pages it shares.

    Attributes:
        tokens: cached ones.
        like: number of an earlier sequence, or ``None``.
        shared: whole pages of it that this one begins with.
    """

    tokens: int
    like: int | None = None
    shared: int = 0


class Made:
    """A snapshot in a repository, and the elements of its sequences."""

    def __init__(
        self,
        repo: Repository,
        layouts: Sequence[Layout],
        heads: int,
        grown: Sequence[Grown],
        *,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
        numerics: Mapping[str, Any] | None = None,
        loose: int = 0,
        branch: str = "main",
    ) -> None:
        draw = np.random.default_rng(seed)
        layout, size = layouts[0], layouts[0].page_size_tokens
        top = 2 ** (8 * DTYPE_BYTES[layout.dtype])
        self.heads, self.elements = heads, list[Elements]()
        tables: list[list[int]] = []
        halves: list[list[bytes]] = [[] for _ in layouts]
        for one in grown:
            shape = (2, layout.n_layers, one.tokens, heads, layout.head_dim)
            elements = draw.integers(1, top, shape).astype(WORDS[DTYPE_BYTES[layout.dtype]])
            shared = min(one.shared, one.tokens // size)
            if one.like is not None:
                shared = min(shared, self.elements[one.like].shape[2] // size)
                elements[:, :, : shared * size] = self.elements[one.like][:, :, : shared * size]
            table = tables[one.like][:shared] if one.like is not None else []
            for first in range(len(table) * size, one.tokens, size):
                table.append(len(halves[0]) // 2)
                for rank, pages in zip(layouts, halves, strict=True):
                    pages += page(rank, heads, elements, first)
            tables.append(table)
            self.elements.append(elements)
        for rank, pages in zip(layouts, halves, strict=True):
            pages += [draw.bytes(rank.page_bytes) for _ in range(2 * loose)]
        self.sequences = tuple(
            LogicalSeq(
                f"s{number:02}",
                tuple(3 * ix + 1 for ix in table),
                one.tokens % size,
                tuple(range(number, number + one.tokens + 1)),
                dict(state or {}),
            )
            for number, (one, table) in enumerate(zip(grown, tables, strict=True))
        )
        manifests = []
        for rank, pages in zip(layouts, halves, strict=True):
            digests = repo.put_pages(pages).digests
            entries = [PageEntry(3 * n + 1, *digests[2 * n : 2 * n + 2]) for n in range(len(pages) // 2)]
            manifests.append(Manifest(rank, tuple(entries), self.sequences, numerics or {}))
        self.snapshot: Snapshot = repo.commit(manifests, branch=branch, name="story")

    def require(self, repo: Repository, cid: str) -> None:
        """Every element of every sequence is in a snapshot, on every rank that holds it."""
        for manifest in repo.manifests(cid):
            mine = heads_on(self.heads, manifest.layout.tp_size, manifest.layout.tp_rank)
            assert [seq.id for seq in manifest.sequences] == [seq.id for seq in self.sequences]
            for seq, old, elements in zip(manifest.sequences, self.sequences, self.elements, strict=True):
                found = np.zeros_like(elements)
                assert seq.cached_tokens(manifest.layout.page_size_tokens) == elements.shape[2]
                assert seq.token_ids == old.token_ids
                read(repo, manifest, seq, self.heads, found)
                assert np.array_equal(found[:, :, :, mine], elements[:, :, :, mine])


def flip_page(store: Store, digest: str) -> None:
    """Flip a bit of the stored page, behind the repository's back."""
    with Repository.open(store) as repo:
        (key,) = repo.pages.homes(digest)
        segment = next(one for one in repo.pages.segments() if one.key == key)
        start, _ = segment.span(repo.pages.names(segment).index(digest))
    data = bytearray(store.get(key))
    data[start] ^= 1
    store.put(key, bytes(data))
