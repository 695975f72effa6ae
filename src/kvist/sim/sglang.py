"""One engine in virtual time, scheduled as SGLang does it: a pass either computes prompts, or decodes.

While a batch of prompts can be formed, what runs stands still; so the times between tokens are those of many passes.
Prompts are admitted by an estimate of what the running sequences will still need, a part of what they may ask for
that shrinks with each decode pass. Where pages run out in spite of it, the sequence with the fewest tokens is
retracted: it goes to the end of the queue, and the estimate is made anew.

Rules, times and corner cases: Dynamo 1.6.1's mocker. Rows of decode passes are one jump, as in
`kvist.sim.scheduler`; what the sequences of a row add to the tree is put there when the row is left, under the pass
and the place in which each would have done it.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvist.errors import PoolExhausted
from kvist.sim.config import EngineConfig
from kvist.sim.pool import Move
from kvist.sim.radix import Node, RadixCache
from kvist.sim.records import Segment
from kvist.sim.requests import NEVER, Requests
from kvist.sim.scheduler import Ended
from kvist.sim.timing import Clock, Nanoseconds

Counts = int | NDArray[np.int64]

_LONGEST_JUMP = 4096  # passes planned at once
_ESTIMATE, _LEAST, _DECAY_PASSES = 0.7, 0.14, 600.0  # of the wanted tokens; of that estimate; passes between the two
_RETRACT_PASSES = 20.0  # that the estimate after a retraction provides for
_LONGEST_SORTED_QUEUE = 128  # a longer one is served in order
_CHECKED_PREFIX = 32  # tokens: who finds no more of its prompt in the cache lets one with the same prompt go first


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request under way.

    Attributes:
        request: its number.
        prompt: tokens of it.
        total: tokens at which it ends.
        is_servable: whether it can run at all.
        chain: contents of its full pages, as far as they were looked up.
        length: tokens known, at the begin of decode pass ``start`` where it runs.
        computed: tokens that have a place, while its prompt is under way; 0 in the queue.
        cached: pages of it that the tree owns.
        node: where these end; None: it holds nothing.
        start: number of the decode pass from which it runs.
        order: among those that run.
        joined: time at which it got a token and began to run.
    """

    request: int
    prompt: int
    total: int
    is_servable: bool
    chain: list[int]
    length: int
    computed: int = 0
    cached: int = 0
    node: Node | None = None
    start: int = NEVER
    order: int = 0
    joined: int = 0


class _Part(NamedTuple):
    """Part of a prompt.

    Attributes:
        done: tokens before it.
        left: tokens from there on.
        tokens: of the part.
        charged: those of its pages.
        kept: tokens to keep free for the answer.
    """

    done: int
    left: int
    tokens: int
    charged: int
    kept: int


