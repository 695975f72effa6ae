"""One rank's pages: between its cache, host memory and the store.

The engine's thread only copies pages between the cache and host memory, or hands that to a stream; reading, hashing and
writing happen in threads of our own. Knows pages, manifests and a repository; must not know how requests are scheduled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from kvist.engines.paged.arrivals import Arrivals
from kvist.engines.paged.capturing import Captures, Digests, Known
from kvist.engines.paged.fetching import Fetching
from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.paged.plans import Load, Place
from kvist.engines.paged.saving import Saver
from kvist.engines.paged.staging import HostPool, unbind
from kvist.errors import IntegrityError, KvistError, MissingPage
from kvist.layout import Layout
from kvist.repo.repository import Repository

log = logging.getLogger("kvist.paged")


class PageMover:
    """See the module.

    Attributes:
        layouts: this rank's, by group.
        arrivals: what became of loads.
    """

    def __init__(
        self,
        layouts: list[Layout],
        store: str,
        host_bytes: int,
        numerics: Callable[[], dict[str, Any]],
        cache_bytes: int | None = None,
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
        self._store, self._host_bytes, self._numerics = store, host_bytes, numerics
        self._cache_bytes, self._tiers = cache_bytes, tiers
        self._groups: list[GroupPages] = []
        self._pool: HostPool | None = None
        self._known = Known()
        self._captures: Captures | None = None
        self._fetching: Fetching | None = None
        self._saver: Saver | None = None
        self._repo: Repository | None = None
        self._opening = threading.Lock()
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="kvist-load", initializer=unbind)

    def register(self, groups: Sequence[GroupPages]) -> None:
        """Where the engine keeps the pages of each group, once it has made its cache."""
        self._groups = list(groups)
        slot = max(group.page_bytes for group in self._groups)
        self._pool = HostPool(max(self._host_bytes, 8 * slot), slot, page_locked=self._on_device)
        self._captures = Captures(
            self.layouts, self._groups, self._pool, self._known, lambda: self.repo, self._numerics
        )
        self._fetching = Fetching(lambda: self.repo, self._groups, self._pool)
        if self._cache_bytes is not None:
            self._saver = Saver(lambda: self.repo, self.layouts, self._pool, self._cache_bytes or None)

    @property
    def _on_device(self) -> bool:
        return any(group.on_device for group in self._groups)

    @property
    def captures(self) -> Captures:
        """Once the cache is registered."""
        assert self._captures is not None
        return self._captures

    @property
    def fetching(self) -> Fetching:
        """Once the cache is registered."""
        assert self._fetching is not None
        return self._fetching

    @property
    def repo(self) -> Repository:
        """The repository, opened when it is first needed: a store that cannot be reached must not stop the engine."""
        with self._opening:
            if self._repo is None:
                self._repo = Repository.open(self._store, create=True, tiers=self._tiers)
            return self._repo

    def describe(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """This rank's layouts, by group, and what else decides its bits."""
        return [asdict(layout) for layout in self.layouts], self._numerics()

    def stats(self) -> dict[str, int | float]:
        """What this rank has done since it started."""
        arrivals, captures, saver, repo = self.arrivals, self._captures, self._saver, self._repo
        tiers = repo.pages.tier_stats() if repo is not None else ()
        return {
            "loads": arrivals.loads,
            "loads_failed": arrivals.failed,
            "pages_loaded": arrivals.pages,
            "bytes_loaded": arrivals.nbytes,
            "load_seconds": arrivals.seconds,
            "pages_read": self._fetching.pages_read if self._fetching is not None else 0,
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

    # -- the durable prefix cache --------------------------------------------------------------------------------

    def save(self, places: Sequence[Place], uses: Sequence[tuple[int, str]]) -> None:
        """Copy finished blocks out, to be stored, and note which stored ones requests used; nothing, if none are kept.

        Args:
            places: of blocks that have names.
            uses: group and block hash; a request's root first.
        """
        if self._saver is None:
            return
        for number, group in enumerate(self._groups):
            mine = [place for place in places if place.group == number]
            if mine:
                self._saver.save(group, mine)
        if uses:
            self._loaders.submit(self._saver.touch, uses)

    # -- loading -------------------------------------------------------------------------------------------------

    def load(self, loads: Sequence[Load]) -> None:
        """Begin to bring in what requests wait for; `arrivals` tells when it is there.

        The places must be nobody's who runs. Whatever the engine does to them up to now comes first.
        """
        if loads:
            self._known.forget(place for load in loads for place, _ in load.pages)
            after = Done(self._on_device)
            for load in loads:
                self._loaders.submit(self._load, load, after)

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
            for part in self.fetching.parts(pages, group.page_bytes):
                digests = self._digests(load.content, number, [ref for _, ref in part])
                with self.fetching.fetched(group, digests) as slots:
                    group.write([place.block for place, _ in part], self._pool.rows, slots, after).wait()
                nbytes += len(part) * group.page_bytes
                self._known.learn([place for place, _ in part], digests)
        return nbytes

    def _digests(self, content: str | None, group: int, refs: Sequence[int | str]) -> list[Digests]:
        if content is None:
            return self._cached(group, [str(ref) for ref in refs])
        return self.fetching.digests(content, group, [int(ref) for ref in refs])

    def _cached(self, group: int, names: Sequence[str]) -> list[Digests]:
        """Digests of blocks of the durable prefix cache."""
        if self._saver is None:
            raise MissingPage("this rank keeps no durable prefix cache")
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

    def close(self) -> None:
        """Stop the threads."""
        if self._saver is not None:
            self._saver.close()
        if self._captures is not None:
            self._captures.close()
        self._loaders.shutdown(cancel_futures=True)
        if self._fetching is not None:
            self._fetching.close()
        if self._repo is not None:
            self._repo.close()
