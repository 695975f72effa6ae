"""Converting a snapshot to other layouts, beside copying the same pages as they are.

    python bench/convert.py [--layers 28] [--heads 8] [--dim 128] [--pages 600] [--directory DIR]

Random bfloat16 pages of 16 tokens in a new repository, read from the page cache, stored with every fsync and hashed
(BLAKE3). The other contestant reads them and stores them in a second repository, in windows of equal size: what moving
the bytes costs without moving elements. Memory is the process' peak so far, above what it was before.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvist.layout import Layout
from kvist.pager import convert
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository

_AT_ONCE = 20


def make(repo: Repository, layout: Layout, pages: int) -> None:
    """A snapshot of one sequence on the branch ``main``."""
    draw = np.random.default_rng(0)
    entries: list[PageEntry] = []
    while len(entries) < pages:
        names = iter(repo.put_pages([draw.bytes(layout.page_bytes) for _ in range(2 * _AT_ONCE)]).digests)
        entries += [PageEntry(len(entries) + n, next(names), next(names)) for n in range(_AT_ONCE)]
    sequence = LogicalSeq("s", tuple(range(len(entries))))
    repo.commit([Manifest(layout, tuple(entries), (sequence,))], branch="main")


def copy(repo: Repository, target: Repository) -> None:
    """The same pages, as they are."""
    (manifest,) = repo.manifests("main")
    digests, half = list(manifest.digests), manifest.layout.page_bytes
    step = max(1, convert.WINDOW // (2 * half))
    for start in range(0, len(digests), step):
        some = digests[start : start + step]
        room = memoryview(bytearray(len(some) * half))
        outs = [room[n * half : (n + 1) * half] for n in range(len(some))]
        repo.get_pages(some, outs)
        target.put_pages(outs)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak() -> float:
    """MiB that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print seconds, GB/s and the ratio to a copy, layout by layout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in {"layers": 28, "heads": 8, "dim": 128, "pages": 600}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--directory", type=Path, default=None)
    args = parser.parse_args()
    layout = Layout(
        page_size_tokens=16,
        n_layers=args.layers,
        n_heads=args.heads,
        head_dim=args.dim,
        dtype="bf16",
        model="bench",
        revision="r",
    )
    wide = replace(layout, page_size_tokens=32)
    wanted = {
        "64 tokens": replace(layout, page_size_tokens=64),
        "vllm-cpu-vec, 32": replace(wide, memory_order="vllm-cpu-vec"),
        "LHND, 32": replace(wide, memory_order="LHND"),
        "LHND, 32, two ranks": replace(wide, memory_order="LHND", n_heads=args.heads // 2, tp_size=2),
    }
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as place,
        Repository.init((Path(place) / "source").as_uri()) as repo,
    ):
        make(repo, layout, args.pages)
        before = peak()
        with Repository.init((Path(place) / "copy").as_uri()) as target:
            base = timed(lambda: copy(repo, target))
        print(f"{'copied as they are':20} {base:5.2f} s; {peak() - before:4.0f} MiB")
        for number, (name, one) in enumerate(wanted.items()):
            plan = convert.plan(repo, "main", [one], branch=f"converted/{number}")
            seconds = timed(lambda plan=plan: convert.apply(repo, plan))
            print(
                f"{name:20} {seconds:5.2f} s, {plan.made_bytes / 1e9 / seconds:5.2f} GB/s, "
                f"{seconds / base:4.1f} times a copy; {peak() - before:4.0f} MiB"
            )


if __name__ == "__main__":
    main()
