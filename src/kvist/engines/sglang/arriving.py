"""Requests that go on from a snapshot: held back until the prefix cache has its pages, under a salt of their own.

Beside SGLang's scheduler, in its thread. A request that arrives is matched to the snapshots that are checked out; what
the prefix cache lacks of it is loaded into pages that nobody else has, inserted, and locked until SGLang has taken the
request up: then it hits all but one of its tokens. Knows token ids, pages and SGLang's prefix cache; must not know what
a snapshot holds of them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import torch

from kvist.engines.paged.checkouts import Checkouts
from kvist.engines.paged.matching import Stored
from kvist.engines.paged.mover import PageMover
from kvist.engines.paged.plans import Load, Place
from kvist.engines.sglang import internals, penalties, requests
from kvist.engines.sglang.generations import Generations
from kvist.engines.sglang.matches import Match, Matches
from kvist.engines.sglang.requests import Standing

log = logging.getLogger("kvist.sglang")

_LOST: Final = "the pages of the snapshot that this request continues cannot be had: the server's log says why"
_PATIENCE: Final = 2
"""Steps in which SGLang computes nothing, and lets in none of those that are ready, before one of them gives way."""


@dataclass(slots=True)
class _Held:
    """A request that is held back, and what is being loaded for it.

    Attributes:
        load: what its load is called; SGLang's id of the request may come again.
        request: SGLang's; ``None``: it went away meanwhile.
        match: what it takes.
        go: lets SGLang have it.
        known: tokens that the prefix cache had when loading began.
        slots: of the pages that are being loaded; ``None``: none are.
        lock: keeps those tokens.
    """

    load: str
    request: Any
    match: Match
    go: Callable[[], None]
    known: int = 0
    slots: torch.Tensor | None = None
    lock: Any = None


@dataclass(slots=True)
class _Ready:
    """A request that SGLang has, but has not taken up.

    Attributes:
        held: what it was; its lock keeps the pages.
        start: tokens in whole pages.
        tail: slots of the partly filled page after them: nobody's but the request's; ``None``: there is none.
        fill: tokens in it.
    """

    held: _Held
    start: int
    tail: torch.Tensor | None
    fill: int

    @property
    def request(self) -> Any:
        """SGLang's."""
        return self.held.request


