"""Pages of snapshots, on their way from the store into host memory. Knows manifests; must not know requests.

All but `Fetching.fetched`, which its callers' threads run, returns at once: threads of our own read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from kvist.engines.paged.capturing import Digests
from kvist.engines.paged.pages import GroupPages
from kvist.engines.paged.staging import HostPool, unbind
from kvist.errors import NotFound
from kvist.repo.repository import Repository

_CHUNK: Final = 32 << 20
"""Bytes that one load brings in at a time, or as many as a far store fetches at once."""

_T = TypeVar("_T")


class Fetching:
    """The snapshots that loads of one rank may ask for. Thread-safe.

    Attributes:
        pages_read: pages read from the repository.
    """

    def __init__(self, repo: Callable[[], Repository], groups: Sequence[GroupPages], pool: HostPool) -> None:
        self.pages_read = 0
        self._repo, self._groups, self._pool = repo, groups, pool
        self._lock, self._reading = threading.Lock(), threading.Lock()
        # Apart, since some wait for others: loads for manifests, reading ahead for slots that captures hold.
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="kvist-open", initializer=unbind)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kvist-read", initializer=unbind)
        self._snapshots: dict[str, Future[list[dict[int, Digests]]]] = {}
        self._preloads: dict[str, Future[int]] = {}

    def open(self, content: str, manifests: Sequence[Sequence[str]]) -> None:
        """Read a snapshot's manifests of this rank, in a thread; loads wait for it.

        Args:
            content: the name of what they hold.
            manifests: cids by rank, by group.
        """

        def read() -> list[dict[int, Digests]]:
            mine = manifests[self._groups[0].layout.tp_rank]
            return [{page.ix: (page.k, page.v) for page in self._repo().manifest(name).pages} for name in mine]

        with self._lock:
            self._preloads.pop(content, None)
            opened = self._snapshots.pop(content, None)
            if opened is None or (opened.done() and opened.exception() is not None):
                opened = self._opener.submit(read)
            self._snapshots[content] = opened

    def forget(self, contents: Sequence[str]) -> None:
        """No request continues these snapshots any more."""
        with self._lock:
            for content in contents:
                self._snapshots.pop(content, None)
                self._preloads.pop(content, None)

    def digests(self, content: str, group: int, numbers: Sequence[int]) -> list[Digests]:
        """Of pages of a snapshot, by their ``ix``; waits for its manifests.

        Raises:
            NotFound: it is not checked out any more.
            KvistError: its manifests cannot be read.
        """
        with self._lock:
            opened = self._snapshots.get(content)
        if opened is None:
            raise NotFound("the snapshot is not checked out any more")
        pages = opened.result()[group]
        return [pages[number] for number in numbers]

    @contextmanager
    def fetched(self, group: GroupPages, digests: Sequence[Digests]) -> Iterator[list[int]]:
        """Pinned slots that hold these pages, in order: read and verified, unless they are there already.

        Raises:
            KvistError: a page cannot be had.
        """
        slots = self._take(group, digests)
        try:
            yield [slots[pair] for pair in digests]
        finally:
            self._pool.release(list(slots.values()))

    def _take(self, group: GroupPages, digests: Sequence[Digests]) -> dict[Digests, int]:
        pool = self._pool
        with self._reading:  # so that no page is read twice
            held: dict[Digests, int] = {}
            missing: list[Digests] = []
            for pair in dict.fromkeys(digests):
                slot = pool.find(pair)
                if slot is None:
                    missing.append(pair)
                else:
                    held[pair] = slot
            taken: list[int] = []
            try:
                while len(taken) < len(missing):
                    taken += pool.take(len(missing) - len(taken), wait=True)
                taken.sort()
                halves = pool.halves(taken, group.layout.page_bytes)
                self._repo().get_pages([digest for pair in missing for digest in pair], halves)
            except BaseException:
                pool.release([*held.values(), *taken])
                raise
            for pair, slot in zip(missing, taken, strict=True):
                pool.name(slot, pair)
                held[pair] = slot
            self.pages_read += len(missing)
        return held

    def parts(self, items: Sequence[_T], nbytes: int) -> Iterator[Sequence[_T]]:
        """``items``, pages of ``nbytes`` each, in runs of as many as should be fetched at once."""
        count = max(1, min(max(_CHUNK, self._repo().pages.ahead) // nbytes, len(self._pool) // 4))
        for start in range(0, len(items), count):
            yield items[start : start + count]

    def preload(self, content: str) -> dict[str, Any]:
        """Bring a snapshot's pages into host memory, as many as it has room for; poll until ``done``.

        Raises:
            KvistError: a page cannot be had.
        """
        with self._lock:
            opened = self._snapshots.get(content)
            running = self._preloads.get(content)
            if opened is not None and running is None:
                running = self._preloads[content] = self._reader.submit(self._bring_ahead, opened)
        if opened is None or running is None:
            raise NotFound("the snapshot is not checked out")
        if not running.done():
            return {"done": False, "pages_loaded": 0, "pages": 0}
        return {"done": True, "pages_loaded": running.result(), "pages": sum(map(len, opened.result()))}

    def _bring_ahead(self, opened: Future[list[dict[int, Digests]]]) -> int:
        room, brought = len(self._pool) // 2, 0
        for group, pages in zip(self._groups, opened.result(), strict=True):
            for part in self.parts(list(pages.values()), group.page_bytes):
                if brought + len(part) <= room:
                    with self.fetched(group, part):
                        brought += len(part)
        return brought

    def close(self) -> None:
        """Stop the threads."""
        for threads in (self._opener, self._reader):
            threads.shutdown(cancel_futures=True)
