"""Engines together: requests come, are given to a worker, and end. One queue of events, in virtual time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Protocol

from kvist.errors import EngineError
from kvist.sim.requests import Requests
from kvist.sim.scheduler import Ended


class Worker(Protocol):
    """One engine, as the cluster drives it; times are nanoseconds."""

    wake: int | None

    @property
    def is_busy(self) -> bool:
        """Whether a pass is under way, which ends at `wake`."""

    def submit(self, request: int, now: int) -> None:
        """Queue a request."""

    def step(self) -> Ended:
        """End what ends at `wake`."""

    def begin(self, now: int) -> None:
        """Start the next pass, if there is anything to do."""

    def settle(self, now: int) -> None:
        """Carry out the passes that have ended by now."""


class Router(ABC):
    """Who serves a request, and what happens between workers.

    Attributes:
        is_first: whether what happens between workers, and passes that begin with it, come before the requests that
            come at the same time.
    """

    is_first = False

    @property
    def wake(self) -> int | None:
        """When `act` is next due by itself."""
        return None

    @abstractmethod
    def route(self, request: int, now: int) -> int:
        """The worker, or the rank of one, for a request that comes now."""

    @abstractmethod
    def ended(self, worker: int, ended: Ended, now: int) -> None:
        """A step of a worker is over."""

    def act(self, now: int) -> Iterable[int]:
        """Do what is due when all steps that end now are over; returns the workers that were touched."""
        return ()


class RoundRobin(Router):
    """Each worker in turn, first the first rank of each."""

    def __init__(self, workers: int, ranks: int = 1) -> None:
        self._order = [worker * ranks + rank for rank in range(ranks) for worker in range(workers)]
        self._next = 0

    def route(self, request: int, now: int) -> int:
        """The next rank."""
        target = self._order[self._next]
        self._next = (self._next + 1) % len(self._order)
        return target

    def ended(self, worker: int, ended: Ended, now: int) -> None:
        """Changes no turn."""


class Arrivals:
    """When requests come: at their time, after the one before in their session, or when one of a bounded number ends.

    Args:
        times: of arrival in ns, ascending where given; None: after ``previous``.
        previous: the request whose end each follows, or -1.
        delays: in ns, after that end.
        concurrency: requests under way at once; then times do not count. A session has its seat until its last request
            has ended; of several that follow one, the first has it, and the others are next for one that is free.
    """

    def __init__(
        self, times: Sequence[int | None], previous: Sequence[int], delays: Sequence[int], concurrency: int | None
    ) -> None:
        self._followers: dict[int, list[int]] = {}
        self._delays = delays
        # Of those that come at the same time, whose session came first.
        self._first = list(range(len(previous)))
        for request, before in enumerate(previous):
            if before >= 0:
                self._followers.setdefault(before, []).append(request)
                self._first[request] = self._first[before]
        first = [request for request, before in enumerate(previous) if before < 0]
        self._free = len(previous) if concurrency is None else concurrency  # seats
        # Those that wait for a seat, last first, and when they may come.
        self._queue = [(times[r] or 0 if concurrency is None else 0, r) for r in reversed(first)]
        self._heap: list[tuple[int, int, int]] = []
        self._seat(0)

    @property
    def next(self) -> int | None:
        """When the next one comes."""
        return self._heap[0][0] if self._heap else None

    def pop(self) -> int:
        """Take the next one."""
        return heappop(self._heap)[2]

    def over(self, request: int, now: int) -> None:
        """A request has ended."""
        followers = sorted(self._followers.pop(request, ()), key=self._delays.__getitem__)
        self._queue += [(now + self._delays[follower], follower) for follower in reversed(followers)]
        self._free += 1
        self._seat(now)

    def _seat(self, now: int) -> None:
        while self._free and self._queue:
            at, request = self._queue.pop()
            self._free -= 1
            heappush(self._heap, (max(at, now), self._first[request], request))


def run(
    requests: Requests,
    workers: Sequence[Worker],
    router: Router,
    arrivals: Arrivals,
    progress: Callable[[int], None] | None = None,
    *,
    ranks: int = 1,
) -> int:
    """Let all requests come and end; returns the time of the last event in ns.

    Args:
        requests: that come.
        workers: that serve them.
        router: chooses among the ranks of all workers.
        arrivals: when they come.
        progress: called with the number of requests that ended since the last call.
        ranks: of each worker.

    Raises:
        EngineError: nothing happens any more, and a request has neither finished nor been rejected.
    """
    wakes: list[tuple[int, int]] = []
    left = set(range(len(requests)))
    now = 0
    while True:
        while wakes and workers[wakes[0][1]].wake != wakes[0][0]:
            heappop(wakes)
        times = [at for at in (wakes[0][0] if wakes else None, arrivals.next, router.wake) if at is not None]
        if not times and left:
            request = min(left)
            raise EngineError(
                f"worker {requests.worker[request]} can not go on: request {request} has neither finished nor been "
                f"rejected, as {len(left) - 1} others, and nothing is under way"
            )
        if not times:
            return now
        now = min(times)
        due: dict[int, None] = {}
        while wakes and wakes[0][0] == now:
            index = heappop(wakes)[1]
            worker = workers[index]
            if worker.wake != now or index in due:
                continue
            due[index] = None
            ended = worker.step()
            router.ended(index, ended, now)
            over = (*ended.finished, *ended.rejected)
            left.difference_update(over)
            for request in over:
                arrivals.over(request, now)
            if progress is not None and over:
                progress(len(over))
        due.update(dict.fromkeys(router.act(now)))
        must_wait = router.is_first and bool(due)
        while arrivals.next == now and not must_wait:
            request = arrivals.pop()
            requests.arrival[request] = now
            target = router.route(request, now)
            requests.worker[request] = target
            workers[target // ranks].submit(request, now)
            due[target // ranks] = None
        for index in due:
            worker = workers[index]
            if not worker.is_busy:
                worker.begin(now)
            if worker.wake is not None:
                heappush(wakes, (worker.wake, index))
