"""KV-aware routing over interned contents: the index and the scorer of `kvist.router`, as arrays.

A replay asks for the overlap of every worker at every arrival. With contents as numbers the index of events is a table
with a bit for each worker and content, and the loads of the scorer are counts beside it; the answers are those of
`kvist.router.index.Index` and `kvist.router.score.Selector`, which the tests drive along.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvist.router.score import ScoreConfig, blocks_of, pick
from kvist.sim.cluster import Router
from kvist.sim.pool import Contents, Move
from kvist.sim.requests import Requests
from kvist.sim.scheduler import Ended, Scheduler
from kvist.sim.sglang import RadixScheduler

Stage = Literal["both", "prompts", "answers"]


class KvRouter(Router):
    """Sends a request where it costs least.

    Args:
        requests: of the replay.
        workers: to choose from, each with a pool that tells.
        contents: numbers of contents are below this.
        block_size: tokens.
        score: weights.
        stage: what the workers do. Who only computes prompts holds no blocks that count; where answers are made from
            prompts that come from elsewhere, blocks alone count, and each request's as its own.
        lag: ns after which a move in a pool is known here.
        seed: of ties and draws.
    """

    def __init__(
        self,
        requests: Requests,
        workers: Sequence[Scheduler | RadixScheduler],
        contents: int,
        block_size: int,
        score: ScoreConfig,
        *,
        stage: Stage = "both",
        lag: int = 0,
        seed: int = 0,
    ) -> None:
        self._requests = requests
        self._workers = workers
        self._block_size = block_size
        self._score = score
        self._stage = stage
        self._lag = lag
        self._random = random.Random(seed)
        n = len(workers)
        # A row for each content, so that what all workers have of it lies together.
        self._known = np.zeros((contents, n), dtype=np.uint8)  # a bit for each tier
        self._news: list[tuple[int, int, int, list[Move]]] = []  # by when they are known here, and by order
        self._told = 0
        # What is under way: prompt tokens before the first token, blocks until the end.
        self._waiting = np.zeros(n)
        self._refs = np.zeros((contents, n), dtype=np.int32)
        self._held = np.zeros(n)
        self._active = np.zeros(n)
        self._charged: dict[int, float] = {}
        self._target: dict[int, int] = {}

    def overlaps(self, blocks: Contents) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Leading blocks that each worker is known to have on its device; the credit for those that tiers below add."""
        if not len(blocks):
            return np.zeros(len(self._workers), dtype=np.int64), np.zeros(len(self._workers))
        known, score = self._known[blocks], self._score
        device = _leading(known & 1)
        if not (known > 1).any():
            return device, np.zeros(len(self._workers))
        host, external = _leading(known & 3), _leading(known)
        return device, score.host_credit * (host - device) + score.disk_credit * (external - host)

    def route(self, request: int, now: int) -> int:
        """The worker for a request that comes now; it counts as under way there."""
        self._learn(now)
        requests, score, size = self._requests, self._score, self._block_size
        blocks, tokens = requests.blocks[request], requests.input_tokens[request]
        device, below = self.overlaps(blocks)
        shared = self._shared(request)
        fresh = len(blocks) - len(shared) + (self._refs[shared] == 0).sum(axis=0)
        held = self._held + fresh + (blocks_of(tokens, size) - len(blocks))
        saved = score.device_credit * device
        if score.device_credit_decay:
            excess = (self._waiting - self._waiting.min()) / size
            saved = saved / (1 + score.device_credit_decay * excess / blocks_of(tokens, size))
        saved = saved + below
        prefill = np.maximum(0.0, (self._waiting + tokens) / size - saved)
        costs = score.active_request_weight * self._active
        if self._stage != "answers":
            costs = costs + score.prefill_load_scale * prefill
        if self._stage != "prompts":
            costs = costs + held
        worker = self._choose(request, costs)
        charged = max(0.0, tokens - float(score.device_credit * device[worker] + below[worker]) * size)
        self._charged[request] = charged
        self._waiting[worker] += charged
        self._held[worker] += fresh[worker]
        self._refs[shared, worker] += 1
        self._active[worker] += 1
        self._target[request] = worker
        return worker

    def _choose(self, request: int, costs: NDArray[np.float64]) -> int:
        """Which of the costs to take."""
        return pick(costs.tolist(), self._score.temperature, self._random.random())

    def ended(self, worker: int, ended: Ended, now: int) -> None:
        """What was under way is less by what ended."""
        for request in ended.first:
            self._waiting[self._target[request]] -= self._charged.pop(request)
        for request in (*ended.finished, *ended.rejected):
            target = self._target.pop(request)
            self._waiting[target] -= self._charged.pop(request, 0.0)
            shared = self._shared(request)
            refs = self._refs[shared, target] - 1
            self._refs[shared, target] = refs
            self._held[target] -= len(self._requests.blocks[request]) - np.count_nonzero(refs)
            self._active[target] -= 1
            if not self._active[target]:
                self._waiting[target] = 0.0  # what rounding may have left

    def _shared(self, request: int) -> Contents:
        """Blocks that count once for all requests of a worker."""
        blocks = self._requests.blocks[request]
        return blocks if self._stage == "both" else blocks[:0]

    def _learn(self, now: int) -> None:
        """Take in what pools told by now."""
        for index, worker in enumerate(self._workers):
            worker.settle(now)
            for end, moves in worker.news:
                self._told += 1
                heappush(self._news, (end + self._lag, self._told, index, moves))
            worker.news.clear()
        while self._news and self._news[0][0] <= now:
            _, _, index, moves = heappop(self._news)
            for stored, contents, tier in moves:
                if stored:
                    self._known[contents, index] |= 1 << tier
                else:
                    self._known[contents, index] &= 255 - (1 << tier)


def _leading(known: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """How many of each column come before its first 0."""
    first = known.argmin(axis=0)
    return np.where(known[first, np.arange(len(first))], len(known), first)
