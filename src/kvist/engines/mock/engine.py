"""`MockEngine`: the simulator's scheduler by the clock on the wall. Everything is real but the computing.

One task on one asyncio loop drives the scheduler pass by pass: it sleeps until a pass is over, publishes what the pool
stored and removed, and tells each request of its tokens. Which tokens these are was decided before; the scheduler
decides when they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Final, Protocol

from kvist.blocks.events import Event
from kvist.engines.mock.contents import ContentTable
from kvist.engines.mock.ticket import Answer, Ticket
from kvist.errors import EngineError, InvalidInput
from kvist.hashing.vllm import block_hashes
from kvist.sim.config import ENGINE_POLICY, EngineConfig
from kvist.sim.managed import ManagedPool
from kvist.sim.pool import Contents, SlotPool
from kvist.sim.requests import Requests
from kvist.sim.scheduler import Scheduler
from kvist.sim.timing import Clock

_CATCH_UP_NS: Final = 50_000_000
"""So late a pass may end and the next still begin when it should have: timers are coarse, and that must not add up."""
_CLOSED: Final = "the mock engine is closed"


class Observer(Protocol):
    """Who measures an engine; called on its loop."""

    def on_token(self, ticket: Ticket, seconds: float) -> None:
        """A request got a token, ``seconds`` after the one before it, or after it came."""

    def on_pass(self, tokens: int) -> None:
        """A pass is over that computed so many tokens."""

    def on_end(self, ticket: Ticket) -> None:
        """A request has all of its tokens, or its client left, or it failed."""


class MockEngine:
    """One worker. All methods are to be called on the loop that runs `run`, but for `answer`.

    Attributes:
        config: what it is.
        max_model_len: tokens of prompt and answer together.
        preemptions: times that a request gave way and came back.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        publish: Callable[[Sequence[Event]], object] | None = None,
        observer: Observer | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """
        Args:
            config: its pool, its scheduler, how long passes take.
            publish: gets the events of each pass.
            observer: who measures.
            clock: nanoseconds that only grow.

        Raises:
            InvalidInput: sequences that the pool, or a pass without chunks, cannot hold.
        """
        self.max_model_len = config.capacity_tokens if config.max_model_len is None else config.max_model_len
        _require_fit(config, self.max_model_len)
        self.config = config
        self.preemptions = 0
        self._publish, self._observer, self._clock = publish, observer, clock
        self._contents = ContentTable(config.block_size)
        self._requests = Requests()
        self._pool = _pool_of(config)
        self._scheduler = Scheduler(config, self._requests, self._pool, _clock_of(config), longest_jump=1)
        self._tickets: dict[int, Ticket] = {}  # by row
        self._free_rows: list[int] = []
        self._leaving: list[Ticket] = []  # cancelled since the last pass
        self._bell = asyncio.Event()
        self._is_closed = False
        self._next_event = self._prefilled = 0
        self._epoch = clock()  # of the scheduler's time; later where the loop was too slow for the timing

    @property
    def num_running(self) -> int:
        """Requests in the pass under way."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def usage(self) -> float:
        """Part of the pool's slots that requests hold, 0 to 1."""
        used: int = self._pool.num_used
        return used / self._pool.num_slots

    def answer(self, prompt: Sequence[int], tokens: Sequence[int], finish_reason: str) -> Answer:
        """Make an answer ready to be submitted. May be called in any thread; takes as long as hashing does.

        Args:
            prompt: token ids, at least one.
            tokens: what to answer, at least one.
            finish_reason: ``"stop"`` or ``"length"``.

        Raises:
            InvalidInput: no tokens; more than a sequence may have; ids outside [0, 2^32).
        """
        if not prompt or not tokens:
            raise InvalidInput(f"expected a prompt and an answer, got {len(prompt)} and {len(tokens)} tokens")
        total = len(prompt) + len(tokens)
        if total > self.max_model_len:
            raise InvalidInput(f"a sequence may have {self.max_model_len} tokens, got {len(prompt)} + {len(tokens)}")
        # The last token is never computed, so a block that it would fill never comes to be.
        sequence = [*prompt, *tokens[:-1]]
        hashes = block_hashes(sequence, self.config.block_size) if self.config.prefix_caching else []
        return Answer(len(prompt), tokens, finish_reason, sequence, hashes)

    def submit(self, answer: Answer, deliver: Callable[[Ticket], None]) -> Ticket:
        """Queue a request.

        Args:
            answer: of `answer`.
            deliver: called when the request got a token, and when it ends by an error; not after `Ticket.cancel`.

        Raises:
            EngineError: the engine is closed.
        """
        if self._is_closed:
            raise EngineError(_CLOSED)
        contents = self._contents.take(answer.hashes, answer.sequence)
        if isinstance(self._pool, SlotPool):
            self._pool.grow(len(self._contents))
        row = self._row(answer, contents)
        ticket = Ticket(answer, self._clock(), deliver, self._leaving.append)
        self._tickets[row] = ticket
        now = self._now()
        self._requests.arrival[row] = now
        self._scheduler.submit(row, now)
        self._bell.set()
        return ticket

    def num_held(self, token_ids: Sequence[int]) -> int:
        """Leading full blocks of a sequence that the pool holds."""
        hashes = block_hashes(token_ids, self.config.block_size)
        return len(self._pool.find(self._contents.find(hashes)))

    async def run(self) -> None:
        """Work until cancelled, or until `close`."""
        try:
            while not self._is_closed:
                await self._turn()
        finally:
            self.close()

    def close(self) -> None:
        """End all requests with an error, and take no more. Closing twice is nothing."""
        self._is_closed = True
        self._bell.set()
        for ticket in self._tickets.values():
            self._fail(ticket, EngineError(_CLOSED))

    async def _turn(self) -> None:
        """Wait for the end of the pass, or for work; then begin the next pass."""
        scheduler = self._scheduler
        self._bell.clear()
        if scheduler.wake is None:
            await self._bell.wait()
            return
        late = self._now() - scheduler.wake
        if late > _CATCH_UP_NS:
            self._epoch += late
        await asyncio.sleep(max(0.0, -late / 1e9))
        if not self._is_closed:
            # A pass begins when the one before it ended, however late we are told.
            now = scheduler.wake if scheduler.is_busy else max(scheduler.wake, self._now())
            self._step(now)
            scheduler.begin(now)

    def _step(self, now: int) -> None:
        """End a pass: tell of the pool, give tokens, and let those go that are done or whose clients left."""
        scheduler = self._scheduler
        ended = scheduler.step()
        scheduler.gaps.clear()  # a replay wants them; here the observer measures
        left = [row for row, ticket in self._tickets.items() if ticket.is_cancelled] if self._leaving else []
        self._leaving.clear()
        for row in left:
            scheduler.abort(row, now)
        self._tell()
        for row in ended.tokens:
            self._note_admission(row)
            self._give_token(self._tickets[row])
        tokens = scheduler.prefilled - self._prefilled + len(ended.tokens)
        self._prefilled = scheduler.prefilled
        if tokens and self._observer is not None:
            self._observer.on_pass(tokens)
        for row in ended.rejected:
            self._fail(self._tickets[row], EngineError("the pool is too small for the request"))
        for row in dict.fromkeys((*ended.finished, *ended.rejected, *left)):
            self._forget(row)

    def _tell(self) -> None:
        """Publish what the pool stored and removed."""
        scheduler, pool = self._scheduler, self._pool
        moves = [move for _, moves in scheduler.news for move in moves] + pool.moves
        scheduler.news.clear()
        pool.moves.clear()
        changes = self._contents.tell((came, contents) for came, contents, _ in moves)
        if changes and self._publish is not None:
            self._publish([Event(self._next_event + place, data) for place, data in enumerate(changes)])
        self._next_event += len(changes)

    def _note_admission(self, row: int) -> None:
        """Note how a request came to run, if it is news."""
        ticket, requests = self._tickets[row], self._requests
        if ticket.admissions == requests.admissions[row]:
            return
        if not ticket.admissions:
            ticket.cached_tokens = requests.first_reused[row]
            ticket.queued = max(0, requests.admitted[row] - requests.arrival[row])
        self.preemptions += requests.admissions[row] - max(1, ticket.admissions)
        ticket.admissions = requests.admissions[row]

    def _give_token(self, ticket: Ticket) -> None:
        if ticket.is_over:
            return
        now = self._clock()
        since = now - (ticket.last if ticket.generated else ticket.came)
        if not ticket.generated:
            ticket.first = now
        ticket.last = now
        ticket.generated += 1
        if self._observer is not None:
            self._observer.on_token(ticket, since / 1e9)
        ticket.deliver(ticket)

    def _fail(self, ticket: Ticket, error: EngineError) -> None:
        if not ticket.is_over:
            ticket.error = error
            ticket.deliver(ticket)

    def _forget(self, row: int) -> None:
        """A request is over, and out of the scheduler."""
        ticket = self._tickets.pop(row)
        self._contents.give_back(self._requests.blocks[row])
        self._free_rows.append(row)
        if self._observer is not None:
            self._observer.on_end(ticket)

    def _row(self, answer: Answer, contents: Contents) -> int:
        """A row of the request table, new or used before."""
        # All blocks that will ever be are known, so none is the request's own; without a cache they have no names.
        columns = (answer.prompt_tokens, len(answer.tokens), contents, 0)
        if not self._free_rows:
            return self._requests.add(*columns)
        fresh = Requests()
        fresh.add(*columns)
        row = self._free_rows.pop()
        for column in fields(Requests):
            getattr(self._requests, column.name)[row] = getattr(fresh, column.name)[0]
        return row

    def _now(self) -> int:
        return self._clock() - self._epoch


