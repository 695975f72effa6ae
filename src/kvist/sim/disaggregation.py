"""Engines that compute prompts, engines that decode, and what passes between them.

A prefill worker holds the blocks of a prompt that it has computed. A decode worker reserves slots for them, but for
those that it has already; where there are too few the request waits, in order. Then the blocks are sent, the request
decodes, and the prefill worker lets go of them. All of this happens between passes.

The first token that anybody sees is the decode worker's. Rules and order are those of Dynamo 1.6.1, but that a decode
worker which computes a preempted prompt again takes as long for it as any other engine; in Dynamo it takes no time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np

from kvist.sim.cluster import Router
from kvist.sim.config import ClusterConfig
from kvist.sim.decodes import Sequence as Running
from kvist.sim.pool import Slots
from kvist.sim.requests import NEVER, Requests
from kvist.sim.scheduler import LONGEST_JUMP, Ended, Prompts, Scheduler


class PrefillScheduler(Scheduler):
    """An engine that computes prompts; a request ends here with its first token, which nobody sees.

    Args:
        index: its number among those.
    """

    def __init__(self, *args: Any, index: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._index = index
        self._held: dict[int, Slots] = {}

    def submit(self, request: int, now: int) -> None:
        """Queue a request; who decodes it is not known yet."""
        super().submit(request, now)
        self.requests.worker[request] = NEVER
        self.requests.prefill_worker[request] = self._index

    def let_go(self, request: int) -> None:
        """The blocks of a prompt are somewhere else now."""
        self.pool.release(self._held.pop(request)[::-1])

    def _total(self, request: int) -> int:
        return min(super()._total(request), self.requests.input_tokens[request] + 1)

    def _join(self, sequence: Running, now: int, ended: Ended) -> None:
        self._drop_promise(sequence)
        self._held[sequence.request] = sequence.slots
        ended.held.append(sequence.request)

    def _stalled(self) -> int | None:
        return None if self._held else super()._stalled()


class DecodeScheduler(Scheduler):
    """An engine that gets computed prompts, and decodes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._coming: deque[int] = deque()  # requests without slots
        self._is_full = False  # the first of them found no room, and nothing was given back since
        self._reserved: dict[int, tuple[Slots, int]] = {}  # slots, and how many of them are computed
        self._landed: dict[int, Running] = {}  # requests of the queue whose prompts are here
        self._turn: dict[int, int] = {}  # the order in which requests were announced
        self._turns = 0
        self._is_stuck = False  # nobody else can run
        self._fresh: list[Running] = []  # they decode for the first time

    def expect(self, request: int, now: int) -> None:
        """A request is to come here; `reserve` finds slots for it."""
        self.requests.worker[request] = self.worker
        self._turn[request] = self._turns
        self._turns += 1
        self._coming.append(request)
        if self.is_busy and not self._is_full:
            self.cut(now)

    def reserve(self) -> int | None:
        """Slots for the first that waits for them, between passes; returns the request that has got them."""
        engine = self.engine
        if not self._coming or self._is_full:
            return None
        self._is_full = True
        if len(self.running) >= engine.max_num_seqs:
            return None
        request = self._coming[0]
        prompt, size = self.requests.input_tokens[request], engine.block_size
        needed = -(-prompt // size)
        later, chain = 0, self.requests.contents(request, 0, prompt // size)
        if engine.scheduling == "trtllm":  # all that it will need must be free, and nothing is reused
            later, chain = -(-self._total(request) // size) - needed, chain[:0]
            if needed + later > self.pool.num_free - self._promised:
                return None
        found = self.pool.find(chain)
        fresh = self.pool.acquire(found, needed - len(found))
        if fresh is None:
            return None
        self._is_full = False
        self._promised += later
        self._reserved[request] = np.concatenate((found, fresh)), len(found)
        return self._coming.popleft()

    def tokens_missing(self, request: int) -> int:
        """Of a prompt with reserved slots: tokens of the blocks that were not here."""
        slots, found = self._reserved[request]
        return (len(slots) - found) * self.engine.block_size

    def land(self, request: int, now: int) -> None:
        """The blocks of a prompt have come; it is queued where its turn is."""
        slots, found = self._reserved.pop(request)
        prompt, size = self.requests.input_tokens[request], self.engine.block_size
        sequence = Running(request, NEVER, self._total(request), prompt, found * size, slots)
        self._cache(sequence, found, prompt // size)
        sequence.computed = prompt
        self._landed[request] = sequence
        turn = self._turn[request]
        later = (at for at, queued in enumerate(self.waiting) if self._turn[queued] > turn)
        self.waiting.insert(next(later, len(self.waiting)), request)
        self.wake = max(now, self._ready_at)

    def begin(self, now: int) -> None:
        """Start the next pass; one after the other while requests may get slots between them."""
        self._longest_jump = 1 if self._coming and not self._is_full else LONGEST_JUMP
        super().begin(now)

    def step(self) -> Ended:
        """End what ends at `wake`."""
        now, ended = self.wake, super().step()
        for sequence in self._fresh:
            assert now is not None, "passes that are under way end"
            self.requests.first_token[sequence.request] = now
            self.requests.last_token[sequence.request] = now
            ended.first.append(sequence.request)
            self._once.append(sequence.request)
        self._fresh = []
        for request in (*ended.finished, *ended.rejected):
            del self._turn[request]
            self._is_full = False
        return ended

    def _commit(self, passes: int) -> None:
        super()._commit(passes)
        if self._fresh:  # no token came before their first
            times, batch = self.gaps.pop()
            if batch > len(self._fresh):
                self.gaps.append((times, batch - len(self._fresh)))

    def _head(self) -> int | None:
        if self._coming or self._is_stuck:  # they go before those that have to be computed again
            return next((request for request in self.waiting if request in self._landed), None)
        return super()._head()

    def _land(self, request: int, prompts: Prompts) -> bool:
        sequence = self._landed.pop(request, None)
        if sequence is None:
            return False
        self.waiting.remove(request)
        sequence.order = self._order
        self._order += 1
        self.requests.admissions[request] += 1
        prompts.is_any = True
        self._is_stuck = self._is_stuck and bool(self._landed)
        if sequence.known < sequence.total:
            self._decodes.add(sequence, tokens=0)
            self._fresh.append(sequence)
        else:  # it asked for none
            self._joining.append(sequence)
        return True

    def _note_admission(self, request: int, cached: int, now: int) -> None:
        self.requests.admissions[request] += 1

    def _leave(self, sequence: Running, *, computed_all: bool = False) -> None:
        super()._leave(sequence, computed_all=computed_all)
        self._is_full = False

    def _stalled(self) -> int | None:
        """Who is to be computed again may lack the slots of those that have landed behind it: they go first."""
        self._is_stuck = bool(self._landed)
        return self._start if self._is_stuck or (self._coming and not self._is_full) else None


_Deed = tuple[Callable[[int, int], None], int]  # what is to be done with a request


class Handover(Router):
    """Prompts go to one kind of engine, and from there to the other.

    Args:
        requests: of the replay.
        decodes: the workers of the replay with the numbers from 0.
        prefills: those with the numbers after them.
        prompts: chooses among the second.
        answers: chooses among the first.
        cluster: how fast blocks are sent.
        bytes_per_token: of all layers.
    """

    is_first = True

    def __init__(
        self,
        requests: Requests,
        decodes: Sequence[DecodeScheduler],
        prefills: Sequence[PrefillScheduler],
        prompts: Router,
        answers: Router,
        cluster: ClusterConfig,
        bytes_per_token: int,
    ) -> None:
        self._requests = requests
        self._decodes = decodes
        self._prefills = prefills
        self._prompts = prompts
        self._answers = answers
        self._only_missing = cluster.transfer_only_missing
        self._ns_per_token = bytes_per_token / cluster.transfer_gbps
        self._sent: list[tuple[int, int, int]] = []  # requests, by when their blocks are there, and by order
        self._sends = 0
        self._todo: deque[_Deed] = deque()
        self._put_off: dict[int, list[_Deed]] = {}  # by the worker whose pass must end first
        self._touched: dict[int, None] = {}

    @property
    def wake(self) -> int | None:
        """When the next blocks are there."""
        return self._sent[0][0] if self._sent else None

    def route(self, request: int, now: int) -> int:
        """The prefill worker for a request that comes now."""
        return len(self._decodes) + self._prompts.route(request, now)

    def ended(self, worker: int, ended: Ended, now: int) -> None:
        """A step of a worker is over: what waited for it can be done."""
        self._todo += self._put_off.pop(worker, ())
        if worker < len(self._decodes):
            self._answers.ended(worker, ended, now)
            self._send_reserved(self._decodes[worker])
        else:
            self._prompts.ended(worker - len(self._decodes), Ended(first=ended.held, rejected=ended.rejected), now)
            # Dynamo ends those first that want no token.
            held = sorted(ended.held, key=lambda request: self._requests.output_tokens[request] > 0)
            self._todo += [(self._announce, request) for request in held]

    def act(self, now: int) -> Iterable[int]:
        """Announce, reserve, send, land and let go, as far as it can be done now; returns the workers touched."""
        while self._sent and self._sent[0][0] <= now:
            self._todo.append((self._land, heappop(self._sent)[2]))
        while self._todo:
            do, request = self._todo.popleft()
            do(request, now)
        touched, self._touched = self._touched, {}
        return touched

    def _announce(self, request: int, now: int) -> None:
        worker = self._answers.route(request, now)
        self._touched[worker] = None
        self._decodes[worker].expect(request, now)
        if not self._decodes[worker].is_busy:
            self._send_reserved(self._decodes[worker])

    def _send_reserved(self, decode: DecodeScheduler) -> None:
        if (request := decode.reserve()) is not None:
            self._todo.append((self._send, request))

    def _send(self, request: int, now: int) -> None:
        tokens = self._requests.input_tokens[request]
        if self._only_missing:
            tokens = self._decodes[self._requests.worker[request]].tokens_missing(request)
        if not (ns := round(tokens * self._ns_per_token)):
            self._todo.append((self._land, request))
            return
        self._sends += 1
        heappush(self._sent, (now + ns, self._sends, request))

    def _land(self, request: int, now: int) -> None:
        worker = self._requests.worker[request]
        decode = self._decodes[worker]
        self._touched[worker] = None
        if decode.is_busy:
            decode.cut(now)
            self._put_off.setdefault(worker, []).append((self._land, request))
            return
        decode.land(request, now)
        self._send_reserved(decode)
        self._todo.append((self._let_go, request))

    def _let_go(self, request: int, now: int) -> None:
        index = self._requests.prefill_worker[request]
        worker = len(self._decodes) + index
        if self._prefills[index].is_busy:
            self._put_off.setdefault(worker, []).append((self._let_go, request))
            return
        self._touched[worker] = None
        self._prefills[index].let_go(request)
        self._prompts.ended(index, Ended(finished=[request]), now)
