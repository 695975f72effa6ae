"""A scenario's store, behind the server's back: read, damaged, and given snapshots that fit nothing that runs.

Knows a repository in a local directory. Must not know servers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kvist.repo import LogicalSeq, Manifest, Repository


def root_of(store: str) -> Path:
    """The directory of a store's url."""
    return Path(unquote(urlsplit(store).path))


def manifests_of(store: str, cid: str) -> list[Manifest]:
    """The manifests of a snapshot."""
    with Repository.open(store) as repo:
        return [repo.manifest(manifest) for manifest in repo.snapshot(cid).manifests]


def flip_a_bit(store: str, cid: str, *, page: int = -1, at: int = 5) -> str:
    """Flip one bit in a stored page of a snapshot's only sequence, wherever it is stored; the page's digest.

    Args:
        store: url of the repository.
        cid: the snapshot.
        page: which one of the sequence's; its V half is damaged.
        at: byte of the page.
    """
    with Repository.open(store) as repo:
        manifest = repo.manifest(repo.snapshot(cid).manifests[0])
        entries = {entry.ix: entry for entry in manifest.pages}
        digest = entries[manifest.sequences[0].page_ixs[page]].v
        data = repo.pages.get(digest)
        homes = repo.pages.homes(digest)
    assert homes
    for key in homes:
        path = root_of(store) / key
        raw = bytearray(path.read_bytes())
        place = raw.find(data)
        assert place >= 0
        raw[place + at] ^= 0x10
        path.chmod(0o644)
        path.write_bytes(raw)
    return digest


@contextmanager
def without_pages(store: str) -> Iterator[None]:
    """All that holds pages is gone meanwhile."""
    segments = root_of(store) / "segments"
    hidden = root_of(store).with_name(f"{root_of(store).name}-hidden")
    segments.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(segments)


def altered(store: str, cid: str, **changes: Any) -> str:
    """Commit a snapshot that differs in its layout (and fits nothing that runs), and give its cid.

    Args:
        store: url of the repository.
        cid: the snapshot.
        **changes: fields of its layout, such that a page has as many bytes as before.
    """
    with Repository.open(store) as repo:
        made = []
        for cid_of_one in repo.snapshot(cid).manifests:
            old = repo.manifest(cid_of_one)
            layout = replace(old.layout, **changes)
            sequences = tuple(_fitting(seq, layout.page_size_tokens) for seq in old.sequences)
            made.append(replace(old, layout=layout, sequences=sequences))
        return repo.commit(made).cid


def _fitting(seq: LogicalSeq, page_size_tokens: int) -> LogicalSeq:
    """The sequence over pages of that many tokens: the first ones, as many as its token ids fill."""
    pages = seq.page_ixs[: len(seq.token_ids) // page_size_tokens]
    if len(pages) == len(seq.page_ixs):
        return replace(seq, fill_in_last_page=seq.fill_in_last_page % page_size_tokens)
    return replace(seq, page_ixs=pages, fill_in_last_page=0)