def _pool_of(config: EngineConfig) -> SlotPool | ManagedPool:
    if config.policy != ENGINE_POLICY:
        return ManagedPool(config, tell=True)
    # Without a cache blocks have no names, and yet are looked up, by the numbers from 0 on.
    return SlotPool(config.num_blocks, 0 if config.prefix_caching else config.num_blocks, tell=True)


def _clock_of(config: EngineConfig) -> Clock:
    speedups = {"speedup": config.speedup, "decode_speedup": config.decode_speedup}
    return Clock(config.timing, config.capacity_tokens, **speedups)


def _require_fit(config: EngineConfig, longest: int) -> None:
    """Refuse what could bring about a request that never runs, and what has no live form."""
    if config.scheduling == "sglang" or config.tiers is not None or config.host_offload is not None:
        raise InvalidInput("a mock engine has vLLM's or TensorRT-LLM's scheduling, and no memory below its pool")
    if longest > config.capacity_tokens:
        raise InvalidInput(
            f"max_model_len must be at most the pool's {config.capacity_tokens} tokens (num_blocks {config.num_blocks} "
            f"of block_size {config.block_size}); got {longest}"
        )
    if longest > config.max_num_batched_tokens and not config.chunked_prefill:
        raise InvalidInput(
            f"without chunked_prefill, max_num_batched_tokens must be at least max_model_len ({longest}); got "
            f"{config.max_num_batched_tokens}"
        )
