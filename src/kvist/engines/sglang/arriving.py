"""Requests that go on from a snapshot: held back until the prefix cache has its pages, under a salt of their own.

Beside SGLang's scheduler, in its thread. A request that arrives is matched to the snapshots that are checked out; what
the prefix cache lacks of it is loaded into pages that nobody else has, inserted, and locked until SGLang has taken the
request up: then it hits all but one of its tokens. Knows token ids, pages and SGLang's prefix cache; must not know what
a snapshot holds of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import torch

from kvist.engines.paged.checkouts import Checkouts
from kvist.engines.paged.matching import Checkout, Stored, starts_with
from kvist.engines.paged.mover import PageMover
from kvist.engines.paged.plans import Load, Place
from kvist.engines.paged.requests import digest
from kvist.engines.sglang import internals, penalties, requests
from kvist.engines.sglang.generations import Generations
from kvist.engines.sglang.requests import Standing
from kvist.hashing import extend_block_hashes

log = logging.getLogger("kvist.sglang")

_LOST: Final = "the pages of the snapshot that this request continues cannot be had: the server's log says why"


@dataclass(frozen=True, slots=True)
class _Match:
    """What a request takes.

    Attributes:
        checkout: the snapshot.
        tokens: how many of its tokens.
        refs: the manifest's page of each page of them, in order.
        stored: the sequence that they are, or ``None``: a chain of blocks.
        names: of the pages, as far as they are full.
    """

    checkout: Checkout
    tokens: int
    refs: list[int]
    stored: Stored | None
    names: list[bytes]


@dataclass(slots=True)
class _Held:
    """A request that is held back, and what is being loaded for it.

    Attributes:
        rid: SGLang's id of the request.
        request: SGLang's; ``None``: it went away meanwhile.
        match: what it takes.
        go: lets SGLang have it.
        known: tokens that the prefix cache had when loading began.
        slots: of the pages that are being loaded; ``None``: none are.
        lock: keeps those tokens.
    """

    rid: str
    request: Any
    match: _Match
    go: Callable[[], None]
    known: int = 0
    slots: torch.Tensor | None = None
    lock: Any = None


@dataclass(slots=True)
class _Ready:
    """A request that SGLang has, but has not taken up.

    Attributes:
        request: SGLang's.
        lock: keeps its pages.
        start: tokens in whole pages.
        tail: slots of the partly filled page after them: nobody's but the request's; ``None``: there is none.
        fill: tokens in it.
    """

    request: Any
    lock: Any
    start: int
    tail: torch.Tensor | None
    fill: int


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
        self._held: list[_Held] = []
        self._ready: dict[str, _Ready] = {}

    @property
    def waiting(self) -> Iterator[Any]:
        """Requests that are held back."""
        return (held.request for held in self._held if held.request is not None)

    @property
    def contents(self) -> set[str]:
        """Contents of the snapshots that they wait for."""
        return {held.match.checkout.content for held in self._held}

    @property
    def is_busy(self) -> bool:
        """Whether anything of SGLang's is in use here, that SGLang does not see."""
        return bool(self._held or self._ready)

    # -- arrival -------------------------------------------------------------------------------------------------

    def hold(self, request: Any, go: Callable[[], None]) -> bool:
        """A request has come: whether it is held back, as it takes something.

        `advance`, before the next step, is the first to look after it; ``go`` then lets SGLang have it.
        """
        if not self._checkouts or not internals.is_plain(request) or request.finished() or request.to_finish:
            return False
        match = self._match(request)
        if match is None:
            return False
        salt = match.checkout.salt(requests.own_salt(request))
        request.kvist, request.cache_salt = self._standing(request, match.stored), salt
        self._held.append(_Held(request.rid, request, match, go))
        return True

    def _standing(self, request: Any, stored: Stored | None) -> Standing:
        ids = request.origin_input_ids
        prompt = len(ids) if stored is None else min(stored.state.get("prompt_tokens", len(ids)), len(ids))
        standing = Standing(request.cache_salt, prompt)
        goes_on = stored is not None and len(ids) == len(stored.token_ids)
        if goes_on and penalties.counts(request.sampling_params):
            standing.before = penalties.counted(ids, prompt, is_late=self._scheduler.enable_overlap)
        return standing

    def _match(self, request: Any) -> _Match | None:
        wanted = requests.wanted(request)
        return self._best(request) if wanted is None else self._named(request, *wanted)

    def _named(self, request: Any, cid: str, name: str) -> _Match | None:
        """The sequence that the request names, if it came with its salt; the API process has checked that it fits."""
        found = self._checkouts.named(cid, name)
        salt, ids = digest(requests.own_salt(request)), list(request.origin_input_ids)
        if found is None or found[1].state.get("salt") != salt or not starts_with(ids, found[1]):
            log.warning("request %s names a sequence that it cannot continue; it is computed", request.rid)
            return None
        return self._taking(*found, ids) if found[1].cached else None

    def _best(self, request: Any) -> _Match | None:
        """The longest of what the prefix cache and the snapshots have for a request; ``None``: the former's."""
        ids, own = list(request.origin_input_ids), requests.own_salt(request)
        names: list[bytes] = []
        extend_block_hashes(names, ids, self._size, salt=digest(own) or "")

        def reach(checkout: Checkout | None) -> int:
            salt = request.cache_salt if checkout is None else checkout.salt(own)
            return internals.match(self._tree, ids[:-1], request.extra_key, salt)[0]

        found = self._checkouts.best(ids, names, own, reach)
        if found is None:
            return None
        if found.stored is not None:
            return self._taking(found.checkout, found.stored, ids)
        taken = names[: found.tokens // self._size]
        return _Match(found.checkout, found.tokens, [found.checkout.by_hash[0][name] for name in taken], None, taken)

    def _taking(self, checkout: Checkout, stored: Stored, ids: list[int]) -> _Match:
        names: list[bytes] = []
        extend_block_hashes(names, ids[: stored.cached], self._size, salt=stored.state.get("salt", ""))
        refs = [ref for ref in stored.pages[0] if ref is not None]
        return _Match(checkout, stored.cached, refs, stored, names)

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
        if not self._held:
            return
        arrived, failed, _ = self._mover.arrivals.take()
        self._mover.arrivals.take_report()
        for held in list(self._held):
            if held.slots is not None and held.rid in arrived:
                self._install(held, held.slots)
            elif held.slots is not None and held.rid in failed:
                self._lose(held, held.slots)
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
        slots = internals.take(self._scheduler, len(numbers))
        if slots is None:
            self._unlock(held)
            if not any(True for _ in internals.requests(self._scheduler)) and not any(
                other.slots is not None for other in self._held
            ):
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
        self._mover.load([Load(held.rid, match.checkout.content, places)])

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
        self._ready[held.request.rid] = _Ready(held.request, held.lock, start, tail, tokens - start)
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
                if ready.lock is not None:
                    self._tree.unlock(ready.lock)
                if ready.tail is not None:
                    self._allocator.free(ready.tail)

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