@dataclass(slots=True)
class _Batch:
    """Prompts of one pass: whose, how many, and the sums of the tokens up to which and from which they are computed."""

    sequences: list[_Sequence] = field(default_factory=list)
    count: int = 0
    lengths: int = 0
    prefixes: int = 0

    @property
    def tokens(self) -> int:
        """New tokens as Dynamo counts them: requests times the mean of each, rounded down."""
        return self.count * (self.lengths // self.count - self.prefixes // self.count)


def tokens_needed(engine: EngineConfig, prompts: Counts, totals: Counts) -> NDArray[np.int64]:
    """More tokens than this must fit into the pool, so that requests are admitted, retracted or not.

    Args:
        engine: for its block size and the answer that is expected of a sequence.
        prompts: tokens of each.
        totals: tokens at which each ends.
    """
    size = engine.block_size
    longest = np.maximum(prompts, np.subtract(totals, 1))  # that it may have when it is admitted
    end = -(-longest // size) * size
    # Of the lengths that need as many blocks the shortest has most of its answer to come.
    answer = np.minimum(totals - np.maximum(prompts, end - size + 1), engine.sglang.clip_max_new_tokens)
    return np.asarray(end + answer)


class RadixScheduler:
    """One worker; arguments and attributes are those of `kvist.sim.scheduler.Scheduler`, its pool is a tree."""

    def __init__(
        self,
        engine: EngineConfig,
        requests: Requests,
        pool: RadixCache,
        clock: Clock,
        *,
        worker: int = 0,
        longest_jump: int = _LONGEST_JUMP,
        timeline: bool = False,
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.pool = pool
        self.worker = worker
        self.wake: int | None = None
        self.is_busy = False
        self.busy = 0
        self.passes = 0
        self.news: list[tuple[int, list[Move]]] = []
        self.prefilled = 0
        self.gaps: list[tuple[Nanoseconds, int]] = []
        self.segments: list[Segment] | None = [] if timeline else None
        self._clock = clock
        self._options = engine.sglang
        self._longest_jump = longest_jump
        self._ready_at = round(engine.startup_ms * 1e6)
        self._queue: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}  # by request, in order
        self._order = 0
        self._pass = 0  # decode passes
        self._length = 0  # sum of the lengths of what runs
        self._ends: list[tuple[int, int, _Sequence]] = []  # by the decode pass that gives the last token
        self._crossings = [0] * engine.block_size  # sequences that need a page in decode passes of this number, modulo
        self._tokenless: list[_Sequence] = []  # they run, and the token of their prompt's pass found no place
        most = _ESTIMATE * self._options.schedule_conservativeness
        self._estimate, self._least = most, most * _LEAST
        self._decay = (most - self._least) / _DECAY_PASSES
        self._is_estimated = False  # anew, by the pass under way
        self._touches = 0
        self._flushed = 0  # decode passes whose full pages the tree has
        self._decoded_at = 0  # end of the last decode pass
        self._has_stood_still = False  # a pass over prompts came after it
        # The passes under way.
        self._start = 0
        self._plan: Nanoseconds = np.empty(0, dtype=np.int64)  # their ends
        self._times: Nanoseconds = self._plan  # how long each decode pass takes
        self._batch: _Batch | None = None  # None: it is no pass over prompts
        self._seen = (0, 0)
        self._blocked = False
        self._rejected: list[int] = []

    @property
    def waiting(self) -> list[int]:
        """Requests in the queue, in order; those of a prompt that is computed in parts among them."""
        return [sequence.request for sequence in self._queue]

    @property
    def running(self) -> list[int]:
        """Requests that run or whose prompts are computed by the pass under way, in order."""
        prompts = self._batch.sequences if self._batch is not None else []
        return [*self._running, *(sequence.request for sequence in prompts)]

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self._queue or self._running or self._batch)

    def submit(self, request: int, now: int) -> None:
        """Queue a request; a jump under way ends with the pass that is under way now, if it may be admitted then."""
        requests, limit = self.requests, self.engine.max_model_len
        prompt = requests.input_tokens[request]
        total = prompt + requests.output_tokens[request]
        total = total if limit is None else min(total, limit)
        chain = requests.blocks[request].tolist()
        is_servable = limit is None or prompt < limit
        if is_servable and self.engine.reject_oversized:
            is_servable = bool(tokens_needed(self.engine, prompt, total) < self.engine.capacity_tokens)
        self._queue.append(_Sequence(request, prompt, total, is_servable, chain, prompt))
        requests.worker[request] = self.worker
        if not self.is_busy:
            self.wake = max(now, self._ready_at)
        elif len(self._plan) > 1 and not (self._blocked and is_servable):
            self._cut(now)

    def abort(self, request: int, now: int) -> None:
        """Drop a request whose client left; what the tree has of it stays. An unknown one is no error."""
        prompts = self._batch.sequences if self._batch is not None else []
        for sequence in (*self._queue, *prompts):
            if sequence.request == request:
                (prompts if sequence in prompts else self._queue).remove(sequence)
                self._let_go(sequence, sequence.computed)
                return
        self.settle(now)
        if request in self._running:
            self._flush()
            sequence = self._running[request]
            length = self._leave(sequence)
            # The decode pass under way has a place for its next token.
            self._let_go(sequence, length + (self.is_busy and self._batch is None))
            if self.is_busy:
                self._cut(now)

    def step(self) -> Ended:
        """End the passes that end at `wake`; `begin` starts the next."""
        ended = Ended(rejected=self._rejected)
        self._rejected = []
        now = self.wake
        self.wake = None
        if not self.is_busy or now is None:
            return ended
        batch, self._batch = self._batch, None
        if batch is not None:
            self._note_passes(1, batch.tokens, 0)
            self._has_stood_still = True
            self._end_prompts(batch, now, ended)
        else:
            self._commit(len(self._plan))
            self._end_decodes(now, ended)
        self._note_moves(now)
        self.is_busy = False
        self.wake = None if self.is_idle else now
        return ended

    def settle(self, now: int) -> None:
        """Carry out the passes that have ended by now, so that the pool shows what it holds."""
        if self.is_busy and len(self._plan) > 1:
            done = int(np.searchsorted(self._plan, now, side="right"))
            if done and done < len(self._plan):
                self._commit(done)
                self._note_moves(self._start)

    def begin(self, now: int) -> None:
        """Start the next pass or jump, if there is anything to do."""
        if self.is_busy or now < self._ready_at or self.is_idle:
            return
        self._start = now
        self._seen = (len(self._queue), self.pool.num_used)
        self._reject()
        if self._queue:
            self._sort()
            self._batch = self._admit(now)
            if self._batch is None and not self._running and self._drop_parts(1):
                self._batch = self._admit(now)
        self._blocked = bool(self._queue) and self._options.schedule_policy == "fifo"
        if self._batch is not None:
            self._plan = np.array([now + self._clock.prefill_ns(self._batch.tokens)], dtype=np.int64)
        elif self._running:
            evicted = self.pool.num_evicted
            retracted = self._make_room()
            # What is evicted may change the order of a sorted queue.
            is_sorted = self._blocked or not self._queue or self.pool.num_evicted == evicted
            passes = self._passes_ahead() if is_sorted and not (retracted or self._tokenless) else 1
            self._times = self._clock.decode_ns(len(self._running), self._length, passes)
            self._plan = now + self._times.cumsum()
        elif self._rejected:
            self._plan = np.array([now], dtype=np.int64)
        else:
            raise PoolExhausted(
                f"worker {self.worker} can not go on: request {self._queue[0].request} needs more pages than the "
                f"{self.pool.num_free} of {self.pool.num_slots} that are free, and nothing runs that would free some",
                hint="more blocks, or a larger sglang.clip_max_new_tokens",
            )
        self.is_busy = True
        self.wake = int(self._plan[-1])

    # Prompts.

    def _reject(self) -> None:
        for sequence in [each for each in self._queue if not each.is_servable]:
            self._queue.remove(sequence)
            self.requests.rejected[sequence.request] = True
            self._rejected.append(sequence.request)

    def _drop_parts(self, start: int = 0) -> bool:
        """Where nobody could go on, let the queue from ``start`` give back what is computed of prompts in parts."""
        parts = [sequence for sequence in list(self._queue)[start:] if sequence.computed]
        for sequence in parts:
            self._let_go(sequence, sequence.computed)
        return bool(parts)

    def _sort(self) -> None:
        """Longest prefix in the cache first; of several with one beginning that is not cached, one goes ahead."""
        if self._options.schedule_policy != "lpm" or not self.engine.prefix_caching:
            return
        if len(self._queue) > _LONGEST_SORTED_QUEUE:
            return
        size = self.engine.block_size
        pages = -(-_CHECKED_PREFIX // size)
        seen: set[int] = set()
        ranked: list[tuple[bool, int, _Sequence]] = []
        for sequence in self._queue:
            chain = self._chain(sequence, sequence.length // size)
            cached = self.pool.match(chain, len(chain)) * size
            last = False
            if cached <= _CHECKED_PREFIX and len(chain) >= pages:
                last = chain[pages - 1] in seen
                seen.add(chain[pages - 1])
            ranked.append((last, -cached, sequence))
        ranked.sort(key=lambda each: each[:2])
        self._queue = deque(sequence for _, _, sequence in ranked)

    def _admit(self, now: int) -> _Batch | None:
        """Form a batch of prompts from the head of the queue."""
        options, pool, size = self._options, self.pool, self.engine.block_size
        clip, share = options.clip_max_new_tokens, self._estimate
        reserved = 0.0  # added up one by one: the last bit counts
        for sequence in self._running.values():
            reserved += min(sequence.total - self._length_of(sequence), clip) * share
        room = pool.num_free * size - reserved
        prompts, chunk = options.max_prefill_tokens, options.chunked_prefill_size
        seats = self.engine.max_num_seqs - len(self._running)
        batch = _Batch()
        while self._queue and batch.count < seats and chunk > 0:
            sequence = self._queue[0]
            part = self._part(sequence, chunk)
            if part.tokens == 0 < part.left or part.charged + part.kept >= room or part.charged > min(prompts, chunk):
                break
            if not self._place(sequence, part, now):
                break
            batch.sequences.append(self._queue.popleft())
            batch.count += 1
            batch.lengths += part.done + part.tokens
            batch.prefixes += part.done
            room -= part.charged + part.kept
            prompts -= part.charged
            chunk -= part.charged
        return batch if batch.count else None

    def _matched(self, sequence: _Sequence) -> int:
        """Tokens that the tree has; who wants an answer has at least one computed anew."""
        if not self.engine.prefix_caching:
            return 0
        size = self.engine.block_size
        limit = (sequence.length - (sequence.total > sequence.length)) // size
        return self.pool.match(self._chain(sequence, limit), limit) * size

    def _part(self, sequence: _Sequence, chunk: int) -> _Part:
        """What of a prompt a pass computes that may compute ``chunk`` tokens: all, or whole pages."""
        size = self.engine.block_size
        done = sequence.computed or self._matched(sequence)
        left = sequence.length - done
        tokens = left if left <= chunk else chunk // size * size
        wanted = min(sequence.total - sequence.length, self._options.clip_max_new_tokens)
        return _Part(done, left, tokens, -(-tokens // size) * size, wanted if tokens == left else 0)

    def _place(self, sequence: _Sequence, part: _Part, now: int) -> bool:
        """Pages for the next part of a prompt; returns whether they could be had."""
        pool, size, requests = self.pool, self.engine.block_size, self.requests
        done, end = part.done, part.done + part.tokens
        if sequence.node is None:
            self._flush()
            cached, node = pool.lock(sequence.chain, done // size, self._now())
            if -(-end // size) - cached > pool.num_free:
                pool.drop(node)
                return False
            sequence.node, sequence.cached = node, cached
            request = sequence.request
            if not requests.admissions[request]:
                requests.admitted[request] = now
                requests.first_reused[request] = done
            requests.reused[request] = max(requests.reused[request], done)
            requests.admissions[request] += 1
        elif -(-end // size) - -(-done // size) > pool.num_free:
            return False
        pool.take(-(-end // size) - -(-done // size))
        sequence.computed = end
        self.prefilled += part.tokens
        return True

    def _end_prompts(self, batch: _Batch, now: int, ended: Ended) -> None:
        """The pass over prompts is over: whose prompt is done has a token; the others go back to the queue's head."""
        pool, size = self.pool, self.engine.block_size
        complete = [each for each in batch.sequences if each.computed == each.length]
        for sequence in batch.sequences:
            if sequence.computed < sequence.length:
                self._cache(sequence, sequence.computed // size, self._now())
                self._queue.appendleft(sequence)
        going_on = [each for each in complete if each.total > each.length + 1]
        last = [each for each in complete if each.total <= each.length + 1]
        last.sort(key=lambda each: each.total > each.length)  # who asked for no answer gives its pages back first
        # A token has its place before it is computed; the last one of a sequence never is, and needs none.
        has_room = pool.take(sum(each.length % size == 0 for each in going_on))
        for sequence in last:
            if sequence.total > sequence.length:
                self._note_token(sequence, now, ended)
        for sequence in going_on:
            if has_room:
                sequence.length += 1
                self._note_token(sequence, now, ended)
                self._cache(sequence, sequence.length // size, self._now())
            else:
                self._tokenless.append(sequence)
            self._join(sequence)
        for sequence in last:
            self._finish(sequence, sequence.length, now, ended)

    def _join(self, sequence: _Sequence) -> None:
        """A sequence decodes from the next decode pass on."""
        self._order += 1
        sequence.start, sequence.order = self._pass, self._order
        self._running[sequence.request] = sequence
        self._length += sequence.length
        self._crossings[self._crossing(sequence)] += 1
        heappush(self._ends, (self._pass + sequence.total - sequence.length, sequence.order, sequence))

    # Decoding.

    def _length_of(self, sequence: _Sequence) -> int:
        return sequence.length + self._pass - sequence.start

    def _crossing(self, sequence: _Sequence) -> int:
        """Decode passes in which a sequence needs a page: those that begin with whole pages."""
        return (sequence.start - sequence.length) % self.engine.block_size

    def _make_room(self) -> bool:
        """Pages for the next decode pass; returns whether somebody was retracted."""
        pool, at = self.pool, self._pass % self.engine.block_size
        retracted: list[_Sequence] = []
        while self._crossings[at] > pool.num_free and len(self._running) > 1:
            self._flush()
            sequence = min(self._running.values(), key=lambda each: self._length_of(each) - each.prompt)
            if sequence not in self._tokenless:
                self.requests.last_token[sequence.request] = max(sequence.joined, self._decoded_at)
            length = self._leave(sequence)
            self.requests.generated[sequence.request] = length - sequence.prompt
            self._let_go(sequence, length)
            sequence.length = length
            retracted.append(sequence)
        if not pool.take(self._crossings[at]) and not (self._drop_parts() and pool.take(self._crossings[at])):
            raise PoolExhausted(
                f"worker {self.worker} can not go on: request {next(iter(self._running))} runs alone, and "
                f"needs a page more than num_blocks ({pool.num_slots}) leaves it"
            )
        self._queue.extend(retracted)
        if retracted:
            running = self._running.values()
            tokens = sum(self._length_of(each) - each.prompt for each in running) + _RETRACT_PASSES * len(running)
            self._estimate = min(1.0, tokens / (sum(each.total - each.prompt for each in running) + 1.0))
        self._is_estimated = bool(retracted)
        return bool(retracted)

    def _passes_ahead(self) -> int:
        """Passes until a sequence ends, pages may run out or somebody may be admitted; the first has its pages."""
        longest = min(self._ends[0][0] - self._pass, self._longest_jump)
        free = self.pool.num_free if self._blocked or not self._queue else self.pool.num_blank
        if longest > 1 and self._pages_of(1, longest) > free:
            low, high = 1, longest  # passes that are sure to fit, and that do not
            while low + 1 < high:
                middle = (low + high) // 2
                low, high = (middle, high) if self._pages_of(1, middle) <= free else (low, middle)
            longest = low
        if longest == 1 or not self._queue or len(self._running) >= self.engine.max_num_seqs:
            return longest
        return self._passes_to_admission(longest)

    def _passes_to_admission(self, longest: int) -> int:
        """A pass that ends before the head of the queue may be admitted, or the last of ``longest``.

        The room for it is that of `_admit`, but for the last bits; so the pass found is never too late.
        """
        options, size = self._options, self.engine.block_size
        part = self._part(self._queue[0], options.chunked_prefill_size)
        # If what it found is evicted meanwhile, it needs more, or its prompt is computed in parts.
        wanted = min(part.charged + part.kept, options.chunked_prefill_size // size * size)
        passes = np.arange(1, longest)
        pages = np.array(self._crossings)[(self._pass + passes) % size]
        free = self.pool.num_free - (np.cumsum(pages) - pages)  # when the pass begins
        clip = options.clip_max_new_tokens
        left = np.array([each.total - self._length_of(each) for each in self._running.values()])
        if left.max() <= clip:
            kept_for = left.sum() - len(left) * passes
        else:
            kept_for = np.minimum(left[:, None] - passes, clip).sum(axis=0)
        share = np.maximum(self._estimate - passes * self._decay, self._least)
        may = np.flatnonzero(free * size - kept_for * share > wanted - 1e-3)
        return int(passes[may[0]]) if len(may) else longest

    def _pages_of(self, start: int, end: int) -> int:
        """Pages that the decode passes from ``start`` to ``end`` from now need."""
        size = self.engine.block_size
        whole, rest = divmod(end - start, size)
        at = (self._pass + start) % size
        around = self._crossings[at : at + rest]
        return whole * len(self._running) + sum(around) + sum(self._crossings[: rest - len(around)])

    def _commit(self, passes: int) -> None:
        """Carry out the first decode passes of the plan."""
        batch = len(self._running)
        if passes > 1:
            self.pool.take(self._pages_of(1, passes))
        self._note_gaps(self._times[:passes], int(self._plan[0]))
        self._length += batch * passes
        self._pass += passes
        self._decoded_at = int(self._plan[passes - 1])
        for _ in range(0 if self._is_estimated else passes):
            if self._estimate <= self._least:
                break
            self._estimate = max(self._estimate - self._decay, self._least)
        if passes < len(self._plan):
            self.pool.take(self._pages_of(0, 1))
        self._note_passes(passes, 0, batch)

    def _end_decodes(self, now: int, ended: Ended) -> None:
        if self._longest_jump == 1:
            ended.tokens = [each.request for each in self._running.values() if each not in self._tokenless]
        is_over = bool(self._ends) and self._ends[0][0] <= self._pass
        if is_over or self._tokenless:
            self._flush()
        for sequence in self._tokenless:
            self._note_token(sequence, now, ended)
        self._tokenless = []
        while self._ends and self._ends[0][0] <= self._pass:
            sequence = heappop(self._ends)[2]
            self._finish(sequence, self._leave(sequence), now, ended)

    def _cut(self, now: int) -> None:
        """End the jump with the pass that is under way now."""
        passes = int(np.searchsorted(self._plan, now, side="left")) + 1
        if passes < len(self._plan):
            self._plan = self._plan[:passes]
            self.wake = int(self._plan[-1])

    # Pages.

    def _now(self) -> int:
        """A time for the tree: after the decode passes so far, and after what was done since."""
        self._touches += 1
        return self._pass << 41 | 1 << 40 | self._touches

    def _chain(self, sequence: _Sequence, pages: int) -> list[int]:
        """Contents of so many full pages, prompt and answer; the list may be longer."""
        chain, prompt = sequence.chain, len(self.requests.blocks[sequence.request])
        if len(chain) < pages:
            own = self.requests.own[sequence.request] - prompt
            chain.extend(range(own + len(chain), own + pages))
        return chain

    def _cache(self, sequence: _Sequence, pages: int, now: int) -> None:
        """Give full pages to the tree, and hold them there."""
        if pages <= sequence.cached or not self.engine.prefix_caching:
            return
        pool, before = self.pool, sequence.node
        assert before is not None, "what is computed is held"
        node = pool.insert(before, self._chain(sequence, pages)[sequence.cached : pages], now)
        if node is not before:
            pool.hold(node)
            pool.drop(before)
        sequence.node, sequence.cached = node, pages

    def _flush(self) -> None:
        """Give the tree the pages that were filled in decode passes, each at its time."""
        if self._flushed == self._pass:
            return
        self._flushed = self._pass
        size = self.engine.block_size
        due: list[tuple[int, int, _Sequence]] = []
        for sequence in self._running.values():
            pages = min(self._length_of(sequence), sequence.total - 1) // size
            if pages > sequence.cached:
                # A prompt whose pass gave no token is given to the tree with the first decode pass.
                filled = sequence.start + max(1, pages * size - sequence.length)
                if filled < sequence.start + sequence.total - sequence.length:  # else it ends, which does it
                    due.append((filled << 41 | sequence.order, pages, sequence))
        due.sort(key=lambda each: each[0])
        for now, pages, sequence in due:
            self._cache(sequence, pages, now)

    # Leaving.

    def _leave(self, sequence: _Sequence) -> int:
        """Take a sequence out of the running ones; returns its length."""
        del self._running[sequence.request]
        length = self._length_of(sequence)
        self._length -= length
        self._crossings[self._crossing(sequence)] -= 1
        if length < sequence.total:
            self._ends = [each for each in self._ends if each[2] is not sequence]
            heapify(self._ends)
            self._tokenless = [each for each in self._tokenless if each is not sequence]
        return length

    def _finish(self, sequence: _Sequence, tokens: int, now: int, ended: Ended) -> None:
        """A sequence has its last token; so many tokens have a place."""
        self._cache(sequence, tokens // self.engine.block_size, self._now())
        self._let_go(sequence, tokens)
        if sequence.total > sequence.prompt:
            self.requests.last_token[sequence.request] = now
        self.requests.generated[sequence.request] = sequence.total - sequence.prompt
        ended.finished.append(sequence.request)

    def _let_go(self, sequence: _Sequence, tokens: int) -> None:
        """Give back the pages of so many tokens: those in the tree may be evicted, the others are blank."""
        if sequence.node is not None:
            self.pool.give(-(-tokens // self.engine.block_size) - sequence.cached)
            self.pool.drop(sequence.node)
        sequence.node, sequence.computed, sequence.cached = None, 0, 0

    # Notes.

    def _note_token(self, sequence: _Sequence, now: int, ended: Ended) -> None:
        """A token that is the first of a sequence since it was admitted."""
        requests, request = self.requests, sequence.request
        if requests.first_token[request] == NEVER:
            requests.first_token[request] = now
            ended.first.append(request)
        else:
            self.gaps.append((np.array([now - requests.last_token[request]]), 1))
            if requests.second_token[request] == NEVER:
                requests.second_token[request] = now
        ended.tokens.append(request)
        requests.last_token[request] = sequence.joined = now
        requests.generated[request] += 1

    def _note_gaps(self, times: Nanoseconds, first: int) -> None:
        """Times between tokens; those before the first pass, which ends then, differ if prompts came in between."""
        if self._has_stood_still:
            requests = self.requests
            gaps: Counter[int] = Counter()
            for request, sequence in self._running.items():
                if sequence not in self._tokenless:
                    gaps[first - max(sequence.joined, self._decoded_at)] += 1
                    if requests.second_token[request] == NEVER:
                        requests.second_token[request] = first
            self.gaps.extend((np.array([gap]), count) for gap, count in gaps.items())
            times = times[1:]
        if len(times) and self._running:
            self.gaps.append((times, len(self._running)))
        self._has_stood_still = False

    def _note_passes(self, passes: int, tokens: int, batch: int) -> None:
        end = int(self._plan[passes - 1])
        self.passes += passes
        self.busy += end - self._start
        if self.segments is not None:
            self.segments.append(Segment(self.worker, self._start / 1e6, end / 1e6, tokens, batch, passes, *self._seen))
        self._plan, self._times = self._plan[passes:], self._times[passes:]
        self._start = end

    def _note_moves(self, end: int) -> None:
        if self.pool.moves:
            self.news.append((end, self.pool.moves))
            self.pool.moves = []
