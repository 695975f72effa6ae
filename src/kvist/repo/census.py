"""The census: which pages which manifests name, in few bytes, to count and to compare. Knows manifests, by number."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvist.errors import NotFound
from kvist.layout import Layout
from kvist.repo import marks
from kvist.repo.fsck import WRONG
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Counted:
    """One manifest.

    Attributes:
        layout: of its pages.
        pages: numbers of its distinct page halves; `Census.sizes` has the bytes of each.
        logical_bytes: of its pages, each half as often as it is named.
    """

    layout: Layout
    pages: array[int]
    logical_bytes: int


class Census:
    """Manifests of one repository, read when first asked for, and once."""

    def __init__(self, repo: Repository) -> None:
        self._repo = repo
        self._numbers: dict[str, int] = {}
        self._manifests: dict[str, Counted | None] = {}
        self.sizes = array("Q")

    def manifest(self, cid: str) -> Counted | None:
        """One manifest; ``None``: it is missing or damaged."""
        if cid not in self._manifests:
            self._manifests[cid] = self._read(cid)
        return self._manifests[cid]

    def manifests(self, snapshots: Iterable[Snapshot]) -> dict[str, Counted]:
        """Those of some snapshots, by cid, each once."""
        cids = dict.fromkeys(cid for snapshot in snapshots for cid in snapshot.manifests)
        return {cid: found for cid in cids if (found := self.manifest(cid)) is not None}

    def page_bytes(self, manifests: Iterable[Counted]) -> int:
        """Bytes of the distinct pages of manifests."""
        numbers: set[int] = set()
        for manifest in manifests:
            numbers.update(manifest.pages)
        return sum(self.sizes[number] for number in numbers)

    def _read(self, cid: str) -> Counted | None:
        try:
            manifest = self._repo.manifest(cid)
        except (NotFound, *WRONG):
            return None
        half = manifest.layout.page_bytes
        pages = array("L")
        for digest in dict.fromkeys(manifest.digests):
            number = self._numbers.setdefault(digest, len(self.sizes))
            if number == len(self.sizes):
                self.sizes.append(half)
            pages.append(number)
        return Counted(manifest.layout, pages, 2 * half * len(manifest.pages))


def bare(repo: Repository, named: Iterable[str | None]) -> set[str]:
    """Pruned snapshots that nothing names directly: their records are kept, what they held is not.

    Args:
        repo: where.
        named: cids that refs and leases name.
    """
    return marks.pruned(repo.store).keys() - set(named)


def holding(snapshots: Mapping[str, Snapshot], without: set[str]) -> list[Snapshot]:
    """Those of some snapshots that hold pages."""
    return [snapshot for cid, snapshot in snapshots.items() if cid not in without]
