"""kvist beside SGLang's scheduler, in its process and thread: what a snapshot holds, and what requests may continue.

All of it happens between two steps. Knows which request holds which pages; what requests take is `arriving`'s, and the
pages' bytes are `kvist.engines.paged`'s.
"""

from __future__ import annotations

import itertools
import logging
import operator
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from kvist.engines.paged import answers
from kvist.engines.paged.checkouts import Checkouts
from kvist.engines.paged.matching import Stored
from kvist.engines.paged.mover import PageMover
from kvist.engines.paged.pages import GroupPages
from kvist.engines.paged.plans import CapturePlan, Place, SequencePlan
from kvist.engines.paged.requests import newest, sequence_id, told_apart
from kvist.engines.sglang import internals, requests
from kvist.engines.sglang.arriving import Arriving
from kvist.engines.sglang.generations import Generations
from kvist.engines.sglang.settings import Settings
from kvist.errors import EngineError, NotFound
from kvist.hashing import extend_block_hashes

log = logging.getLogger("kvist.sglang")

FINISHED_MAX: Final = 1024
"""Finished requests that can still be snapshotted, and whose pages a snapshot of everything holds, while in place."""
_MOMENT: Final = 0.0005
_PATIENCE: Final = 0.25
"""Seconds that SGLang may stand still to hear which pages the store has already; then all are copied."""


@dataclass(frozen=True, slots=True)
class _Finished:
    """A request that has ended.

    Attributes:
        rid: SGLang's id.
        token_ids: all of them.
        cached: tokens whose KV was computed.
        pages, generations: that held them, on the pool's device.
        state: see `requests.state`.
    """

    rid: str
    token_ids: list[int]
    cached: int
    pages: torch.Tensor
    generations: torch.Tensor
    state: dict[str, Any]


