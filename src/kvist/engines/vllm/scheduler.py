"""The connector beside vLLM's scheduler: what a request takes from where, and what a snapshot holds.

Runs in the engine core's thread, between and within its steps, and does no I/O but for the durable prefix cache's
index, which a thread of its own refreshes. Knows blocks, requests and hashes; must not know pages' bytes.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvist.engines.paged.checkouts import Checkouts
from kvist.engines.paged.index import PrefixIndex
from kvist.engines.paged.matching import Checkout, Stored, blocks_of, chain_tokens, starts_with, window_of
from kvist.engines.paged.plans import CapturePlan, Load, Place, SequencePlan
from kvist.engines.paged.requests import digest
from kvist.engines.vllm import internals, names, requests
from kvist.engines.vllm.cartridges.placing import salt_of
from kvist.engines.vllm.holding import Holding, Places
from kvist.engines.vllm.internals import Blocks
from kvist.engines.vllm.messages import Start, StepPlan, StepReport
from kvist.errors import NotFound
from kvist.layout import Layout

log = logging.getLogger("kvist.vllm")

_RESEND_S: Final = 10.0


_Wanted = tuple[str | None, int, int | str]
"""Content of the snapshot, group and reference of a page."""


@dataclass(slots=True)
class Match:
    """What a request takes.

    Attributes:
        source: the snapshot, or ``None``: the durable prefix cache.
        tokens: how many of its tokens.
        stored: the sequence that they are, or ``None``: a chain of blocks.
        hashes: the request's block hashes as the source knows them.
        is_decided: whether ``tokens`` holds for the durable prefix cache: decided when there is room for the request.
    """

    source: Checkout | None
    tokens: int
    stored: Stored | None
    hashes: list[bytes]
    is_decided: bool = False


class SchedulerSide:
    """See the module.

    Attributes:
        layouts: rank 0's, by group.
        windows: by group: the tokens that one looks back on, itself included, or ``None``: all.
    """

    def __init__(self, layouts: list[Layout], index: PrefixIndex | None) -> None:
        self.layouts = layouts
        self._size = layouts[0].page_size_tokens
        self.windows = [window_of(layout) for layout in layouts]
        self._index = index  # of the durable prefix cache
        self._manager: Any = None
        self.blocks: Blocks | None = None
        self._holding: Holding | None = None
        self._checkouts = Checkouts(self.windows, self._size)
        self._live: dict[str, Any] = {}  # vLLM's requests, from arrival to end
        self._matches: dict[str, Match] = {}
        self._starts: dict[str, Start] = {}
        self._prompts: dict[str, int] = {}  # of requests that go on: how much was prompt at the very first
        self._salts: dict[str, str | None] = {}  # of restored requests: the salt they came with
        self._loading: dict[str, set[_Wanted]] = {}
        self._names: OrderedDict[bytes, str] = OrderedDict()  # of blocks under a restored request's salt: without it
        self._saved: dict[str, int] = {}
        self._sent: OrderedDict[tuple[int, bytes], float] = OrderedDict()
        self._plan = StepPlan()

    def bind_pool(self, pool: Any) -> None:
        """The block pool, once it exists.

        Raises:
            UnsupportedModel: blocks are hashed in other sizes than they are kept.
        """
        self.blocks = Blocks(pool, self._size)
        self._holding = Holding(self.blocks, self.windows, self._size)

    def bind(self, manager: Any) -> None:
        """The scheduler's cache manager, once it is known: 0.28 does not tell, so every call brings it."""
        self._manager = manager

    # -- requests ------------------------------------------------------------------------------------------------

    def arrive(self, request: Any) -> None:
        """A request has come: decide what it takes, and salt it if that is a snapshot's."""
        self._live[request.request_id] = request
        if not internals.is_plain(request) or request.skip_reading_prefix_cache or requests.cartridge(request):
            return  # a cartridge's pages come from the connector that knows it
        wanted = request.kv_transfer_params or {}
        if "snapshot" in wanted:
            found = self._named(request, wanted)
        else:
            found = self._best(request)
        if found is None:
            return
        self._matches[request.request_id] = found
        if found.source is not None:
            self._salts[request.request_id] = request.cache_salt
            start = requests.start_of(request, found.stored)
            if start is not None:
                self._starts[request.request_id] = start
            if found.stored is not None and "prompt_tokens" in found.stored.state:
                self._prompts[request.request_id] = found.stored.state["prompt_tokens"]
            internals.resalt(request, found.source.salt(request.cache_salt))

    def _named(self, request: Any, wanted: dict[str, Any]) -> Match | None:
        """The sequence that the request names, if it came with its salt; the API process has checked that it fits."""

        def fits(stored: Stored) -> bool:
            return _is_under(stored, request.cache_salt) and starts_with(request.prompt_token_ids, stored)

        found = self._checkouts.named(wanted["snapshot"], wanted.get("sequence"), fits)
        if found is None:
            log.warning("request %s names a sequence that it cannot continue; it is computed", request.request_id)
            return None
        checkout, stored = found
        return Match(checkout, stored.cached, stored, list(request.block_hashes))

    def _best(self, request: Any) -> Match | None:
        """The longest of what the prefix cache, the snapshots and the durable prefix cache have for a request."""
        hashes = list(request.block_hashes)

        def reach(checkout: Checkout | None) -> int:
            if checkout is None:
                return internals.local_hit(self._manager, request)
            with internals.salted(request, checkout.salt(request.cache_salt)):
                return internals.local_hit(self._manager, request)

        if self._checkouts:
            best = self._checkouts.best(request.prompt_token_ids, hashes, request.cache_salt, reach)
            if best is not None:
                return Match(best.checkout, best.tokens, best.stored, hashes)
        return None if self._index is None else Match(None, 0, None, hashes)

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """Tokens to load beyond the ``local`` ones that the prefix cache has; ``None``: ask again after the next step.

        A request waits while another one loads a page that it needs too, and finds it in the prefix cache then.
        """
        match = self._matches.get(request.request_id)
        if match is None:
            return 0, False
        if match.source is None and not match.is_decided:
            match.tokens, match.is_decided = self._index_tokens(match, request, local), True
        if match.tokens <= local:
            return 0, False
        if self._loading and self.blocks is not None and self.blocks.caching:
            content = match.source.content if match.source is not None else None
            whole = match.tokens // self._size
            full = {(content, group, ref) for group, number, ref in self._pages(match, local) if number < whole}
            if any(full & loading for loading in self._loading.values()):
                return None, False
        return match.tokens - local, True

    def _index_tokens(self, match: Match, request: Any, local: int) -> int:
        if self._index is None:
            return 0
        tokens = chain_tokens(match.hashes, request.num_tokens - 1, self._size, self.windows, self._index.has)
        if tokens <= local or not self._index.pays(tokens - local):
            return 0
        return tokens

    def _pages(self, match: Match, local: int) -> Iterable[tuple[int, int, int | str]]:
        """Group, block number and reference of each page that a request needs beyond ``local`` tokens."""
        for group, place in blocks_of(match.tokens, local, self.windows, self._size):
            ref: int | str | None
            if match.stored is not None:
                ref = match.stored.pages[group][place]
            elif match.source is not None:
                ref = match.source.by_hash[group].get(match.hashes[place])
            else:
                ref = match.hashes[place].hex()
            if ref is not None:
                yield group, place, ref

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], external: int) -> None:
        """vLLM has found room for the tokens that `matched` promised."""
        match = self._matches.get(request.request_id)
        if not external or match is None or self.blocks is None:
            return
        pages = []
        for group, number, ref in self._pages(match, match.tokens - external):
            block = block_ids[group][number]
            if block:  # 0: out of the window
                fill = min(self._size, match.tokens - number * self._size)
                name = match.hashes[number].hex() if fill == self._size else None
                pages.append((Place(group, block, self.blocks.generation[block], fill, name), ref))
        content = None if match.source is None else match.source.content
        self._loading[request.request_id] = {(content, place.group, ref) for place, ref in pages}
        self._plan.loads.append(Load(request.request_id, content, pages))

    def plan(self, output: Any) -> StepPlan:
        """What to tell the workers with this step."""
        for new in output.scheduled_new_reqs:
            self._first_step(new.req_id)
        if self._index is not None:
            for request_id in output.num_scheduled_tokens:
                self._save(request_id)
            self._index.step_begins(output.total_num_scheduled_tokens)
        if self._holding is not None:
            self._holding.settle()
        plan, self._plan = self._plan, StepPlan()
        return plan

    def _first_step(self, request_id: str) -> None:
        request = self._live.get(request_id)
        if request is None:
            return
        if requests.draws(request.sampling_params):
            self._plan.seeded.append(request_id)
        start = self._starts.pop(request_id, None)
        if start is not None:
            if start.prompt_tokens is not None:
                internals.become_output(request, start.prompt_tokens)
            self._plan.starts.append(start)

    def stepped(self, finished: Iterable[str], report: Any) -> None:
        """What the workers answered."""
        for request_id in finished:
            self._loading.pop(request_id, None)
        report = report if isinstance(report, StepReport) else None
        if report is not None:
            for request_id in report.failed:  # vLLM decides: it fails, or is computed; not loaded again
                self._matches.pop(request_id, None)
                request = self._live.get(request_id)
                if request is not None and request_id in self._salts:  # what it computes is no snapshot's
                    internals.resalt(request, internals.salt_of_failed(request, self._salts.pop(request_id)))
        if self._index is not None:
            self._index.step_ends(report)

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> None:
        """A request has ended; its blocks are about to be let go."""
        request_id = request.request_id
        # vLLM has set the request's state to finished by now, so only we know that its blocks are not filled
        if internals.is_plain(request) and self._holding is not None and request_id not in self._loading:
            names = [name.hex() for name in self._base_hashes(request)]
            self._holding.end(self._sequence(request, block_ids, finished=True), names)
            self._remember(request)
            if self._index is not None:
                self._save(request_id)
        for table in (self._live, self._matches, self._starts, self._salts, self._saved, self._prompts):
            table.pop(request_id, None)

    def close(self) -> None:
        """Stop threads."""
        if self._index is not None:
            self._index.close()

    def forget(self) -> None:
        """The weights may have changed: nothing that was stored need fit any more.

        vLLM says so when it clears its caches, also where the weights stay. Checkouts are dropped, and the durable
        prefix cache is neither read nor written until a restart.
        """
        self._checkouts.clear()
        self._matches.clear()
        if self._holding is not None:
            self._holding.forget()
        if self._index is not None:
            log.warning("caches were cleared: the durable prefix cache is off until a restart")
            self._index.close()
            self._index = None

    # -- the durable prefix cache --------------------------------------------------------------------------------

    def _save(self, request_id: str) -> None:
        """Send a request's newly finished blocks to the workers, but for those that the store has."""
        request = self._live.get(request_id)
        if request is None or self._index is None or self.blocks is None or self._manager is None:
            return
        if request_id in self._salts or not internals.is_plain(request) or requests.cartridge(request):
            return
        done = min(internals.computed_tokens(request) // self._size, len(request.block_hashes))
        first = self._saved.get(request_id, 0)
        if done <= first:
            return
        self._saved[request_id] = done
        tables = self._manager.get_block_ids(request_id)
        for group, table in enumerate(tables):
            for number in range(first, done):
                name = request.block_hashes[number]
                block = table[number]
                if self._index.has(group, name):
                    self._plan.uses.append((group, name.hex()))
                elif block and self._is_new(group, name):
                    self._plan.saves.append(Place(group, block, self.blocks.generation[block], self._size, name.hex()))

    def _is_new(self, group: int, name: bytes) -> bool:
        """Whether a block was not sent to be stored within the last seconds, in which the index does not know it."""
        now, key = time.monotonic(), (group, name)
        sent = self._sent.get(key)
        if sent is not None and now - sent < _RESEND_S:
            return False
        self._sent[key] = now
        self._sent.move_to_end(key)
        while now - next(iter(self._sent.values())) > _RESEND_S:
            self._sent.popitem(last=False)
        return True

    # -- snapshots -----------------------------------------------------------------------------------------------

    def check_out(
        self, cid: str, content: str, by_hash: list[dict[bytes, int]], sequences: Sequence[Stored]
    ) -> list[str]:
        """Let requests continue a snapshot; see `Checkout`. Returns contents that none can continue any more."""
        dropped = self._checkouts.add(cid, content, by_hash, sequences)
        taken = {match.source.content for match in self._matches.values() if match.source is not None}
        return [name for name in dropped if name not in taken]

    def content(self, cid: str) -> str:
        """See `Checkouts.content`."""
        return self._checkouts.content(cid)

    @property
    def checkouts(self) -> list[str]:
        """Cids of the snapshots that requests may continue."""
        return self._checkouts.cids

    def capture(self, wanted: str | None) -> CapturePlan:
        """Decide what a snapshot holds, and pin it.

        Args:
            wanted: a request, live or recently finished, by vLLM's id or by what the client knows of it; ``None``: all
                live requests and the prefix cache.

        Raises:
            NotFound: no such request.
        """
        assert self._holding is not None
        live = [request for request in self._live.values() if internals.is_plain(request)]
        if wanted is not None:
            live = [request for request in live if names.is_called(request.request_id, wanted)]
        places: Places = {}
        sequences = [self._running(request, places) for request in live]
        if wanted is not None and not live:
            sequences = self._holding.ended(lambda name: names.is_called(name, wanted), places)
            if not sequences:
                raise NotFound(f"no live or recently finished request {wanted!r}", hint="name it by X-Request-Id")
        return self._holding.capture(sequences, places, self._cached(places) if wanted is None else ())

    def _cached(self, places: Places) -> Iterator[Place]:
        """What the prefix cache holds beside ``places``."""
        assert self.blocks is not None
        for block, group, name in self.blocks.cached():
            if (group, block) not in places:
                yield Place(group, block, self.blocks.generation[block], self._size, self._base_name(name))

    def gone(self, capture: str) -> list[tuple[int, int]]:
        """See `Holding.gone`."""
        assert self._holding is not None
        return self._holding.gone(capture)

    def release(self, capture: str) -> None:
        """Let go of what a capture pinned. Idempotent."""
        assert self._holding is not None
        self._holding.release(capture)

    def draws(self, wanted: str | None) -> bool:
        """Whether a capture would hold a live sequence that draws with a generator."""
        return any(
            requests.draws(request.sampling_params) and (wanted is None or names.is_called(request.request_id, wanted))
            for request in self._live.values()
        )

    def _running(self, request: Any, places: Places) -> SequencePlan:
        assert self._holding is not None
        sequence = self._sequence(request, self._manager.get_block_ids(request.request_id), finished=False)
        self._holding.add(sequence, [name.hex() for name in self._base_hashes(request)], places)
        return sequence

    def _sequence(self, request: Any, tables: Sequence[Sequence[int]], *, finished: bool) -> SequencePlan:
        cached = 0 if request.request_id in self._loading else internals.computed_tokens(request)
        last = -(-cached // self._size)
        blocks = []
        for table in tables:
            held = list(table[:last])
            first = next((number for number, block in enumerate(held) if block), len(held))
            blocks.append((first if held[first:] else 0, held[first:]))
        params = request.sampling_params
        state: dict[str, Any] = {
            "prompt_tokens": self._prompts.get(request.request_id, request.num_prompt_tokens),
            "finished": finished,
            "sampling": requests.sampling(params),
        }
        cartridge = requests.cartridge(request)
        if cartridge is not None:
            state["cartridge"] = cartridge
        salt = self._salts.get(request.request_id, request.cache_salt)
        if salt is not None:
            state["salt"] = digest(salt)
        not_carried = requests.not_carried(params)
        if not_carried:
            state["not_carried"] = not_carried
        return SequencePlan(
            names.sequence_id(request.request_id),
            request.request_id,
            list(request.all_token_ids),
            cached,
            blocks,
            state,
        )

    # -- names of blocks -----------------------------------------------------------------------------------------

    def _base_hashes(self, request: Any) -> list[bytes]:
        """A request's block hashes without the salt that restoring gave it."""
        if request.request_id not in self._salts:
            return list(request.block_hashes)
        with internals.salted(request, self._salts[request.request_id]) as hashes:
            return list(hashes)

    def _remember(self, request: Any) -> None:
        """Keep how the blocks of a restored request are called without its salt: they stay in the prefix cache."""
        if request.request_id in self._salts:
            for name, base in zip(request.block_hashes, self._base_hashes(request), strict=False):
                self._names[name] = base.hex()
                self._names.move_to_end(name)
            assert self.blocks is not None
            while len(self._names) > 4 * len(self.blocks.generation):
                self._names.popitem(last=False)

    def _base_name(self, name: bytes) -> str:
        return self._names.get(name) or name.hex()


def _is_under(stored: Stored, salt: str | None) -> bool:
    """Whether a request that came with ``salt`` made a sequence: what one tenant computed is not told to another."""
    cartridge = stored.state.get("cartridge")
    if isinstance(cartridge, dict):  # then its salt is of our making
        salt = salt_of(str(cartridge.get("identity")), salt)
    return stored.state.get("salt") == digest(salt)
