"""One engine in virtual time, scheduled pass by pass as vLLM does it.

A pass gives every running sequence its next token and spends what is left of the token budget on prompts: first that
of the sequence whose prompt is under way, then those of the queue, in order. Blocks are taken when the pass begins and
may be found by others from then on; tokens appear when it ends. Where slots run out a running sequence gives way: its
blocks go back to the pool, and it to the head of the queue, to be computed anew.

Passes that only decode come in long rows. Their times follow from the number of sequences and the sum of their
lengths, so a row is one jump: it ends where a sequence ends or slots run out, or earlier, at the end of the pass in
which a request comes that could be admitted. Rules: vLLM 0.32's V1 scheduler; times and corner cases: Dynamo 1.6.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from kvist.sim.below import Below, Fetch
from kvist.sim.config import EngineConfig
from kvist.sim.decodes import Decodes, Sequence
from kvist.sim.managed import ManagedPool
from kvist.sim.pool import Move, SlotPool, Slots
from kvist.sim.records import Segment
from kvist.sim.requests import NEVER, Requests
from kvist.sim.timing import Clock, Nanoseconds

LONGEST_JUMP = 4096  # passes planned at once
_NONE: Slots = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Ended:
    """What a step brought about.

    Attributes:
        first: requests that got their first token.
        finished: that got their last.
        rejected: that can never run.
        tokens: all that got one, where a step is one pass.
        held: whose prompts are computed, and wait to be handed over.
    """

    first: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Prompts:
    """Prompt work of one pass.

    Attributes:
        budget: tokens that it may still take.
        gave_way: whether a sequence was preempted for it: then nobody else is admitted.
        waits: whether somebody must wait for slots that are still read: neither, and the next pass tries again.
        is_any: whether tokens are computed that no decoding sequence computes.
    """

    budget: int
    gave_way: bool = False
    waits: bool = False
    is_any: bool = False
    count: int = 0
    lengths: int = 0
    prefixes: int = 0

    @property
    def tokens(self) -> int:
        """New prompt tokens as Dynamo counts them: requests times the mean of each, rounded down."""
        return self.count * (self.lengths // self.count - self.prefixes // self.count) if self.count else 0


class Scheduler:
    """One worker.

    Args:
        engine: its configuration.
        requests: of the replay; rows are updated in place.
        pool: its slots.
        clock: how long passes take.
        below: memory that the device's blocks go to and come from.
        worker: its number.
        longest_jump: passes that one step may be; 1 for a live engine, which shows every token.
        timeline: whether segments are kept.

    Attributes:
        wake: when `step` is next due, in ns; ``None``: nothing will happen by itself.
        is_busy: whether passes are under way.
        waiting: requests in the queue.
        news: moves in the pool, each with the end of the pass that made it; whoever reads them empties the list.
        gaps: times between tokens, each with the number of sequences that it is of.
        passes: how many there were.
        busy: ns in passes.
        prefilled: tokens that were computed as prompts.
        segments: passes for a timeline.
        times: of the passes under way, in ns.
    """

    def __init__(
        self,
        engine: EngineConfig,
        requests: Requests,
        pool: SlotPool | ManagedPool,
        clock: Clock,
        *,
        below: Below | None = None,
        worker: int = 0,
        longest_jump: int = LONGEST_JUMP,
        timeline: bool = False,
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.pool = pool
        self.worker = worker
        self.wake: int | None = None
        self.is_busy = False
        self.waiting: deque[int] = deque()
        self.news: list[tuple[int, list[Move]]] = []
        self.gaps: list[tuple[Nanoseconds, int]] = []
        self.passes = self.busy = self.prefilled = 0
        self.segments: list[Segment] | None = [] if timeline else None
        self._clock = clock
        self._below = below
        self._longest_jump = longest_jump
        self._ready_at = round(engine.startup_ms * 1e6)
        self._order = 0
        self._decodes = Decodes(engine.block_size)
        self._partial: Sequence | None = None  # its prompt is under way
        self._joining: list[Sequence] = []  # their prompts end with the pass under way
        self._parked: set[int] = set()  # requests whose blocks come from below
        self._rejected: list[int] = []
        self._once: list[int] = []  # requests whose first token came with the last pass
        self._promised = 0  # blocks that running sequences may still take, where nobody is preempted
        # The passes under way.
        self._start = 0
        self.times: Nanoseconds = np.empty(0, dtype=np.int64)
        self._plan: Nanoseconds = self.times  # their ends
        self._end = 0  # of the passes before
        self._owed = 0  # of the passes planned, the first from which slots are still to be taken
        self._blocked = False  # the head of the queue waits for another's end
        self._seen = (0, 0, 0)  # prompt tokens of the pass; requests that waited and slots in use when it began

    @property
    def running(self) -> list[int]:
        """Requests that run, in the order of their admission."""
        rest = self._joining if self._partial is None else [*self._joining, self._partial]
        return [*self._decodes.requests, *(each.request for each in rest)]

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self.waiting or self._decodes or self._partial or self._joining or self._parked)

    def submit(self, request: int, now: int) -> None:
        """Queue a request; a jump under way ends with the pass that is under way now, if it may be admitted then."""
        self.waiting.append(request)
        self.requests.worker[request] = self.worker
        if not self.is_busy:
            self.wake = max(now, self._ready_at)
        elif len(self._plan) > 1 and not self._blocked:
            self.cut(now)

    def abort(self, request: int, now: int) -> None:
        """Drop a request whose client left; what it computed stays in the cache. An unknown one is no error."""
        if request in self.waiting:
            self.waiting.remove(request)
            return
        self._parked.discard(request)
        self.settle(now)
        self.cut(now)
        for sequence in (*self._decodes, *self._joining, self._partial):
            if sequence is not None and sequence.request == request:
                self._leave(sequence, computed_all=self.is_busy and self._owed > 0)
                return

    def step(self) -> Ended:
        """End the passes that end at `wake`; `begin` starts the next."""
        ended = Ended(rejected=self._rejected)
        self._rejected = []
        now = self.wake
        if not self.is_busy or now is None:
            self.wake = None
            return ended
        self._commit(len(self._plan))
        self.is_busy = False
        requests, decodes = self.requests, self._decodes
        if self._longest_jump == 1:
            ended.tokens = [*decodes.requests, *(each.request for each in self._joining)]
        # Who asked for no answer gives its slots back first.
        self._joining.sort(key=lambda each: each.known < each.total)
        while self._joining and self._joining[0].known >= self._joining[0].total:
            self._join(self._joining.pop(0), now, ended)
        while (done := decodes.pop_ended()) is not None:
            requests.last_token[done.request] = now
            requests.generated[done.request] = done.total - requests.input_tokens[done.request]
            self._leave(done)
            ended.finished.append(done.request)
        for sequence in self._joining:
            self._join(sequence, now, ended)
        self._joining = []
        self.wake = None if self.is_idle else now
        return ended

    def settle(self, now: int) -> None:
        """Carry out the passes that have ended by now, so that the pool shows what it holds."""
        if self.is_busy and len(self._plan) > 1 and self._plan[0] <= now:
            done = int(self._plan.searchsorted(now, side="right"))
            if done < len(self._plan):
                self._commit(done)

    def begin(self, now: int) -> None:
        """Start the next pass or jump, if there is anything to do."""
        if self.is_busy or now < self._ready_at or self.is_idle:
            return
        pool, decodes, below = self.pool, self._decodes, self._below
        if below is not None and not self._bring(below, now):
            self.wake = below.deadline()
            return
        needed = decodes.blocks(0, 1)
        self._start = now
        self._seen = (0, len(self.waiting), pool.num_used)
        if decodes and needed <= pool.num_sure and self._partial is None and not self.waiting:
            self._owed = 0
            self._plan_passes(decodes.passes_ahead(pool.num_sure, self._longest_jump), 0)
        else:
            self._begin_pass(now, needed)
        if self._parked and below is not None and (due := below.deadline()) is not None:
            self.cut(due)

    def _begin_pass(self, now: int, needed: int) -> None:
        """A pass with prompts, or one in which slots are short; a jump if it turns out to be neither."""
        decodes, pool = self._decodes, self.pool
        prompts = Prompts(self.engine.max_num_batched_tokens)
        self._take_decode_slots(needed, prompts)
        if prompts.waits:
            self.wake = self._stalled()
            return
        prompts.budget -= len(decodes)
        if self._partial is not None:
            self._continue(self._partial, prompts)
        if not (prompts.gave_way or prompts.waits):
            self._admit(now, prompts)
        if not (decodes or prompts.is_any or prompts.gave_way or self._rejected):
            self.wake = self._stalled()
            return
        passes = 1
        if decodes and not (prompts.is_any or prompts.gave_way or prompts.waits):
            free = pool.num_sure + decodes.blocks(0, 1)
            passes = decodes.passes_ahead(free, self._longest_jump)
        self._owed = 1
        self._seen = (prompts.tokens, *self._seen[1:])
        # Dynamo counts as decoding what comes back after a preemption, as its prompt ends with a further token.
        back = [each.known for each in self._joining if self.requests.generated[each.request]]
        prefill = self._clock.prefill_ns(prompts.tokens) if prompts.count else 0
        self._plan_passes(passes, prefill, len(back), sum(back))

    def _stalled(self) -> int | None:
        """Nothing can begin: when to look again."""
        assert self._below is not None, "the head of an idle engine's queue can run"
        return self._below.deadline()

    def _plan_passes(self, passes: int, prefill: int, batch: int = 0, length: int = 0) -> None:
        """Let passes begin: so long for prompts, and the decoding sequences with ``batch`` others of that length."""
        batch += len(self._decodes)
        if batch:
            times = self._clock.decode_ns(batch, self._decodes.length + length, passes)
            if prefill:
                times = times + (prefill + self._clock.mixed_ns)
        else:
            times = np.array([prefill], dtype=np.int64)
        self.times = times
        self._plan = self._start + (times if passes == 1 else times.cumsum())
        self._blocked = bool(self.waiting)
        self.is_busy = True
        self.wake = int(self._plan[-1])

    def align(self, times: Nanoseconds) -> None:
        """Let the passes under way take these times: of other ranks' the longest, and no more passes than those."""
        self.times, self._plan = times, self._start + times.cumsum()
        self.wake = int(self._plan[-1])

    def _commit(self, passes: int) -> None:
        """Carry out the first passes of the plan."""
        decodes, end = self._decodes, int(self._plan[passes - 1])
        for request in self._once:
            if request in decodes:
                self.requests.second_token[request] = int(self._plan[0])
        self._once.clear()
        if decodes:
            self._take(decodes.blocks(self._owed, passes))
            times = self.times[:passes]
            if self._below is not None and self._start > self._end:  # they stood still, for want of slots
                times = np.concatenate((times[:1] + (self._start - self._end), times[1:]))
            self.gaps.append((times, len(decodes)))
            decodes.advance(passes)
        if self.pool.moves:
            self.news.append((end, self.pool.moves))
            self.pool.moves = []
        self.passes += passes
        self.busy += end - self._start
        if self.segments is not None:
            prefill, waiting, used = self._seen
            start, batch = self._start / 1e6, len(decodes)
            self.segments.append(Segment(self.worker, start, end / 1e6, prefill, batch, passes, waiting, used))
        self._start = self._end = end
        self._owed = 0
        self._plan, self.times = self._plan[passes:], self.times[passes:]

    def cut(self, now: int) -> None:
        """End the jump with the pass that is under way now."""
        passes = int(self._plan.searchsorted(now, side="left")) + 1
        if passes < len(self._plan):
            self._plan, self.times = self._plan[:passes], self.times[:passes]
            self.wake = int(self._plan[-1])

    # Prompts.

    def _bring(self, below: Below, now: int) -> bool:
        """Queue the requests whose blocks have come; returns whether there is room for what decodes."""
        below.advance(now)
        arrived = [request for request in below.arrived() if request in self._parked]
        self._parked.difference_update(arrived)
        self.waiting.extendleft(reversed(arrived))
        return self.pool.prepare(min(self._decodes.blocks(0, 1), self.pool.num_free))

    def _admit(self, now: int, prompts: Prompts) -> None:
        """Let requests of the queue run while tokens, seats and slots last."""
        engine, requests, pool = self.engine, self.requests, self.pool
        size = engine.block_size
        while len(self._joining) + (self._partial is not None) < engine.max_num_seqs - len(self._decodes):
            request = self._head()
            if request is None:
                return
            if self._land(request, prompts):
                continue
            prompt = requests.input_tokens[request]
            known = prompt + requests.generated[request]
            total = self._total(request)
            longest = known if engine.scheduling == "vllm" else total
            if longest > engine.capacity_tokens or (engine.max_model_len or prompt + 1) <= prompt:
                self.waiting.remove(request)
                requests.rejected[request] = True
                self._rejected.append(request)
                continue
            chain = requests.contents(request, 0, (known - 1) // size)
            if self._below is not None:
                fetch = self._below.fetch(request, chain, now)
                if fetch is Fetch.WAIT:
                    prompts.waits = True
                    return
                if fetch is Fetch.COMING:
                    self._parked.add(request)
                    self.waiting.remove(request)
                    continue
            found = pool.find(chain)
            # What others hold costs nothing; what is held by nobody takes a slot of the free ones.
            if -(-longest // size) - pool.num_held(found) > pool.num_free - self._promised:
                return
            cached = len(found) * size
            tokens = min(known - cached, prompts.budget)
            if not tokens or (prompt - cached > prompts.budget and not engine.chunked_prefill):
                return
            fresh = pool.acquire(found, -(-(cached + tokens) // size) - len(found))
            if fresh is None:
                prompts.waits = True
                return
            self.waiting.remove(request)
            sequence = Sequence(request, self._order, total, known, cached, found)
            self._order += 1
            self._compute(sequence, fresh, tokens, prompts)
            if engine.scheduling == "trtllm":
                self._promised += -(-total // size) - len(sequence.slots)
            self._note_admission(request, cached, now)
            if sequence.computed < known:
                self._partial = sequence

    def _head(self) -> int | None:
        """Who is to be admitted next."""
        return self.waiting[0] if self.waiting else None

    def _land(self, request: int, prompts: Prompts) -> bool:
        """Let a request decode whose prompt was computed elsewhere; returns whether it was."""
        return False

    def _note_admission(self, request: int, cached: int, now: int) -> None:
        requests = self.requests
        if not requests.admissions[request]:
            requests.admitted[request] = now
            requests.first_reused[request] = cached
        requests.reused[request] = max(requests.reused[request], cached)
        requests.admissions[request] += 1

    def _total(self, request: int) -> int:
        """Tokens at which a request ends."""
        engine, prompt = self.engine, self.requests.input_tokens[request]
        total = prompt + self.requests.output_tokens[request]
        if engine.max_model_len is not None:
            total = min(total, engine.max_model_len)
        if engine.scheduling == "trtllm" and prompt < engine.capacity_tokens:
            total = min(total, engine.capacity_tokens)
        return total

    def _continue(self, sequence: Sequence, prompts: Prompts) -> None:
        """Go on with the prompt that is under way."""
        tokens = min(sequence.known - sequence.computed, prompts.budget)
        if not tokens:
            return
        wanted = -(-(sequence.computed + tokens) // self.engine.block_size) - len(sequence.slots)
        decodes = len(self._decodes)
        runs = self._make_room(sequence, wanted)
        fresh = self.pool.acquire(_NONE, wanted) if runs else None
        prompts.budget += decodes - len(self._decodes)
        prompts.gave_way = prompts.gave_way or not runs or decodes > len(self._decodes)
        prompts.waits = runs and fresh is None
        if fresh is not None:
            self._partial = None
            self._promised -= wanted if self.engine.scheduling == "trtllm" else 0
            self._compute(sequence, fresh, tokens, prompts)
            if sequence.computed < sequence.known:
                self._partial = sequence

    def _compute(self, sequence: Sequence, fresh: Slots, tokens: int, prompts: Prompts) -> None:
        """Compute so many tokens in this pass; the blocks that they fill can be found at once."""
        size, before = self.engine.block_size, sequence.computed
        prompt = self.requests.input_tokens[sequence.request]
        if len(fresh):
            sequence.slots = np.concatenate((sequence.slots, fresh))
        sequence.computed += tokens
        self._cache(sequence, before // size, sequence.computed // size)
        self.prefilled += tokens
        prompts.is_any = True
        prompts.budget -= tokens
        if before < prompt:
            prompts.count += 1
            prompts.lengths += min(sequence.computed, prompt)
            prompts.prefixes += before
        if sequence.computed == sequence.known:
            self._joining.append(sequence)

    def _cache(self, sequence: Sequence, start: int, end: int) -> None:
        if start < end and self.engine.prefix_caching:
            chain = self.requests.contents(sequence.request, 0, end)
            sequence.slots[start:end] = self.pool.cache(sequence.slots[start:end], chain)

    def _join(self, sequence: Sequence, now: int, ended: Ended) -> None:
        """The prompt of a sequence is computed: it has its next token, and decodes from the next pass on."""
        requests, request = self.requests, sequence.request
        if sequence.known < sequence.total:  # otherwise it asked for none
            if requests.first_token[request] == NEVER:
                requests.first_token[request] = now
                ended.first.append(request)
                self._once.append(request)
            else:
                self.gaps.append((np.array([now - requests.last_token[request]]), 1))
                if requests.second_token[request] == NEVER:
                    requests.second_token[request] = now
            requests.last_token[request] = now
            requests.generated[request] += 1
        if sequence.known + 1 < sequence.total:
            self._decodes.add(sequence)
        else:
            self._release(sequence)
            ended.finished.append(request)

    # Slots of what decodes, and giving way.

    def _take_decode_slots(self, needed: int, prompts: Prompts) -> None:
        """Slots for the next pass, for which sequences may have to give way; all of them, or none if some are read."""
        decodes, pool = self._decodes, self.pool
        if needed <= pool.num_free:
            self._take(needed)
            return
        prompts.gave_way = True
        for sequence in list(decodes):
            runs = sequence.request in decodes
            if runs and decodes.needs_block(sequence) and self._make_room(sequence, 1):
                if not pool.prepare(1):
                    earlier = islice(decodes, list(decodes).index(sequence))
                    pool.release(decodes.take_back(sum(map(decodes.needs_block, earlier))))
                    prompts.waits = True
                    return
                self._take(1)

    def _make_room(self, sequence: Sequence, slots: int) -> bool:
        """Have others give way until so many slots are free; returns whether the sequence itself still runs."""
        decodes, requests, is_fifo = self._decodes, self.requests, self.engine.preemption == "fifo"
        while self.pool.num_free < slots:
            if is_fifo and decodes:
                victim = next(iter(decodes))
            else:
                victim = self._partial or next(reversed(decodes))
            if victim.joined != NEVER:
                generated = decodes.length_of(victim) - requests.input_tokens[victim.request]
                requests.generated[victim.request] = generated
                requests.last_token[victim.request] = self._end
            # The first to come has its slot for this pass already, and what it fills can be found.
            self._leave(victim, computed_all=is_fifo and victim is not sequence)
            self.waiting.appendleft(victim.request)
            if victim is sequence:
                return False
        return True

    def _take(self, n: int) -> None:
        if n:
            fresh = self.pool.acquire(_NONE, n)
            assert fresh is not None, "what was counted as free is free"
            self._decodes.keep(fresh)
            self._promised -= n if self.engine.scheduling == "trtllm" else 0

    def _leave(self, sequence: Sequence, *, computed_all: bool = False) -> None:
        """Take a sequence out of the running ones, and give its slots back.

        The last token of one that decodes is known, and not computed unless ``computed_all`` says so.
        """
        if sequence.joined != NEVER:
            computed = self._decodes.length_of(sequence) - (not computed_all)
            self._decodes.remove(sequence)
            sequence.slots = self._decodes.slots_of(sequence, computed)
            size = self.engine.block_size
            self._cache(sequence, sequence.computed // size, computed // size)
        elif sequence is self._partial:
            self._partial = None
        else:
            self._joining.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._drop_promise(sequence)
        self.pool.release(sequence.slots[::-1])

    def _drop_promise(self, sequence: Sequence) -> None:
        if self.engine.scheduling == "trtllm":
            self._promised -= -(-sequence.total // self.engine.block_size) - len(sequence.slots)
