"""The connector in a worker: pages between its cache, host memory and the store.

The engine's thread only copies pages between the cache and host memory, or hands that to a stream; reading, hashing and
writing happen in threads of our own. Knows pages, manifests and a repository; must not know how requests are scheduled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Final

import torch

from kvist.engines.vllm import internals
from kvist.engines.vllm.arrivals import Arrivals
from kvist.engines.vllm.capturing import Captures, Digests, Known
from kvist.engines.vllm.messages import CapturePlan, Load, Start, StepPlan, StepReport
from kvist.engines.vllm.pages import Done, GroupPages
from kvist.engines.vllm.saving import Saver
from kvist.engines.vllm.staging import HostPool, unbind
from kvist.errors import IntegrityError, KvistError, MissingPage, NotFound
from kvist.layout import Layout
from kvist.repo.repository import Repository

log = logging.getLogger("kvist.vllm")

_CHUNK: Final = 32 << 20
"""Bytes that one load brings in at a time, or as many as a far store fetches at once."""
_GENERATORS_MAX: Final = 1024


class WorkerSide:
    """See the module.

    Attributes:
        layouts: this rank's, by group.
        arrivals: what became of loads.
        pages_read: pages read from the repository for them, or ahead of them.
    """

    def __init__(
        self,
        layouts: list[Layout],
        store: str,
        host_bytes: int,
        numerics: Callable[[], dict[str, Any]],
        cache_bytes: int | None,
        tiers: Sequence[str] = (),
    ) -> None:
        """Start no thread that does anything yet.

        Args:
            layouts: of this rank, by group.
            store: url of the repository.
            host_bytes: memory for pages on their way, and for those that stay there.
            numerics: tells what else decides the bits; asked when the model is loaded.
            cache_bytes: bound of the durable prefix cache, 0: none; ``None``: there is no such cache.
            tiers: urls of page tiers in front of the store.
        """
        self.layouts = layouts
        self.arrivals = Arrivals()
        self.pages_read = 0
        self._store, self._host_bytes, self._numerics = store, host_bytes, numerics
        self._cache_bytes, self._tiers = cache_bytes, tiers
        self._saver: Saver | None = None
        self._repo: Repository | None = None
        self._runner: Any = None
        self._groups: list[GroupPages] = []
        self._pool: HostPool | None = None
        self._lock = threading.Lock()
        self._fetching = threading.Lock()
        # Apart, since some wait for others: loads for manifests, reading ahead for slots that captures hold.
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="kvist-load", initializer=unbind)
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="kvist-open", initializer=unbind)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kvist-read", initializer=unbind)
        self._snapshots: dict[str, Future[list[dict[int, Digests]]]] = {}
        self._preloads: dict[str, Future[int]] = {}
        self._known = Known()
        self._captures: Captures | None = None
        self._generators: dict[str, torch.Generator] = {}

    def register(self, caches: dict[str, torch.Tensor], groups: Sequence[Sequence[str]], blocks: int) -> None:
        """The cache of each layer, once vLLM has made them."""
        self._groups = [
            GroupPages(layout, [caches[name] for name in names], blocks)
            for layout, names in zip(self.layouts, groups, strict=True)
        ]
        slot = max(group.page_bytes for group in self._groups)
        on_device = any(cache.device.type != "cpu" for cache in caches.values())
        self._pool = HostPool(max(self._host_bytes, 8 * slot), slot, page_locked=on_device)
        self._captures = Captures(
            self.layouts, self._groups, self._pool, self._known, lambda: self.repo, self._numerics
        )
        if self._cache_bytes is not None:
            self._saver = Saver(lambda: self.repo, self.layouts, self._pool, self._cache_bytes or None)

    def attach(self, runner: Any) -> None:
        """The model runner, which holds the generators."""
        self._runner = runner

    def describe(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """This rank's layouts, by group, and what else decides its bits."""
        return [asdict(layout) for layout in self.layouts], self._numerics()

    def stats(self) -> dict[str, int | float]:
        """What this worker has done since it started; see `kvist.engines.vllm.metrics.SNAPSHOTS`."""
        arrivals, captures, saver, repo = self.arrivals, self._captures, self._saver, self._repo
        tiers = repo.pages.tier_stats() if repo is not None else ()
        return {
            "loads": arrivals.loads,
            "loads_failed": arrivals.failed,
            "pages_loaded": arrivals.pages,
            "bytes_loaded": arrivals.nbytes,
            "load_seconds": arrivals.seconds,
            "pages_read": self.pages_read,
            "bytes_from_store": repo.pages.bytes_read if repo is not None else 0,
            "bytes_from_tiers": sum(tier.bytes_read for tier in tiers),
            "tier_hits": sum(tier.hits for tier in tiers),
            "tier_misses": sum(tier.misses for tier in tiers),
            "tier_bad": sum(tier.bad for tier in tiers),
            "tier_errors": sum(tier.errors for tier in tiers),
            "pages_captured": captures.pages_captured if captures is not None else 0,
            "bytes_captured": captures.bytes_captured if captures is not None else 0,
            "blocks_saved": saver.saved if saver is not None else 0,
            "bytes_saved": saver.nbytes if saver is not None else 0,
            "saves_dropped": saver.dropped if saver is not None else 0,
        }

    @property
    def captures(self) -> Captures:
        """Once the cache is registered."""
        assert self._captures is not None
        return self._captures

    def begin(self, plan: CapturePlan) -> None:
        """Begin a capture; see `Captures.begin`."""
        self.captures.begin(plan, self._generators)

    @property
    def repo(self) -> Repository:
        """The repository, opened when it is first needed: a store that cannot be reached must not stop the engine."""
        with self._lock:
            if self._repo is None:
                self._repo = Repository.open(self._store, create=True, tiers=self._tiers)
            return self._repo

    # -- in every step -------------------------------------------------------------------------------------------

    def before_step(self, plan: StepPlan) -> None:
        """After requests entered the batch, before anything is computed."""
        for request_id in plan.seeded:
            generator = internals.generator_of(self._runner, request_id)
            if generator is not None:
                self._generators[request_id] = generator
                while len(self._generators) > _GENERATORS_MAX:
                    del self._generators[next(iter(self._generators))]
        for start in plan.starts:
            self._go_on(start)
        if self._saver is not None:
            for number, group in enumerate(self._groups):
                places = [place for place in plan.saves if place.group == number]
                if places:
                    self._saver.save(group, places)
            if plan.uses:
                self._loaders.submit(self._saver.touch, plan.uses)
        self._known.forget(place for load in plan.loads for place, _ in load.pages)

    def _go_on(self, start: Start) -> None:
        generator = internals.generator_of(self._runner, start.request_id)
        if start.generator is not None and generator is not None:
            try:
                generator.set_state(torch.tensor(list(start.generator), dtype=torch.uint8))
            except RuntimeError as error:
                log.warning(
                    "request %s: its draws start anew, the state is no generator's: %s", start.request_id, error
                )
        if start.prompt_tokens is not None and internals.carries_output(self._runner):
            internals.tell_output(self._runner, start.request_id, start.prompt_tokens)

    def start_loads(self, plan: StepPlan) -> None:
        """Begin to bring in what requests wait for."""
        if plan.loads:
            after = Done(self._on_device)
            for load in plan.loads:
                self._loaders.submit(self._load, load, after)

    def take_arrived(self) -> tuple[set[str], set[str], set[int]]:
        """See `Arrivals.take`."""
        return self.arrivals.take()

    def take_report(self) -> StepReport | None:
        """See `Arrivals.take_report`."""
        return self.arrivals.take_report()

    @property
    def _on_device(self) -> bool:
        assert self._pool is not None
        return bool(self._pool.rows.is_pinned())

    # -- loading -------------------------------------------------------------------------------------------------

    def _load(self, load: Load, after: Done) -> None:
        """In a thread: fetch pages and write them into the cache."""
        started = time.perf_counter()
        try:
            nbytes = self._bring(load, after)
        except Exception as error:
            if isinstance(error, KvistError):
                log.error("request %s: its pages cannot be had: %s", load.request_id, error)
            else:
                log.exception("request %s: loading failed", load.request_id)
            gone = self._forget(load) if isinstance(error, IntegrityError) else []
            self._known.forget(place for place, _ in load.pages)  # some may have come, and be computed anew in place
            self.arrivals.fail(load, gone)
        else:
            self.arrivals.arrive(load, nbytes, time.perf_counter() - started)

    def _bring(self, load: Load, after: Done) -> int:
        assert self._pool is not None
        nbytes = 0
        for number, group in enumerate(self._groups):
            pages = [(place, ref) for place, ref in load.pages if place.group == number]
            for part in self._parts(pages, group.page_bytes):
                digests = self._digests(load.content, number, [ref for _, ref in part])
                with self._fetched(group, digests) as slots:
                    group.write([place.block for place, _ in part], self._pool.rows, slots, after).wait()
                nbytes += len(part) * group.page_bytes
                self._known.learn([place for place, _ in part], digests)
        return nbytes

    def _digests(self, content: str | None, group: int, refs: Sequence[int | str]) -> list[Digests]:
        if content is None:
            return self._cached(group, [str(ref) for ref in refs])
        with self._lock:
            opened = self._snapshots.get(content)
        if opened is None:
            raise NotFound("the snapshot is not checked out any more")
        pages = opened.result()[group]
        return [pages[int(ref)] for ref in refs]

    def _cached(self, group: int, names: Sequence[str]) -> list[Digests]:
        """Digests of blocks of the durable prefix cache."""
        if self._saver is None:
            raise MissingPage("this worker keeps no durable prefix cache")
        cache = self._saver.cache
        if any((group, name) not in cache for name in names):
            cache.refresh()  # another rank, or server, may have stored them since
        found = [cache.find(group, name) for name in names]
        for name, pair in zip(names, found, strict=True):
            if pair is None:
                raise MissingPage(f"the durable prefix cache holds no block {name} of group {group} any more")
        cache.touch([(group, name) for name in names])
        return [pair for pair in found if pair is not None]

    def _forget(self, load: Load) -> list[tuple[int, str]]:
        """Drop blocks that the durable prefix cache names and the store holds no whole page of."""
        if load.content is not None or self._saver is None:
            return []
        cache, pages = self._saver.cache, self.repo.pages
        gone = []
        for place, ref in load.pages:
            pair = cache.find(place.group, str(ref))
            if pair is None or any(pages.size(half) is None for half in pair):
                cache.drop(place.group, str(ref))
                gone.append((place.group, str(ref)))
        return gone

    def _fetched(self, group: GroupPages, digests: Sequence[Digests]) -> _Slots:
        """Slots that hold these pages, read and verified unless they are there already."""
        assert self._pool is not None
        half, pool = group.layout.page_bytes, self._pool
        with self._fetching:  # so that no page is read twice
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
                self.repo.get_pages([digest for pair in missing for digest in pair], pool.halves(taken, half))
            except BaseException:
                pool.release([*held.values(), *taken])
                raise
            for pair, slot in zip(missing, taken, strict=True):
                pool.name(slot, pair)
                held[pair] = slot
        with self._lock:
            self.pages_read += len(missing)
        return _Slots(pool, [held[pair] for pair in digests], list(held.values()))

    def _parts(self, items: Sequence[Any], nbytes: int) -> Iterator[Sequence[Any]]:
        assert self._pool is not None
        count = max(1, min(max(_CHUNK, self.repo.pages.ahead) // nbytes, len(self._pool) // 4))
        for start in range(0, len(items), count):
            yield items[start : start + count]

    # -- checkouts -----------------------------------------------------------------------------------------------

    def open(self, content: str, manifests: Sequence[Sequence[str]]) -> None:
        """Read a snapshot's manifests of this rank, in a thread; loads wait for it.

        Args:
            content: the name of what they hold.
            manifests: cids by rank, by group.
        """

        def read() -> list[dict[int, Digests]]:
            mine = manifests[self.layouts[0].tp_rank]
            return [{page.ix: (page.k, page.v) for page in self.repo.manifest(name).pages} for name in mine]

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
        assert self._pool is not None
        room, brought = len(self._pool) // 2, 0
        for group, pages in zip(self._groups, opened.result(), strict=True):
            for part in self._parts(list(pages.values()), group.page_bytes):
                if brought + len(part) <= room:
                    with self._fetched(group, part):
                        brought += len(part)
        return brought

    def close(self) -> None:
        """Stop the threads."""
        if self._saver is not None:
            self._saver.close()
        if self._captures is not None:
            self._captures.close()
        for threads in (self._loaders, self._opener, self._reader):
            threads.shutdown(cancel_futures=True)
        if self._repo is not None:
            self._repo.close()


class _Slots:
    """Pinned slots: those of a list of pages in order, inside a ``with`` block."""

    def __init__(self, pool: HostPool, slots: list[int], pinned: list[int]) -> None:
        self._pool, self._slots, self._pinned = pool, slots, pinned

    def __enter__(self) -> list[int]:
        return self._slots

    def __exit__(self, *_: object) -> None:
        self._pool.release(self._pinned)