class SchedulerSide:
    """See the module. An `answers.Engine`, and its `answers.Decider`.

    Attributes:
        layouts: of the one group and rank there is.
        windows: all tokens are looked back on.
        arriving: what requests take.
    """

    def __init__(self, scheduler: Any, settings: Settings) -> None:
        """Join a scheduler that has made its pools.

        Raises:
            EngineError, UnsupportedModel: see `internals.check`.
        """
        internals.check(scheduler)
        self.layouts = [internals.layout(scheduler, settings)]
        self.windows: list[int | None] = [None]
        self._scheduler = scheduler
        self._size = self.layouts[0].page_size_tokens
        layers, count = internals.layers(scheduler.token_to_kv_pool_allocator)
        self._mover = PageMover(
            self.layouts,
            settings.store,
            settings.host_bytes,
            lambda: internals.numerics(scheduler),
            tiers=settings.tiers,
        )
        self._mover.register([GroupPages(self.layouts[0], layers, count)])
        self._generations = Generations(scheduler.token_to_kv_pool_allocator, count)
        self._checkouts = Checkouts(self.windows, self._size)
        self._finished: OrderedDict[str, _Finished] = OrderedDict()
        self._numbers = itertools.count(1)
        self._spoilt: str | None = None
        self.arriving = Arriving(
            scheduler, self._checkouts, self._mover, self._generations, is_failing=settings.on_lost_pages == "fail"
        )

    @property
    def decider(self) -> SchedulerSide:
        """Itself."""
        return self

    def answer(self, op: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one call; see `answers.answer`."""

        def work() -> dict[str, Any]:
            if self._spoilt is not None and op != "release":
                raise EngineError(self._spoilt, hint="restart SGLang")
            return answers.call(self, op, payload)

        return answers.answer(op, work)

    def must_pause(self, wanted: str | None) -> bool:
        """Between two steps SGLang stands still, and what a request draws follows from its seed and position."""
        return False

    def ranks(self, method: str, *args: Any) -> list[Any]:
        """See `answers.Engine`."""
        return [operator.attrgetter(method)(self._mover)(*args)]

    def spoil(self, why: str) -> None:
        """What was computed, or stored, may not fit this engine any more."""
        log.warning("%s; snapshots are refused until a restart", why)
        self._spoilt = why
        self._checkouts.clear()
        self._finished.clear()
        self.arriving.let_go(lambda rid: True)

    def forget(self) -> None:
        """The prefix cache was emptied: what had ended is nowhere any more."""
        self._finished.clear()

    # -- checkouts -----------------------------------------------------------------------------------------------

    @property
    def checkouts(self) -> list[str]:
        """See `answers.Decider`."""
        return self._checkouts.cids

    def content(self, cid: str) -> str:
        """See `answers.Decider`."""
        return self._checkouts.content(cid)

    def check_out(
        self, cid: str, content: str, by_hash: list[dict[bytes, int]], sequences: Sequence[Stored]
    ) -> list[str]:
        """See `answers.Decider`."""
        dropped = self._checkouts.add(cid, content, by_hash, sequences)
        return [name for name in dropped if name not in self.arriving.contents]

    # -- snapshots -----------------------------------------------------------------------------------------------

    def capture(self, wanted: str | None) -> CapturePlan:
        """See `answers.Decider`."""
        internals.synchronize(self._scheduler.token_to_kv_pool_allocator.device)
        live = [
            request
            for request in (*internals.requests(self._scheduler), *self.arriving.waiting)
            if internals.is_plain(request) and (wanted is None or requests.is_called(request.rid, wanted))
        ]
        places: dict[int, Place] = {}
        sequences = [self._running(request, places) for request in live]
        if wanted is not None and not live:
            ended = [done for done in reversed(self._finished.values()) if requests.is_called(done.rid, wanted)]
            if not ended:
                raise NotFound(f"no live or recently finished request {wanted!r}", hint="name it by X-Request-Id")
            meant = {requests.whole(done.rid) for done in newest(ended, lambda done: requests.name(done.rid))}
            sequences = [self._ended(done, places) for done in ended if requests.whole(done.rid) in meant]
        if wanted is None:
            for done in self._finished.values():
                self._ended(done, places, whole=True)
        return CapturePlan(f"capture-{next(self._numbers)}", list(places.values()), told_apart(sequences))

    def begin(self, plan: CapturePlan) -> None:
        """Copy all of it out at once: SGLang has no way to keep a request's pages in place while it goes on.

        It stands still as it does under its own ``/pause_generation`` in place, for as long as this takes.
        """
        captures, began = self._mover.captures, time.monotonic()
        captures.begin(plan)
        while (copied := captures.copy(plan.id, ()))["left"]:
            if copied["busy"]:
                if time.monotonic() - began > _PATIENCE:
                    captures.hurry(plan.id)
                time.sleep(_MOMENT)

    def gone(self, capture: str) -> list[tuple[int, int]]:
        """Nothing: all was copied when the capture began."""
        return []

    def release(self, capture: str) -> None:
        """Nothing is kept in place."""

    def ended(self, request: Any) -> None:
        """A request gives back its pages; if it has ended, it can still be snapshotted until they are overwritten."""
        if not request.finished() or not request.kv.holds_kv or not internals.is_plain(request):
            return
        if not request.output_ids:  # what SGLang runs ahead of several samples, for them to find
            return
        cached = internals.computed(request)
        pages = internals.pages(self._scheduler, request, cached)
        self._finished[request.rid] = _Finished(
            request.rid,
            internals.token_ids(request),
            cached,
            pages,
            self._generations.of(pages),
            requests.state(request, finished=True, deterministic=internals.is_deterministic()),
        )
        self._finished.move_to_end(request.rid)  # an id may come again
        while len(self._finished) > FINISHED_MAX:
            self._finished.popitem(last=False)

    def _running(self, request: Any, places: dict[int, Place]) -> SequencePlan:
        cached = internals.computed(request)
        pages = internals.pages(self._scheduler, request, cached) if cached else torch.empty(0, dtype=torch.int64)
        generations = self._generations.of(pages).tolist() if cached else []
        state = requests.state(request, finished=False, deterministic=internals.is_deterministic())
        ids = internals.token_ids(request)
        return self._sequence(request.rid, ids, cached, pages.tolist(), generations, state, places)

    def _ended(self, done: _Finished, places: dict[int, Place], *, whole: bool = False) -> SequencePlan:
        """The sequence of a finished request, as far as its pages still hold it; with ``whole``, of full pages only."""
        kept = (self._generations.of(done.pages) == done.generations).tolist()
        last = kept.index(False) if False in kept else len(kept)
        cached = min(done.cached, last * self._size)
        if whole:
            cached -= cached % self._size
        last = -(-cached // self._size)
        pages, generations = done.pages[:last].tolist(), done.generations[:last].tolist()
        return self._sequence(done.rid, done.token_ids, cached, pages, generations, done.state, places)

    def _sequence(
        self,
        rid: str,
        token_ids: list[int],
        cached: int,
        pages: list[int],
        generations: list[int],
        state: dict[str, Any],
        places: dict[int, Place],
    ) -> SequencePlan:
        """A sequence; its pages go into ``places``, by number."""
        names: list[bytes] = []
        extend_block_hashes(names, token_ids[:cached], self._size, salt=state.get("salt", ""))
        for number, (page, generation) in enumerate(zip(pages, generations, strict=True)):
            fill = min(self._size, cached - number * self._size)
            known = places.get(page)
            if known is None or known.fill < fill:
                name = names[number].hex() if number < len(names) else None
                places[page] = Place(0, page, generation, fill, name)
        return SequencePlan(sequence_id(requests.name(rid)), rid, token_ids, cached, [(0, pages)], state)
