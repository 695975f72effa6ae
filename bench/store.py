"""Put, re-put and verified get of pages: kvist, its peers and the machine's own limits, in one run.

    python bench/store.py [--gib 1] [--reps 3] [--directory DIR] [--json FILE]

Every figure is the median of the repetitions, in GB/s (1e9 bytes). Limits and contestants take turns within a
repetition, so that a neighbour's noise falls on all of them. A peer that is not installed is left out and named; to
have all: pip install processfork==1.0.15 safetensors lmcache==0.5.6, in an environment of their own.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3
from rich.console import Console
from rich.table import Table

from kvist.repo import Repository
from peers import PEERS, Peer

CORES = os.cpu_count() or 1
CHUNK = 4 << 20


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def drop_cache(directory: Path) -> None:
    """Write back and drop the page cache of every file below."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def on_threads(count: int, work: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


class Limits:
    """What the machine does with the same bytes: the ceilings."""

    def __init__(self, data: memoryview, out: memoryview, directory: Path) -> None:
        self.data, self.out, self.path = data, out, directory / "limit"

    def memcpy(self) -> None:
        share = len(self.data) // CORES
        on_threads(CORES, lambda i: self._copy(i * share, share))

    def _copy(self, start: int, size: int) -> None:
        import ctypes  # ctypes calls release the GIL; slice assignment of views does not

        source = (ctypes.c_char * size).from_buffer(self.data, start)
        target = (ctypes.c_char * size).from_buffer(self.out, start)
        ctypes.memmove(target, source, size)

    def blake3(self, size: int) -> None:
        share = len(self.data) // CORES

        def work(i: int) -> None:
            for start in range(i * share, (i + 1) * share, size):
                blake3(self.data[start : start + size]).digest()

        on_threads(CORES, work)

    def write(self, durable: bool) -> None:
        """The same bytes in one new file, 4 MiB a call, O_DIRECT and one fdatasync; or buffered and none."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if durable else 0)
        self.path.unlink(missing_ok=True)
        fd = os.open(self.path, flags)
        for start in range(0, len(self.data), CHUNK):
            os.pwrite(fd, self.data[start : start + CHUNK], start)
        if durable:
            os.fdatasync(fd)
        os.close(fd)

    def verified_read(self, page: int) -> None:
        """What any verifying reader must do: 2 MiB a call into the ready buffer, then the digest of each page."""
        fd = os.open(self.path, os.O_RDONLY)
        window = 2 << 20

        def work(start: int) -> None:
            os.preadv(fd, [self.out[start : start + window]], start)
            for i in range(start, start + window, page):
                blake3(self.out[i : i + page]).digest()

        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(work, range(0, len(self.data), window)))
        os.close(fd)

    def read(self, direct: bool) -> None:
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        fd = os.open(self.path, flags)
        share = len(self.data) // CORES

        def work(i: int) -> None:
            for start in range(i * share, (i + 1) * share, CHUNK):
                os.preadv(fd, [self.out[start : start + CHUNK]], start)

        on_threads(CORES, work)
        os.close(fd)


class Bench:
    def __init__(self, gib: float, directory: Path, peers: list[Peer]) -> None:
        self.peers = peers
        self.size = int(gib * (1 << 30)) // (CHUNK * CORES) * CHUNK * CORES
        self.directory = directory
        self.source = mmap.mmap(-1, self.size)
        self.target = mmap.mmap(-1, self.size)
        noise = os.urandom(8 << 20)
        for start in range(0, self.size, len(noise)):
            self.source[start : start + len(noise)] = noise[: self.size - start]
            self.target[start : start + len(noise)] = bytes(min(len(noise), self.size - start))
        self.rates: dict[str, list[float]] = defaultdict(list)

    def note(self, name: str, seconds: float, share: float = 1.0) -> None:
        self.rates[name].append(self.size * share / seconds / 1e9)

    def pages(self, page: int, seed: int) -> list[memoryview]:
        """Views of the data, each page made different from all others, also those of other repetitions."""
        view = memoryview(self.source)
        for start in range(0, self.size, page):
            view[start : start + 16] = start.to_bytes(8, "little") + (page << 16 | seed).to_bytes(8, "little")
        return [view[start : start + page] for start in range(0, self.size, page)]

    def round(self, page: int, seed: int) -> None:
        pages = self.pages(page, seed)
        limits = Limits(memoryview(self.source), memoryview(self.target), self.directory)
        self.note("memcpy", timed(limits.memcpy))
        self.note("blake3", timed(lambda: limits.blake3(page)))
        for durable in (False, True):
            self.note(f"write{' durable' * durable}", timed(lambda d=durable: limits.write(d)))
        limits.read(False)  # into the page cache
        self.note("read", timed(lambda: limits.read(False)))
        self.note("read+blake3", timed(lambda: limits.verified_read(page)))
        drop_cache(self.directory)
        self.note("read cold", timed(lambda: limits.read(True)))
        limits.path.unlink()
        for durable in (False, True):
            self.kvist(pages, durable)
        for peer in self.peers:
            self.peer(peer, pages)

    def kvist(self, pages: list[memoryview], durable: bool) -> None:
        root = self.directory / "kvist"
        tag = "kvist" + " durable" * durable
        repo = Repository.init(f"file://{root}" + "?durable=0" * (not durable))
        put = []
        self.note(f"{tag} put", timed(lambda: put.append(repo.put_pages(pages))))
        self.note(f"{tag} re-put", timed(lambda: repo.put_pages(pages)))
        if durable:
            digests = put[0].digests
            view, size = memoryview(self.target), len(pages[0])
            outs = [view[i * size : (i + 1) * size] for i in range(len(pages))]
            repo.get_pages(digests, outs)  # into the page cache
            self.note(f"{tag} get", timed(lambda: repo.get_pages(digests, outs)))
            assert view == memoryview(self.source), "what came back is not what was put"
            drop_cache(root)
            self.note(f"{tag} get cold", timed(lambda: repo.get_pages(digests, outs)))
        repo.close()
        shutil.rmtree(root)

    def peer(self, peer: Peer, pages: list[memoryview]) -> None:
        root = self.directory / "peer"
        some = pages[: max(1, int(len(pages) * peer.share))]
        share = len(some) / len(pages)
        self.note(f"{peer.name} put", timed(lambda: peer.put(root, some)), share)
        self.note(f"{peer.name} re-put", timed(lambda: peer.reput(some)), share)
        peer.get()  # into the page cache
        got = []
        self.note(f"{peer.name} get", timed(lambda: got.append(peer.get())), share)
        assert got[0] == sum(map(len, some)), f"{peer.name} gave back {got[0]} bytes"
        peer.close()
        shutil.rmtree(root, ignore_errors=True)


RATIOS = [
    ("put, durable", "kvist durable put", "write durable", 0.7),
    ("put, not durable", "kvist put", "write", None),
    ("re-put", "kvist durable re-put", "blake3", 0.8),
    ("get", "kvist durable get", "blake3", 0.6),
    ("get", "kvist durable get", "read+blake3", None),
    ("get, cold", "kvist durable get cold", "read cold", 0.8),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=110)
    report: dict[str, object] = {}
    peers: list[Peer] = []
    for peer_type in PEERS:
        try:
            peers.append(peer_type())
        except ImportError as error:
            console.print(f"left out: {peer_type.name} ({error})")
    for page in (1 << 20, 64 << 10):
        with tempfile.TemporaryDirectory(prefix="kvist-bench-", dir=args.directory) as directory:
            bench = Bench(args.gib, Path(directory), peers)
            for seed in range(args.reps):
                bench.round(page, seed)
        rate = {name: statistics.median(rates) for name, rates in bench.rates.items()}
        table = Table("what", "GB/s", title=f"{args.gib:g} GiB of {page >> 10} KiB pages, {CORES} cores")
        for name in rate:
            table.add_row(name, f"{rate[name]:.3f}")
        console.print(table)
        ratios = Table("kvist against its limit", "ratio", "aim")
        for what, ours, limit, aim in RATIOS:
            ratios.add_row(f"{what}: {ours} / {limit}", f"{rate[ours] / rate[limit]:.2f}", str(aim or ""))
        for peer in peers:
            for act in ("put", "re-put", "get"):
                if f"{peer.name} {act}" in rate:
                    ratio = rate[f"kvist durable {act}"] / rate[f"{peer.name} {act}"]
                    ratios.add_row(f"{act} against {peer.name} ({peer.promise})", f"{ratio:.1f}", "")
        console.print(ratios)
        report[f"{page >> 10} KiB"] = {"GB/s": rate}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
