"""What the benchmarks of a running vLLM share: prompts, a first token, the machine's limits, tables.

Imported while this directory is on the path; see the head of bench/vllm.py for why it must not stay there.
"""

from __future__ import annotations

import ctypes
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from kvist.repo import Repository
from kvist.testing.vllm import VllmServer

CORES = os.cpu_count() or 1
Row = dict[str, Any]


class Answer(NamedTuple):
    ms: float
    cached: int
    transfer: dict[str, Any] | None = None


def first_token(server: VllmServer, prompt: Sequence[int] | None, name: str | None = None, **fields: Any) -> Answer:
    """Ask for one token; what comes back before it can be read is not what takes time."""
    body = {"max_tokens": 1, "temperature": 0, "ignore_eos": True, **fields}
    body |= {} if prompt is None else {"prompt": list(prompt)}
    started = time.perf_counter()
    got = server.http.post("/v1/completions", json=body, headers={} if name is None else {"X-Request-Id": name})
    ms = (time.perf_counter() - started) * 1e3
    if got.status_code != 200:
        raise RuntimeError(f"status {got.status_code}: {got.text}\n{server.log[-4000:]}")
    details = got.json()["usage"].get("prompt_tokens_details") or {}
    return Answer(ms, details.get("cached_tokens") or 0, got.json().get("kv_transfer_params"))


def wake(server: VllmServer) -> None:
    """Let it run a little: one that slept while others had their turns would answer later than one that did not."""
    first_token(server, ids(40, random.random()))


def ids(count: int, seed: object) -> list[int]:
    generator = random.Random(f"{count}/{seed}")
    return [generator.randrange(7, 300) for _ in range(count)]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of each turn."""
    return median([a / b for a, b in zip(over, under, strict=True)])


def only(values: Sequence[int]) -> int | str:
    """The one value that all repetitions gave."""
    found = sorted(set(values))
    return found[0] if len(found) == 1 else "/".join(map(str, found))


def read_all(directory: Path) -> None:
    """Bring every file below into the page cache: what was written past it would be read from the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(8 << 20):
                    pass


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; float32 is faster to prefill on one that has not."""
    cpu = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in cpu or "amx_bf16" in cpu


class Limits:
    """What the machine does with as many bytes as a snapshot has, in this process, while all servers are idle."""

    def __init__(self, directory: Path, most: int, page: int) -> None:
        """``most`` bytes at most, in pages of ``page`` bytes."""
        self._directory, self._page, self._runs = directory, page, 0
        self._data, self._out = bytearray(os.urandom(most)), bytearray(most)
        self._out[:] = self._data  # touched once

    def memcpy_s(self, nbytes: int, threads: int = CORES) -> float:
        """Copy them, on as many threads as there are cores, or so many. One is the caller's own."""
        share = nbytes // threads
        source = [(ctypes.c_char * share).from_buffer(self._data, i * share) for i in range(threads)]
        target = [(ctypes.c_char * share).from_buffer(self._out, i * share) for i in range(threads)]
        if threads == 1:
            return timed(lambda: ctypes.memmove(target[0], source[0], share))
        workers = [threading.Thread(target=ctypes.memmove, args=(target[i], source[i], share)) for i in range(threads)]

        def work() -> None:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        return timed(work)

    def store_s(self, nbytes: int) -> tuple[float, float]:
        """Put them into a new repository until they are durable, and get them back verified; seconds of each."""
        self._runs += 1
        place = self._directory / f"limit-{self._runs}"
        pages = [memoryview(self._data)[at : at + self._page] for at in range(0, nbytes - self._page + 1, self._page)]
        outs = [memoryview(self._out)[at : at + self._page] for at in range(0, nbytes - self._page + 1, self._page)]
        for at in range(0, nbytes, self._page):  # pages never stored before
            self._data[at : at + 8] = random.randbytes(8)
        with Repository.init(place.as_uri()) as repo:
            put = []
            put_s = timed(lambda: put.append(repo.put_pages(pages)))
            read_all(place)
            get_s = timed(lambda: repo.get_pages(put[0].digests, outs))
        return put_s, get_s


def show(console: Console, title: str, rows: list[Row]) -> None:
    columns = [key for key in rows[0] if not isinstance(rows[0][key], dict)]
    for row in rows[1:]:
        columns += [key for key in row if key not in columns and not isinstance(row[key], dict)]
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{v:,.2f}" if isinstance(v := row.get(key), float) else str(v or "-") for key in columns))
    console.print(table)
