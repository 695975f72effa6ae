"""The deciding side's view of the durable prefix cache: which blocks it holds, and whether loading them pays.

A thread follows the branches that the ranks of all servers write. Lookups wait for nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from kvist.blocks.policy import Lru
from kvist.engines.paged.plans import Report
from kvist.layout import Layout
from kvist.pager.costs import LoadCost
from kvist.pager.prefix import PrefixCache
from kvist.repo.repository import Repository

log = logging.getLogger("kvist.paged")

_EVERY_S: Final = 1.0
_PREFILL_TOKENS: Final = 64
"""Steps that compute fewer tokens say little about prefill."""


class PrefixIndex:
    """Blocks that every rank has stored."""

    def __init__(self, store: str, ranks: Sequence[Sequence[Layout]]) -> None:
        self._store, self._ranks = store, ranks
        self._bytes_per_token = sum(2 * layout.page_bytes / layout.page_size_tokens for layout in ranks[0])
        self._cost = LoadCost()
        self._caches: list[PrefixCache] = []
        self._steps: deque[tuple[int, float]] = deque(maxlen=16)  # begun, and not ended: an engine may run ahead
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="kvist-index", daemon=True)
        self._thread.start()

    def has(self, group: int, name: bytes) -> bool:
        """Whether the store has a block's page, of every rank."""
        key = group, name.hex()
        return bool(self._caches) and all(key in cache for cache in self._caches)

    def pays(self, tokens: int) -> bool:
        """Whether to load the pages of ``tokens`` rather than compute them. Ask once a decision."""
        return self._cost.loads_faster(tokens, int(tokens * self._bytes_per_token))

    def step_begins(self, tokens: int) -> None:
        """A step will compute so many tokens."""
        self._steps.append((tokens, time.perf_counter()))

    def step_ends(self, report: Report | None) -> None:
        """The oldest of them has."""
        if self._steps:
            tokens, started = self._steps.popleft()
            if tokens >= _PREFILL_TOKENS:
                self._cost.observe_compute(tokens, time.perf_counter() - started)
        if report is not None:
            for nbytes, seconds in report.loads:
                self._cost.observe_load(nbytes, seconds)
            for group, name in report.gone:
                for cache in self._caches:
                    cache.drop(group, name)

    def close(self) -> None:
        """Stop following."""
        self._stopping.set()
        self._thread.join(timeout=1.0)  # it may be reading a slow store, and holds nothing

    def _follow(self) -> None:
        repo: Repository | None = None
        told = ""
        wait = 0.0
        while not self._stopping.wait(wait):
            wait = _EVERY_S
            try:
                if repo is None:
                    repo = Repository.open(self._store, create=True)
                    self._caches = [PrefixCache(repo, layouts, max_bytes=None, policy=Lru()) for layouts in self._ranks]
                for cache in self._caches:
                    cache.refresh()
                told = ""
            except Exception as error:  # the index is worth less than the thread
                if str(error) != told:
                    log.warning("the durable prefix cache cannot be read: %s", error)
                told = str(error)
        if repo is not None:
            repo.close()
