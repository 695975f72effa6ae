"""Small pages and manifests for tests."""

import random
from collections.abc import Sequence
from dataclasses import replace

from kvist.hashing import DIGESTS
from kvist.ids import format_digest
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository, Snapshot

LAYOUT = Layout(page_size_tokens=4, n_layers=2, n_heads=1, head_dim=8, dtype="f16")


def halves(pages: int, seed: int = 0, layout: Layout = LAYOUT) -> list[bytes]:
    """K and V of each page."""
    return [random.Random(f"{seed}/{i}").randbytes(layout.page_bytes) for i in range(2 * pages)]


def digest(half: bytes, algorithm: str = "blake3") -> str:
    return format_digest(algorithm, DIGESTS[algorithm](half))


def parts(tp_size: int = 2, n_groups: int = 2, layout: Layout = LAYOUT) -> list[Layout]:
    """Layouts of every rank and group, in order; the groups differ in page size, and the last one slides."""
    last = {"attention": "sliding:8"} if n_groups > 1 else {}
    return [
        replace(
            layout, tp_rank=rank, tp_size=tp_size, group=group, n_groups=n_groups, n_layers=layout.n_layers + group,
            **(last if group == n_groups - 1 else {}),  # type: ignore[arg-type]
        )
        for rank in range(tp_size)
        for group in range(n_groups)
    ]  # fmt: skip


def manifest(
    data: Sequence[bytes], layout: Layout = LAYOUT, algorithm: str = "blake3", seqs: Sequence[LogicalSeq] | None = None
) -> Manifest:
    names = [digest(half, algorithm) for half in data]
    pages = tuple(PageEntry(i, k, v) for i, (k, v) in enumerate(zip(names[::2], names[1::2], strict=True)))
    if seqs is None:
        seqs = [LogicalSeq("s", tuple(range(len(pages))))]
    return Manifest(layout, pages, tuple(seqs))


def snapshot(repo: Repository, data: Sequence[bytes], branch: str | None = "main", **more: object) -> Snapshot:
    repo.put_pages(data)
    return repo.commit([manifest(data, algorithm=repo.page_digest)], branch=branch, **more)  # type: ignore[arg-type]


def commit_parts(
    repo: Repository, branch: str | None = "main", *, pages: int = 3, seed: int = 0, **more: object
) -> tuple[Snapshot, list[Manifest]]:
    """A snapshot of two ranks with two groups each; the second group has lost the first page of its sequence."""
    made = []
    for number, layout in enumerate(parts()):
        held = pages - layout.group
        data = halves(held, 10 * seed + number, layout)
        repo.put_pages(data)
        ids = tuple(range(seed, seed + 4 * pages + 1))
        seq = LogicalSeq("s", tuple(range(held)), 0, ids, first_page=layout.group if held else 0)
        made.append(manifest(data, layout, repo.page_digest, [seq]))
    return repo.commit(made, branch=branch, **more), made  # type: ignore[arg-type]


def read_back(repo: Repository, rev: str) -> list[bytes]:
    found = []
    for cid in repo.snapshot(rev).manifests:
        listed = repo.manifest(cid)
        names = list(listed.digests)
        outs = [bytearray(listed.layout.page_bytes) for _ in names]
        repo.get_pages(names, [memoryview(out) for out in outs])
        found += map(bytes, outs)
    return found
