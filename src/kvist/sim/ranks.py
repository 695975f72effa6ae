"""Data-parallel ranks of one engine in virtual time: each has a pool and a queue of its own, and all pass together.

A pass of the group begins when the one before it ended, for every rank that has work, and lasts as long as the slowest
rank's. So a jump is as long as the shortest of theirs, and each of its passes takes the longest of their times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvist.sim.requests import Requests
from kvist.sim.scheduler import Ended, Scheduler


class Ranks:
    """One engine of several ranks.

    Args:
        requests: of the replay; their worker says which rank each belongs to.
        ranks: with numbers in a row.
    """

    def __init__(self, requests: Requests, ranks: Sequence[Scheduler]) -> None:
        self.ranks = ranks
        self.wake: int | None = None
        self.is_busy = False
        self._requests = requests

    def submit(self, request: int, now: int) -> None:
        """Queue a request at its rank; a jump under way ends with the pass that is under way now."""
        rank = self.ranks[self._requests.worker[request] - self.ranks[0].worker]
        was_busy, before = rank.is_busy, rank.wake
        rank.submit(request, now)
        if not self.is_busy:
            self.wake = rank.wake
        elif not was_busy or rank.wake != before:
            for each in self.ranks:
                if each.is_busy:
                    each.cut(now)
                    self.wake = each.wake

    def step(self) -> Ended:
        """End what ends at `wake`."""
        now, ended = self.wake, Ended()
        for rank in self.ranks:
            if not self.is_busy or rank.is_busy:
                one = rank.step()
                ended.first += one.first
                ended.finished += one.finished
                ended.rejected += one.rejected
        self.is_busy = False
        self.wake = None if all(rank.is_idle for rank in self.ranks) else now
        return ended

    def begin(self, now: int) -> None:
        """Start the next pass of all ranks that have anything to do."""
        for rank in self.ranks:
            rank.begin(now)
        busy = [rank for rank in self.ranks if rank.is_busy]
        self.is_busy = bool(busy)
        if busy:
            passes = min(len(rank.times) for rank in busy)
            times = np.max([rank.times[:passes] for rank in busy], axis=0)
            for rank in busy:
                rank.align(times)
        self.wake = (
            busy[0].wake if busy else min((w for rank in self.ranks if (w := rank.wake) is not None), default=None)
        )

    def settle(self, now: int) -> None:
        """Carry out the passes that have ended by now."""
        for rank in self.ranks:
            rank.settle(now)
