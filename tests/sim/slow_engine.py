"""One engine, a pass at a time, in lists and loops: what `kvist.sim.scheduler` must equal without its jumps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvist.sim.config import EngineConfig
from kvist.sim.timing import Clock


@dataclass(eq=False)
class Slot:
    content: int | None = None
    refs: int = 0


@dataclass(eq=False)
class Request:
    prompt: int
    output: int
    contents: list[int]  # of all blocks, prompt and answer
    arrival: int
    admitted: int | None = None
    tokens: list[int] = field(default_factory=list)  # when each came
    reused: int = 0
    first_reused: int = 0
    admissions: int = 0
    rejected: bool = False
    computed: int = 0
    slots: list[Slot] = field(default_factory=list)

    @property
    def known(self) -> int:
        return self.prompt + len(self.tokens)


class SlowEngine:
    """Serves requests one pass after the other."""

    def __init__(self, engine: EngineConfig, clock: Clock) -> None:
        self.engine = engine
        self.clock = clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.blank = [Slot() for _ in range(engine.num_blocks)]
        self.idle: list[Slot] = []  # least recently used first
        self.copies: dict[int, list[Slot]] = {}
        self.gaps: Counter[int] = Counter()
        self.passes = self.evicted = 0

    def serve(self, requests: list[Request]) -> int:
        """Returns when the last pass ends."""
        coming = sorted(requests, key=lambda request: request.arrival)
        now = 0
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                now = max(now, coming[0].arrival, round(self.engine.startup_ms * 1e6))
            while coming and coming[0].arrival <= now:
                self.waiting.append(coming.pop(0))
            now = self.one_pass(now)
        return now

    def total(self, request: Request) -> int:
        total = min(request.prompt + request.output, self.engine.max_model_len or 1 << 60)
        if self.engine.scheduling == "trtllm" and request.prompt < self.engine.capacity_tokens:
            total = min(total, self.engine.capacity_tokens)
        return total

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.engine.block_size)

    def free(self) -> int:
        return len(self.blank) + len(self.idle)

    def one_pass(self, now: int) -> int:
        self.budget = self.engine.max_num_batched_tokens
        self.work: dict[Request, tuple[int, int]] = {}  # tokens computed before, and in this pass
        preempted = False
        index = 0
        while index < len(self.running) and self.budget:
            request = self.running[index]
            tokens = min(request.known - request.computed, self.budget)
            while self.blocks(request.computed + tokens) - len(request.slots) > self.free():
                preempted = True
                victim = self.preempt()
                index -= self.engine.preemption == "fifo" and victim is not request  # it stood before
                if victim is request:
                    break
            else:
                self.compute(request, tokens)
                index += 1
        had = len(self.waiting)
        while self.waiting and not preempted and len(self.running) < self.engine.max_num_seqs:
            if not self.admit(self.waiting[0], now):
                break
        prompts = [
            (before, min(before + n, request.prompt))
            for request, (before, n) in self.work.items()
            if before < request.prompt
        ]
        time = 0
        if prompts:
            n = len(prompts)
            time = self.clock.prefill_ns(n * (sum(b for _, b in prompts) // n - sum(a for a, _ in prompts) // n))
        ready = [request for request in self.running if request.computed == request.known]
        decodes = [request for request in ready if request.tokens]
        if decodes:
            time += int(self.clock.decode_ns(len(decodes), sum(each.known for each in decodes), 1)[0])
            time += self.clock.mixed_ns if prompts else 0
        end = now + time
        # Who asked for no answer gives its slots back first.
        for request in sorted(ready, key=lambda each: each.known < self.total(each)):
            if request.known < self.total(request):
                if request.tokens:
                    self.gaps[end - request.tokens[-1]] += 1
                request.tokens.append(end)
            if request.known >= self.total(request):
                self.running.remove(request)
                self.release(request)
        self.passes += bool(self.work or had)
        return end

    def admit(self, request: Request, now: int) -> bool:
        engine, total = self.engine, self.total(request)
        longest = request.known if engine.scheduling == "vllm" else total
        if request.prompt >= (engine.max_model_len or 1 << 60) or longest > engine.capacity_tokens:
            request.rejected = True
            self.waiting.remove(request)
            return True
        found: list[Slot] = []
        for content in request.contents[: (request.known - 1) // engine.block_size]:
            if content not in self.copies:
                break
            found.append(self.copies[content][0])
        needed = self.blocks(longest) - sum(slot.refs > 0 for slot in found)
        promised = sum(self.blocks(self.total(each)) - len(each.slots) for each in self.running)
        if needed > self.free() - (promised if engine.scheduling == "trtllm" else 0):
            return False
        cached = len(found) * engine.block_size
        tokens = min(request.known - cached, self.budget)
        if not tokens or (request.prompt - cached > self.budget and not engine.chunked_prefill):
            return False
        for slot in found:
            if not slot.refs:
                self.idle.remove(slot)
            slot.refs += 1
        request.slots, request.computed = found, cached
        self.waiting.remove(request)
        self.running.append(request)
        if not request.admissions:
            request.admitted, request.first_reused = now, cached
        request.admissions += 1
        request.reused = max(request.reused, cached)
        self.compute(request, tokens)
        return request.computed == request.known

    def compute(self, request: Request, tokens: int) -> None:
        self.work[request] = request.computed, tokens
        self.budget -= tokens
        request.slots += [self.take() for _ in range(self.blocks(request.computed + tokens) - len(request.slots))]
        request.computed += tokens
        if self.engine.prefix_caching:
            full = request.computed // self.engine.block_size
            for slot, content in zip(request.slots[:full], request.contents, strict=False):
                if slot.content is None:
                    slot.content = content
                    self.copies.setdefault(content, []).append(slot)

    def take(self) -> Slot:
        if self.blank:
            slot = self.blank.pop()
        else:
            slot = self.idle.pop(0)
            assert slot.content is not None
            self.copies[slot.content].remove(slot)
            if not self.copies[slot.content]:
                del self.copies[slot.content]
                self.evicted += 1
        slot.content, slot.refs = None, 1
        return slot

    def preempt(self) -> Request:
        victim = self.running[0 if self.engine.preemption == "fifo" else -1]
        self.running.remove(victim)
        self.budget += self.work.pop(victim, (0, 0))[1]
        self.release(victim)
        self.waiting.insert(0, victim)
        return victim

    def release(self, request: Request) -> None:
        for slot in reversed(request.slots):
            slot.refs -= 1
            if not slot.refs:
                (self.blank if slot.content is None else self.idle).append(slot)
        request.slots, request.computed = [], 0