class Arriving:
    """See the module."""

    def __init__(
        self,
        scheduler: Any,
        checkouts: Checkouts,
        mover: PageMover,
        generations: Generations,
        *,
        is_failing: bool,
    ) -> None:
        """
        Args:
            scheduler: SGLang's.
            checkouts: what requests may continue.
            mover: brings pages.
            generations: of the pool's pages.
            is_failing: a request whose pages cannot be had ends with an error; or else it is computed.
        """
        self._scheduler, self._checkouts, self._mover = scheduler, checkouts, mover
        self._generations, self._is_failing = generations, is_failing
        self._tree, self._allocator = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
        self._size: int = self._allocator.page_size
        self._matches = Matches(self._tree, checkouts, self._size)
        self._held: list[_Held] = []
        self._ready: dict[str, _Ready] = {}
        self._passed = 0
        self._loads = itertools.count(1)

    @property
    def waiting(self) -> Iterator[Any]:
        """Requests that are held back."""
        return (held.request for held in self._held if held.request is not None)

    @property
    def contents(self) -> set[str]:
        """Contents of the snapshots that they wait for, or may have to wait for again."""
        held_before = (ready.held for ready in self._ready.values())
        return {held.match.checkout.content for held in (*self._held, *held_before)}

    @property
    def is_busy(self) -> bool:
        """Whether anything of SGLang's is in use here, that SGLang does not see."""
        return bool(self._held or self._ready)

    # -- arrival -------------------------------------------------------------------------------------------------

    def hold(self, request: Any, go: Callable[[], None]) -> bool:
        """A request has come: whether it is held back, as it takes something.

        `advance`, before the next step, is the first to look after it; ``go`` then lets SGLang have it. One that was
        held is not held again where SGLang puts it back into its queue, for a pause or another one's priority.
        """
        if not self._checkouts or not internals.is_plain(request) or request.finished() or request.to_finish:
            return False
        if requests.standing(request) is not None:
            return False
        match = self._matches.of(request)
        if match is None:
            return False
        salt = match.checkout.salt(requests.own_salt(request))
        request.kvist, request.cache_salt = self._standing(request, match.stored), salt
        self._held.append(_Held(f"{request.rid}#{next(self._loads)}", request, match, go))
        return True

    def _standing(self, request: Any, stored: Stored | None) -> Standing:
        ids = request.origin_input_ids
        prompt = len(ids) if stored is None else min(stored.state.get("prompt_tokens", len(ids)), len(ids))
        standing = Standing(request.cache_salt, prompt)
        goes_on = stored is not None and len(ids) == len(stored.token_ids)
        if goes_on and penalties.counts(request.sampling_params):
            standing.before = penalties.counted(ids, prompt, is_late=self._scheduler.enable_overlap)
        return standing

    def let_go(self, is_meant: Callable[[str], bool]) -> None:
        """Let SGLang have the held requests of these ids, for it to abort them."""
        for held in list(self._held):
            if held.request is not None and is_meant(held.request.rid):
                self._compute(held)

    # -- loading -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Between two steps: take what was loaded, load what can be, and let go of what SGLang has taken up."""
        if self._ready:
            self._clean()
        self._passed = self._passed + 1 if self._are_passed_over() else 0
        if self._passed >= _PATIENCE:
            self._give_way()
        if not self._held:
            return
        arrived, failed, _ = self._mover.arrivals.take()
        self._mover.arrivals.take_report()
        for held in list(self._held):
            if held.slots is not None and held.load in arrived:
                self._install(held, held.slots)
            elif held.slots is not None and held.load in failed:
                self._lose(held, held.slots)
        if not self._passed:  # or it would take what was just given back
            self._load_what_can_be()

    def _load_what_can_be(self) -> None:
        loading = {held.match.checkout.content for held in self._held if held.slots is not None}
        for held in list(self._held):
            content = held.match.checkout.content
            if held.slots is None and content not in loading:  # or it would load what another one loads
                self._load(held)
                if held.slots is not None:
                    loading.add(content)

    def _load(self, held: _Held) -> None:
        request, match = held.request, held.match
        ids = list(request.origin_input_ids)
        whole = match.tokens - match.tokens % self._size
        held.known, node = internals.match(self._tree, ids[:whole], request.extra_key, request.cache_salt)
        held.lock = self._tree.lock(node) if held.known else None
        numbers = range(held.known // self._size, -(-match.tokens // self._size))
        if not numbers:
            self._finish(held, None)
            return
        is_alone = (
            not self._ready and not any(True for _ in internals.requests(self._scheduler)) and not self._is_loading
        )
        fits = is_alone or len(numbers) * self._size + self._still_wanted(request) < self._room()
        slots = internals.take(self._scheduler, len(numbers)) if fits else None
        if slots is None:
            self._unlock(held)
            if is_alone:
                log.warning("request %s: the KV cache has no room for its %d pages", request.rid, len(numbers))
                self._compute(held)
            return
        held.slots = slots
        pages = slots[:: self._size] // self._size
        places: list[tuple[Place, int | str]] = []
        for number, page, generation in zip(numbers, pages.tolist(), self._generations.of(pages).tolist(), strict=True):
            fill = min(self._size, match.tokens - number * self._size)
            name = match.names[number].hex() if number < len(match.names) else None
            places.append((Place(0, page, generation, fill, name), match.refs[number]))
        internals.synchronize(self._allocator.device)  # a step in flight may still write to pages that were given back
        self._mover.load([Load(held.load, match.checkout.content, places)])

    @property
    def _is_loading(self) -> bool:
        return any(held.slots is not None for held in self._held)

    def _room(self) -> int:
        """Tokens that can be taken so that all who run, and those before this one, can go on as SGLang reckons it."""
        before = [ready.request for ready in self._ready.values()]
        before += [held.request for held in self._held if held.slots is not None and held.request is not None]
        return internals.room(self._scheduler) - sum(map(self._still_wanted, before))

    def _still_wanted(self, request: Any) -> int:
        """Tokens that SGLang wants to see free before it lets in a request that hits all but one of its tokens."""
        return internals.to_come(request) + 1 + self._size

    def _install(self, held: _Held, slots: torch.Tensor) -> None:
        """Its pages are there: the full ones become the prefix cache's, a partly filled last one the request's."""
        request, match = held.request, held.match
        if request is None:
            self._drop(held, slots)
            return
        whole = match.tokens - match.tokens % self._size
        full = slots[: whole - held.known]
        if len(full):
            ids = list(request.origin_input_ids[:whole])
            known, node = internals.match(self._tree, ids[: held.known], request.extra_key, request.cache_salt)
            path = self._tree.path_device_indices(node)[:known]
            end = internals.insert(
                self._tree, ids, request.extra_key, request.cache_salt, torch.cat([path, full]), held.known
            )
            lock = self._tree.lock(end)
            self._unlock(held)
            held.lock = lock
        self._finish(held, slots[len(full) :] if match.tokens > whole else None)

    def _lose(self, held: _Held, slots: torch.Tensor) -> None:
        """Its pages cannot be had: it ends, or it is computed, under its own salt: no snapshot's it will be."""
        if held.request is not None and self._is_failing:
            held.request.set_finish_with_abort(_LOST, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
        self._allocator.free(slots)
        held.slots = None
        self._compute(held)

    def _drop(self, held: _Held, slots: torch.Tensor) -> None:
        self._allocator.free(slots)
        self._unlock(held)
        self._held.remove(held)

    def _compute(self, held: _Held) -> None:
        """Let SGLang have a request as it came. What is being loaded for it is given back when it is there."""
        request, go = held.request, held.go
        if request is not None:
            request.cache_salt = request.kvist.salt
            request.kvist = None
        held.request = None
        if held.slots is None:
            self._unlock(held)
            self._held.remove(held)
        if request is not None:
            go()

    def _finish(self, held: _Held, tail: torch.Tensor | None) -> None:
        """Let SGLang have a request whose pages are in place."""
        self._held.remove(held)
        tokens = held.match.tokens
        start = tokens - tokens % self._size
        held.slots = None
        self._ready[held.request.rid] = _Ready(held, start, tail, tokens - start)
        held.go()

    def _unlock(self, held: _Held) -> None:
        if held.lock is not None:
            self._tree.unlock(held.lock)
            held.lock = None

    # -- until SGLang has taken it up ------------------------------------------------------------------------------

    def _clean(self) -> None:
        """Let go of what requests that run, or went away, do not need any more."""
        waiting = {id(request) for request in internals.requests(self._scheduler)}
        for rid, ready in list(self._ready.items()):
            if ready.request.kv.holds_kv or id(ready.request) not in waiting:
                del self._ready[rid]
                self._give_back(ready)

    def _give_back(self, ready: _Ready) -> None:
        self._unlock(ready.held)
        self._give_back_tail(ready)

    def _give_back_tail(self, ready: _Ready) -> None:
        if ready.tail is not None:
            self._allocator.free(ready.tail)
            ready.tail = None

    def _are_passed_over(self) -> bool:
        """Whether requests are ready, nothing is computed, and nothing comes that would change it."""
        return bool(self._ready) and not self._is_loading and internals.is_at_rest(self._scheduler)

    def _give_way(self) -> None:
        """What is kept for those that are ready is what SGLang lacks to let in the first in its queue.

        They are held back again, all but one that is the first itself. Alone, that one gives back its partly filled
        page, and computes what was in it: SGLang may let it generate as much as the pool holds without that page.
        """
        first = self._scheduler.waiting_queue[0]
        behind = [rid for rid, ready in self._ready.items() if ready.request is not first]
        for rid in behind:
            ready = self._ready.pop(rid)
            self._give_back(ready)
            internals.take_back(self._scheduler, ready.request)
            self._held.append(ready.held)
        if not behind:
            self._give_back_tail(self._ready[first.rid])

    def matched(self, request: Any, key_length: int, found: Any) -> Any:
        """What SGLang's prefix cache found for a request, and the partly filled page that is the request's own."""
        ready = self._tailed(request)
        if ready is None or found.device_prefix_len != ready.start:
            return found
        more = min(ready.fill, key_length - ready.start)
        if more <= 0:
            return found
        return found._replace(device_prefix_len=ready.start + more, cache_protected_len=ready.start)

    def indices(self, request: Any) -> torch.Tensor | None:
        """The slots of a request's prefix, where they end in a page of its own; ``None``: SGLang knows them.

        From then on that page is in the request's row, and goes as all of its pages do.
        """
        ready = self._tailed(request)
        if ready is None or ready.tail is None or request.prefix_len <= ready.start:
            return None
        path = self._tree.path_device_indices(request.last_node)[: ready.start]
        tail, ready.tail = ready.tail, None
        return torch.cat([path, tail[: request.prefix_len - ready.start]])

    def _tailed(self, request: Any) -> _Ready | None:
        """What is known of a request that has a partly filled page of its own."""
        ready = self._ready.get(request.rid)
        return ready if ready is not None and ready.request is request and ready.tail is not None else None
