"""One engine with host memory beside it: vLLM's scheduling, as Dynamo 1.6.1's mocker does it with native offloading.

A request whose next blocks the host has stands aside until they have come. It holds their slots meanwhile, and then
goes ahead of the queue. Who finds blocks that are on their way stands aside as well. See `kvist.sim.host`.

Where nothing runs and the head of the queue has no room, as those behind it hold loaded slots, they go first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Ordered

import numpy as np

from kvist.sim.config import EngineConfig
from kvist.sim.decodes import Sequence
from kvist.sim.host import HostMemory, Loaded, Lookup, SourcePool
from kvist.sim.pool import Slots
from kvist.sim.requests import NEVER, Requests
from kvist.sim.scheduler import LONGEST_JUMP, Ended, Prompts, Scheduler
from kvist.sim.timing import Clock

_NONE: Slots = np.empty(0, dtype=np.int32)


class OffloadingScheduler(Scheduler):
    """One worker; see `Scheduler`.

    Args:
        engine: with `EngineConfig.host_offload`.
        requests: of the replay.
        pool: its slots.
        clock: how long passes take.
        order: see `HostMemory`.
        worker: its number.
        timeline: whether segments are kept.
    """

    def __init__(
        self,
        engine: EngineConfig,
        requests: Requests,
        pool: SourcePool,
        clock: Clock,
        *,
        order: Ordered[int] | None = None,
        worker: int = 0,
        timeline: bool = False,
    ) -> None:
        assert engine.host_offload is not None, "it has a host"
        self._slots = pool
        self._host = HostMemory(engine.host_offload, engine.block_size * engine.kv_bytes_per_token, pool, order)
        self._is_giving_way = False
        super().__init__(engine, requests, pool, clock, worker=worker, timeline=timeline)

    def abort(self, request: int, now: int) -> None:
        """See `Scheduler.abort`."""
        super().abort(request, now)
        self._host.forget(request)

    def step(self) -> Ended:
        """See `Scheduler.step`; what the pass computed is copied from now on."""
        now = self.wake if self.is_busy else None
        ended = super().step()
        if now is not None:
            self._host.end_pass(now)
        return ended

    def begin(self, now: int) -> None:
        """See `Scheduler.begin`."""
        if self.is_busy or self.is_idle or now < self._ready_at:
            return
        self._take_back(now)
        if not (self.waiting or self._decodes or self._partial):
            self.wake = self._stalled()
            return
        # While blocks move, slots become free to write to and requests come back: then passes go one by one.
        is_quiet = not self._host.is_moving and not any(map(self._has_unstored, self._decodes.requests))
        self._longest_jump = LONGEST_JUMP if is_quiet else 1
        super().begin(now)
        if not self.is_busy:
            return
        if self._parked and (due := self._host.deadline()) is not None:
            self.cut(due)
        for sequence in (*self._decodes, *self._joining, self._partial):
            if sequence is not None and self._has_unstored(sequence.request):
                prompt = self.requests.blocks[sequence.request]
                computed = sequence.computed // self.engine.block_size if sequence.joined == NEVER else len(prompt)
                self._host.store(sequence.request, prompt.tolist(), sequence.slots, min(computed, len(prompt)))

    def _has_unstored(self, request: int) -> bool:
        return self._host.has_unstored(request, len(self.requests.blocks[request]))

    def _plan_passes(self, passes: int, prefill: int, batch: int = 0, length: int = 0) -> None:
        super()._plan_passes(passes, prefill, batch, length)
        wait = self._slots.fence - self._start
        if wait > 0:
            times = self.times.copy()
            times[0] += wait
            self.align(times)

    def _stalled(self) -> int | None:
        return self._host.deadline()

    def _take_back(self, now: int) -> None:
        """Those that stood aside and may be asked for again go ahead of the queue."""
        self._host.advance(now)
        ready = self._host.ready()
        aside = set(self._host.queue)
        self.waiting = deque([*ready, *(request for request in self.waiting if request not in aside)])
        self._parked = aside.difference(ready)

    def _make_room(self, sequence: Sequence, slots: int) -> bool:
        self._is_giving_way = True
        still_runs = super()._make_room(sequence, slots)
        self._is_giving_way = False
        return still_runs

    def _leave(self, sequence: Sequence, *, computed_all: bool = False) -> None:
        if self._is_giving_way:
            self._host.give_way(sequence.request)
        super()._leave(sequence, computed_all=computed_all)

    def _admit(self, now: int, prompts: Prompts) -> None:
        engine, requests, pool, host = self.engine, self.requests, self._slots, self._host
        size, seats = engine.block_size, engine.max_num_seqs - len(self._decodes)
        while self.waiting and prompts.budget and len(self._joining) + (self._partial is not None) < seats:
            request = self.waiting[0]
            prompt = requests.input_tokens[request]
            known = prompt + requests.generated[request]
            is_short = prompt < (engine.max_model_len or prompt + 1)
            load = host.loads.get(request)
            if is_short and (load is None or not load.has_come):
                answer = self._ask(request, known, now)
                if answer is Lookup.HIT:
                    if self._put_loaded_first():
                        continue
                    return
                if answer is Lookup.LATER:
                    host.put_aside(request)
                    self._parked.add(self.waiting.popleft())
                    continue
            if known > engine.capacity_tokens or not is_short:
                self.waiting.popleft()
                host.forget(request)
                requests.rejected[request] = True
                self._rejected.append(request)
                continue
            total = self._total(request)
            most = (known - (total > known)) // size  # who wants an answer has its last token computed
            found = load.slots if load is not None else pool.find(requests.contents(request, 0, most))
            needed = -(-known // size) - (len(found) if load is not None else pool.num_held(found))
            cached = min(len(found), most) * size
            tokens = min(known - cached, prompts.budget)
            if needed > pool.num_free or (prompt - cached > prompts.budget and not engine.chunked_prefill):
                if self._put_loaded_first():
                    continue
                return
            wanted = max(0, -(-(cached + tokens) // size) - len(found))
            fresh = pool.acquire(found if load is None else _NONE, wanted)
            assert fresh is not None, "what was counted as free is free"
            self.waiting.popleft()
            host.admit(request, cached // size)
            sequence = Sequence(request, self._order, total, known, cached, found)
            self._order += 1
            self._compute(sequence, fresh, tokens, prompts)
            self._note_admission(request, cached, now)
            if sequence.computed < known:
                self._partial = sequence

    def _put_loaded_first(self) -> bool:
        """Where nothing runs, let one go ahead whose blocks have come; returns whether there is one behind the head."""
        loads = self._host.loads
        loaded = [request for request in self.waiting if request in loads and loads[request].has_come]
        if self.running or not loaded or self.waiting[0] in loaded:
            return False
        self.waiting.remove(loaded[0])
        self.waiting.appendleft(loaded[0])
        return True

    def _ask(self, request: int, known: int, now: int) -> Lookup:
        """What the host has for the head of the queue; if there is room it is on its way, and comes later."""
        pool, host, size = self._slots, self._host, self.engine.block_size
        chain = self.requests.contents(request, 0, known // size)
        found = pool.find(chain)
        answer, contents = host.lookup(request, self.requests.blocks[request].tolist(), len(found))
        if answer is Lookup.HIT and known > self.engine.capacity_tokens:
            return Lookup.MISS
        if answer is not Lookup.HIT:
            return answer
        blocks = -(-known // size)
        partial = self._partial
        # What runs, and those that stand aside, may still need these.
        promised = host.tails + (0 if partial is None else -(-partial.known // size) - len(partial.slots))
        if blocks - pool.num_held(found) > pool.num_free - promised:
            return answer
        fence = pool.fence
        fresh = pool.acquire(found, len(contents))
        if fresh is None:
            return answer
        pool.fence = fence  # it is the load that waits for these slots, and no pass
        slots = np.concatenate((found, fresh))
        host.load(request, Loaded(slots, len(found), contents, chain[: len(slots)], max(0, blocks - len(slots))), now)
        return Lookup.LATER
