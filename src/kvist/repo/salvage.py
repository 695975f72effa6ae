"""Salvage: finds whole pages in a segment whose index cannot be read.

Knows how segments are laid out. Must not know which pages anybody needs. Nothing that it guesses is believed: a page is
what its bytes hash to.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from kvist.errors import IntegrityError
from kvist.ids import format_digest
from kvist.repo.batch import windows
from kvist.repo.repository import Repository
from kvist.repo.segment import guess_lengths


@dataclass(frozen=True, slots=True, order=True)
class Salvaged:
    """A whole page in a broken segment.

    Attributes:
        segment: its key.
        start, size: where the page lies.
        digest: what it is.
    """

    segment: str
    start: int
    size: int
    digest: str

    def read(self, repo: Repository) -> bytes:
        """The page once more.

        Raises:
            IntegrityError: it is no longer what it was.
            NotFound: the segment is gone.
        """
        data = repo.store.get(self.segment, start=self.start, size=self.size)
        if _name(repo, data) != self.digest:
            raise IntegrityError(f"{self.segment} at {self.start} no longer holds page {self.digest}")
        return data


def salvage(repo: Repository, key: str, wanted: Container[str], sizes: Iterable[int]) -> list[Salvaged]:
    """The whole pages in a broken segment.

    Where the lengths in what is left of its index fit its own, pages are looked for there, else at every multiple of
    each of ``sizes``: mostly the pages of a segment are of one size.

    Args:
        repo: whose it is.
        key: of the segment.
        wanted: digests of the pages that are looked for.
        sizes: that they have.

    Raises:
        NotFound: the segment is gone.
    """
    info = repo.store.head(key)
    if info is None:
        return []
    lengths = guess_lengths(repo.store, key, info.size)
    tries = [lengths] if lengths else [[size] * (info.size // size) for size in sorted(set(sizes)) if size]
    found: dict[str, Salvaged] = {}
    for lengths in tries:
        for start, data in _pages(repo, key, lengths):
            digest = _name(repo, data)
            if digest in wanted:
                found.setdefault(digest, Salvaged(key, start, len(data), digest))
    return sorted(found.values())


def _pages(repo: Repository, key: str, lengths: list[int]) -> Iterator[tuple[int, bytes]]:
    """Start and bytes of each page that can be read."""
    start = 0
    for window in windows(lengths, lengths, repo.store.window):
        try:
            data = repo.store.get(key, start=start, size=sum(window))
        except IntegrityError:
            data = b""
        at = 0
        for length in window:
            page = data[at : at + length]
            if len(page) == length:
                yield start + at, page
            at += length
        start += at


def _name(repo: Repository, data: bytes) -> str:
    return format_digest(repo.page_digest, repo.config.digest(data))
