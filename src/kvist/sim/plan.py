"""The cheapest cluster that serves a trace within an SLA, found by replays.

A candidate is a kind of worker: its memory, policy and router. Of each, the least number of workers that meets the SLA
is found by halving. That takes for granted that more workers are no worse. Where they can be, a cheaper size may stay
unseen: that the answer meets the SLA, and that one worker less misses it, is replayed; that nothing is cheaper is not.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kvist.errors import InvalidInput, KvistError
from kvist.sim.config import require_at_least_0, require_one_of
from kvist.sim.report import PERCENTILES, Sla
from kvist.sim.sweep import Runner, Setup

MOST_WORKERS: Final = 4096
"""No plan looks at larger clusters."""

_FIGURES: Final = {"ttft_ms": "ttft_ms", "itl_ms": "tpot_ms", "e2e_ms": "e2e_latency_ms"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the cluster must keep to.

    Attributes:
        sla: limits of a request, one or more.
        percentile: of the requests' times, each limit by itself: one of `kvist.sim.report.PERCENTILES`.
        rejected: part of the requests that may be rejected, below 1; percentiles are of the others.
    """

    sla: Sla
    percentile: str = "p95"
    rejected: float = 0.0

    def __post_init__(self) -> None:
        require_one_of(self, "percentile", tuple(PERCENTILES))
        if not 0 <= self.rejected < 1:
            raise InvalidInput(f"rejected must be a number, 0 or more and below 1; got {self.rejected!r}")
        if not self.sla.limits:
            raise InvalidInput("sla must have a limit: ttft_ms, itl_ms or e2e_ms; got none")

    def figures(self, figures: dict[str, Any]) -> dict[str, float | None]:
        """Those that the limits are for, by the name of the limit; ``None``: no request has such a time."""
        return {
            name: float(figures[f"{self.percentile}_{of}"])
            if figures[f"num_{of.removesuffix('_ms')}_samples"]
            else None
            for name, of in _FIGURES.items()
            if name in self.sla.limits
        }

    def excess(self, figures: dict[str, Any]) -> float:
        """The worst figure as a multiple of its limit: 1 or less meets the target; a limit without times is missed."""
        if figures["rejected_requests"] > self.rejected * figures["num_requests"]:
            return math.inf
        told = self.figures(figures).items()
        return max(math.inf if value is None else value / self.sla.limits[name] for name, value in told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a cluster costs an hour, in any currency.

    Attributes:
        gpu_hour: one GPU.
        host_gb_hour: 1e9 bytes of host memory.
        disk_gb_hour: 1e9 bytes of disk.
        gpus: of one rank: of a worker, or of each of its data-parallel ranks.
    """

    gpu_hour: float = 2.5
    host_gb_hour: float = 0.005
    disk_gb_hour: float = 0.0002
    gpus: int = 1

    def __post_init__(self) -> None:
        require_at_least_0(self, "gpu_hour", "host_gb_hour", "disk_gb_hour")
        if self.gpus < 1:
            raise InvalidInput(f"gpus must be 1 or more; got {self.gpus}")

    def of(self, setup: Setup) -> float:
        """All of its ranks, for an hour."""
        host, disk = memory_gb(setup)
        rank = self.gpus * self.gpu_hour + host * self.host_gb_hour + disk * self.disk_gb_hour
        return ranks(setup) * rank


def ranks(setup: Setup) -> int:
    """Of all workers together: each has a pool, and GPUs and memory of its own."""
    return (setup.cluster.workers + setup.cluster.prefill_workers) * setup.cluster.dp_size


def memory_gb(setup: Setup) -> tuple[float, float]:
    """Host memory and disk of one rank, in 1e9 bytes."""
    tiers = setup.engine.tiers
    if tiers is None:
        return 0.0, 0.0
    disk = tiers.disk.capacity if tiers.disk else 0
    return tiers.host.capacity * tiers.block_bytes / 1e9, disk * tiers.block_bytes / 1e9


@dataclass(frozen=True, slots=True)
class Trial:
    """One replay that a plan rests on.

    Attributes:
        setup: what the trace was replayed on.
        cost: of an hour.
        excess: see `Target.excess`.
        figures: of `kvist.sim.report.Report.figures`.
    """

    setup: Setup
    cost: float
    excess: float
    figures: dict[str, Any]

    @property
    def meets(self) -> bool:
        """Whether it keeps to the target."""
        return self.excess <= 1

    @property
    def workers(self) -> int:
        """How many."""
        return self.setup.cluster.workers


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found.

    Attributes:
        target: what was asked for.
        answer: the cheapest of the trials that meet it; of equal price the one with the fewest workers, then the one
            with most to spare; ``None``: none does.
        below: the same with one worker less, which misses; ``None`` where there is no less, or no answer.
        trials: every replay, in the order in which they were made; the last are those that confirm the answer.
    """

    target: Target
    answer: Trial | None
    below: Trial | None
    trials: tuple[Trial, ...]

    @property
    def closest(self) -> Trial:
        """The trial that meets the target best, or misses it least."""
        return min(self.trials, key=lambda trial: trial.excess)


def plan(
    candidates: Sequence[Setup], target: Target, prices: Prices, replay_all: Runner, *, max_workers: int = 64
) -> Plan:
    """Find the cheapest cluster.

    Args:
        candidates: kinds of workers, 1 or more; their number of workers is not looked at.
        target: what the cluster must keep to.
        prices: of a worker.
        replay_all: of `kvist.sim.sweep`, on the trace.
        max_workers: no cluster is larger.

    Raises:
        InvalidInput: no candidates, or ``max_workers`` is not 1 to `MOST_WORKERS`.
        KvistError: the same replay gave two results, as different versions do on a Ray cluster.
    """
    if not candidates:
        raise InvalidInput("a plan needs 1 candidate or more; got none")
    if not 1 <= max_workers <= MOST_WORKERS:
        raise InvalidInput(f"max_workers must be an integer, 1 to {MOST_WORKERS}; got {max_workers}")
    trials: list[Trial] = []

    def run(setups: Sequence[Setup]) -> list[Trial]:
        rows = replay_all(setups)
        made = [Trial(row.setup, prices.of(row.setup), target.excess(row.figures), row.figures) for row in rows]
        trials.extend(made)
        return made

    first, *others = sorted(candidates, key=lambda setup: prices.of(_sized(setup, 1)))
    # the first alone: what it comes to bounds the others, which then go side by side
    _search([_Search(first, prices, climbs=True)], trials, run, max_workers)
    _search([_Search(setup, prices, climbs=False) for setup in others], trials, run, max_workers)
    meeting = (trial for trial in trials if trial.meets)
    answer = min(meeting, key=lambda trial: (trial.cost, trial.workers, trial.excess), default=None)
    if answer is None:
        return Plan(target, None, None, tuple(trials))
    confirming = [answer.setup] + ([_sized(answer.setup, answer.workers - 1)] if answer.workers > 1 else [])
    again = run(confirming)
    if again[0].figures != answer.figures or any(trial.meets for trial in again[1:]):
        raise KvistError("a replay was not the same twice", hint="have one version of kvist wherever replays run")
    return Plan(target, answer, again[1] if len(again) > 1 else None, tuple(trials))


@dataclass(slots=True)
class _Search:
    """The least size of one candidate: it is above ``failed``, and at most ``met``.

    One that climbs tries 1, 2, 4 and so on until a size meets. Others begin with the largest that they can afford: if
    that misses, they are no answer.
    """

    setup: Setup
    prices: Prices
    climbs: bool
    failed: int = 0
    met: int | None = None
    tried: list[int] = field(default_factory=list)

    def cost(self, workers: int) -> float:
        return self.prices.of(_sized(self.setup, workers))

    def next_size(self, best: float, max_workers: int) -> int | None:
        """The size to try; ``None`` when there is none that could be the answer."""
        affordable = max_workers if math.isinf(best) else _largest(self.cost, best, max_workers)
        if self.met is not None and self.met > affordable:
            self.met = None
        if self.met is None:
            if self.failed >= affordable:
                return None
            return min(affordable, max(1, 2 * self.failed)) if self.climbs else affordable
        if self.met - self.failed == 1:
            return None
        # what another candidate can do is most likely the least that this one can do, too
        return self.met - 1 if self.tried == [self.met] else (self.failed + self.met) // 2

    def learn(self, trial: Trial) -> None:
        self.tried.append(trial.workers)
        if trial.meets:
            self.met = trial.workers
        else:
            self.failed = trial.workers


def _search(
    searches: Sequence[_Search], trials: list[Trial], run: Callable[[list[Setup]], list[Trial]], max_workers: int
) -> None:
    while True:
        best = min((trial.cost for trial in trials if trial.meets), default=math.inf)
        due = list(_due(searches, best, max_workers))
        if not due:
            return
        for (search, _), trial in zip(due, run([setup for _, setup in due]), strict=True):
            search.learn(trial)


def _due(searches: Sequence[_Search], best: float, max_workers: int) -> Iterator[tuple[_Search, Setup]]:
    for search in searches:
        size = search.next_size(best, max_workers)
        if size is not None:
            yield search, _sized(search.setup, size)


def _sized(setup: Setup, workers: int) -> Setup:
    return replace(setup, cluster=replace(setup.cluster, workers=workers))


def _largest(cost: Callable[[int], float], best: float, max_workers: int) -> int:
    """The largest size that is not dearer; more workers never cost less."""
    return bisect.bisect_right(range(1, max_workers + 1), best, key=cost)
