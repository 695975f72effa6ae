"""Conversions: what one would do, and what came of it. Plain values; knows no repository."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvist.layout import Layout
from kvist.pager.repage import Repager, Run
from kvist.repo.manifest import LogicalSeq, PageEntry


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion would do.

    Attributes:
        source: cid of the snapshot.
        source_layout, layout: of its pages and of the new ones, each of the first rank.
        sources: its pages that sequences name, each by rank; a run's sources are indices of this.
        runs: what each new page is made of, by ``ix``.
        sequences: as the new snapshot will hold them.
        numerics: as its manifests will.
        lost: what of a sequence does not go on, by its id; those of which all does are not in it.
        left_out: pages that no sequence names: blocks of a prefix cache, whose tokens nobody knows.
        branch: where it goes.
        name: what the source is called, and so the new one.
        existing: cid of the branch's tip, where that is this very conversion already.
        mends: some of its pages are missing or known to be damaged: they are made anew, and nothing else is done.
    """

    source: str
    source_layout: Layout
    layout: Layout
    sources: tuple[tuple[PageEntry, ...], ...]
    runs: tuple[Run, ...]
    sequences: tuple[LogicalSeq, ...]
    numerics: Mapping[str, Any]
    lost: Mapping[str, list[str]]
    left_out: int
    branch: str
    name: str | None
    existing: str | None = None
    mends: bool = False

    @property
    def repager(self) -> Repager:
        """What moves the bytes."""
        return Repager(self.source_layout, self.layout)

    @property
    def read_bytes(self) -> int:
        """Bytes of pages that are read, at least: one that lies across two windows is read for each."""
        return len(self.sources) * 2 * self.source_layout.page_bytes * len(self.repager.ranks)

    @property
    def made_bytes(self) -> int:
        """Bytes of pages that are made, by all ranks; the repository may have some of them already."""
        return len(self.runs) * 2 * self.layout.page_bytes * self.layout.tp_size

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Fields of the layout that change: before and after."""
        found = self.layout.differences(self.source_layout)
        return {name: values for name, values in found.items() if name != "tp_rank"}

    @property
    def summary(self) -> str:
        """What changes, for people and for the snapshot's message."""
        return ", ".join(f"{name} {before} to {after}" for name, (before, after) in self.differences.items())

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return {
            "source": self.source,
            "branch": self.branch,
            "bit_exact": False,
            "differences": {
                name: {"source": before, "wanted": after} for name, (before, after) in self.differences.items()
            },
            "layout": dataclasses.asdict(self.layout),
            "sequences": [
                {
                    "id": seq.id,
                    "tokens": len(seq.token_ids),
                    "cached_tokens": seq.cached_tokens(self.layout.page_size_tokens),
                    "pages": len(seq.page_ixs),
                    "not_carried": self.lost.get(seq.id, []),
                }
                for seq in self.sequences
            ],
            "source_pages": len(self.sources),
            "pages": len(self.runs),
            "left_out_pages": self.left_out,
            "read_bytes": self.read_bytes,
            "made_bytes": self.made_bytes,
            "existing": self.existing,
            "mends": self.mends,
        }


@dataclass(frozen=True, slots=True)
class Converted:
    """Result of a conversion.

    Attributes:
        cid: the snapshot.
        new_bytes: bytes of page halves that the repository did not have yet.
    """

    cid: str
    new_bytes: int
