"""Costs: is it faster to load pages than to compute them? Learnt from what both took.

Pure: knows counts and seconds that it is told. Must not know a clock, pages or an engine.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from typing import Final

from kvist.errors import InvalidInput

KEPT: Final = 24
"""Observations that a fit looks at: the newest."""
HALF_LIFE: Final = 8
"""Observations after which one weighs half as much."""
ENOUGH: Final = 4
"""Observations of each kind before which every load is tried."""
RETRY_EVERY: Final = 32
"""Of refused loads, every so many is tried all the same."""


class LoadCost:
    """Whether loading is faster than computing, by two linear models: a fixed part, and a part per token or byte.

    Each is fitted to its newest observations by the weighted median of the slopes between any two (Theil 1950, Sen
    1968), with weights that fall exponentially with age. A median, so that one observation among several that took ten
    times as long (a warm-up, a page fault storm, a neighbour) changes nothing, also when it is the very first.

    Until `ENOUGH` observations of each kind are known the answer is yes: only a load that was tried can be measured.
    While loads are refused every `RETRY_EVERY`-th is tried, so that an estimate heals when the store gets faster.
    What is computed is measured anyway.

    Equal calls give equal answers. Calls come from one thread at a time.
    """

    def __init__(self) -> None:
        self._compute = _Line("tokens")
        self._load = _Line("bytes")
        self._refused = 0

    def observe_compute(self, tokens: int, seconds: float) -> None:
        """Note that computing the KV of ``tokens`` (1 or more) took so long.

        Raises:
            InvalidInput: no tokens, or seconds that no clock gives.
        """
        self._compute.observe(tokens, seconds)

    def observe_load(self, nbytes: int, seconds: float) -> None:
        """Note that loading ``nbytes`` (1 or more) took so long, from the decision until the pages were in place.

        Raises:
            InvalidInput: as `observe_compute`.
        """
        self._load.observe(nbytes, seconds)

    def compute_seconds(self, tokens: int) -> float | None:
        """The estimate for computing ``tokens``; ``None`` before `ENOUGH` observations."""
        return self._compute.at(tokens)

    def load_seconds(self, nbytes: int) -> float | None:
        """The estimate for loading ``nbytes``; ``None`` before `ENOUGH` observations."""
        return self._load.at(nbytes)

    def loads_faster(self, tokens: int, nbytes: int) -> bool:
        """Whether to load the ``nbytes`` that hold the KV of ``tokens``, rather than to compute it.

        Counts refusals: ask once a decision. Without tokens there is nothing to gain: no.
        """
        if tokens <= 0:
            return False
        compute, load = self.compute_seconds(tokens), self.load_seconds(nbytes)
        if compute is None or load is None or load <= compute:
            self._refused = 0
            return True
        self._refused += 1
        if self._refused < RETRY_EVERY:
            return False
        self._refused = 0
        return True


class _Line:
    """Seconds as ``fixed + slope * units``, both at least 0."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._points: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self._fit: tuple[float, float] | None = None

    def observe(self, units: int, seconds: float) -> None:
        if units < 1 or not (math.isfinite(seconds) and seconds >= 0):
            raise InvalidInput(f"expected at least 1 of {self._unit}, and seconds of 0 or more; got {units}, {seconds}")
        self._points.append((units, seconds))
        self._fit = None

    def at(self, units: int) -> float | None:
        if len(self._points) < ENOUGH:
            return None
        if self._fit is None:
            self._fit = self._fitted()
        fixed, slope = self._fit
        return fixed + slope * units

    def _fitted(self) -> tuple[float, float]:
        newest = len(self._points) - 1
        points = [(x, y, 0.5 ** ((newest - i) / HALF_LIFE)) for i, (x, y) in enumerate(self._points)]
        slopes = [
            ((y2 - y1) / (x2 - x1), w1 * w2 * abs(x2 - x1))  # near neighbours say little about a slope
            for (x1, y1, w1), (x2, y2, w2) in itertools.combinations(points, 2)
            if x1 != x2
        ]
        through_origin = 0.0, _median((y / x, w * x) for x, y, w in points)
        if not slopes:  # one size was seen: nothing tells the fixed part from the rest
            return through_origin
        slope = max(0.0, _median(slopes))
        fixed = _median((y - slope * x, w) for x, y, w in points)
        return (fixed, slope) if fixed >= 0 else through_origin


def _median(weighted: Iterable[tuple[float, float]]) -> float:
    """The value at which half the weight is reached."""
    values = sorted(weighted)
    half = sum(weight for _, weight in values) / 2
    reached = 0.0
    for value, weight in values:
        reached += weight
        if reached >= half:
            return value
    return values[-1][0]
