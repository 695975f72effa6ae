"""Admission: which blocks are worth the way down from the device. Knows uses of keys; not what is where."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from kvist.blocks.policy.tinylfu import TinyLfu
from kvist.tiers.config import TiersConfig


class Admission(Protocol):
    """Told of the end of each use of a block; asked about some of them."""

    def note(self, keys: Iterable[int]) -> None:
        """A use of each of these blocks ended."""

    def admits(self, key: int) -> bool:
        """Whether this block is worth a copy."""


class Always:
    """Every block is."""

    def note(self, keys: Iterable[int]) -> None:
        """See `Admission.note`."""

    def admits(self, key: int) -> bool:
        """See `Admission.admits`."""
        return True


class SecondTouch:
    """A block is that was used twice, and again before ``history`` other blocks were.

    Args:
        history: of how many blocks the uses are kept, 1 or more.
    """

    def __init__(self, history: int) -> None:
        self._history = history
        self._again: OrderedDict[int, bool] = OrderedDict()  # whether it was used twice; the longest unused first

    def note(self, keys: Iterable[int]) -> None:
        """See `Admission.note`."""
        again = self._again
        for key in keys:
            again[key] = key in again
            again.move_to_end(key)
        while len(again) > self._history:
            again.popitem(last=False)

    def admits(self, key: int) -> bool:
        """See `Admission.admits`."""
        return self._again.get(key, False)


class Frequency:
    """A block is that was used ``count`` times or more lately, as a `TinyLfu` counts; it may err upwards.

    Args:
        count: 1 to 15.
        capacity: how many blocks it tells apart well.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self._least = count
        self._sketch = TinyLfu(capacity)

    def note(self, keys: Iterable[int]) -> None:
        """See `Admission.note`."""
        for key in keys:
            self._sketch.count(key)

    def admits(self, key: int) -> bool:
        """See `Admission.admits`."""
        return self._sketch.estimate(key) >= self._least


def make_admission(config: TiersConfig) -> Admission:
    """What ``config.admission`` says, over as many blocks as the host tier holds."""
    if config.admission == "second_touch":
        return SecondTouch(config.host.capacity)
    if config.admission == "frequency":
        return Frequency(config.admission_count, config.host.capacity)
    return Always()
