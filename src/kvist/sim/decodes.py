"""The sequences of one engine that decode: each gets a token in every pass, so one count of passes tells all of them.

A sequence's length, the pass that gives its last token and the passes in which it needs a block follow from the number
of the pass in which it came. What many passes in a row need is a sum over residues of the block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from kvist.sim.pool import Slots
from kvist.sim.requests import NEVER


@dataclass(slots=True, eq=False)
class Sequence:
    """A request that runs.

    Attributes:
        request: its number.
        order: of admission.
        total: tokens at which it ends.
        known: tokens of prompt and answer when it was admitted.
        computed: how many of those are.
        slots: of the computed blocks, in order; the last may hold a part.
        joined: number of the pass from which it decodes.
    """

    request: int
    order: int
    total: int
    known: int
    computed: int
    slots: Slots
    joined: int = NEVER


class Decodes:
    """See the module.

    Args:
        block_size: tokens.
    """

    def __init__(self, block_size: int) -> None:
        self.length = 0  # sum of the lengths, in tokens
        self._size = block_size
        self._pass = 0
        self._sequences: dict[int, Sequence] = {}
        self._ends: list[tuple[int, int, Sequence]] = []  # by the number of the pass after the last token
        self._crossings = [0] * block_size  # sequences that need a block in passes of this number, modulo
        self._tail: list[int] = []  # slots of the blocks after those in `Sequence.slots`, whosever

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they came."""
        return iter(self._sequences.values())

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences.values())

    def __contains__(self, request: int) -> bool:
        return request in self._sequences

    @property
    def requests(self) -> list[int]:
        """Their numbers, in order."""
        return list(self._sequences)

    def add(self, sequence: Sequence, tokens: int = 1) -> None:
        """It decodes from the next pass on; it has so many tokens more than it was admitted with: 1 or none."""
        sequence.joined = self._pass + 1 - tokens
        length = sequence.known + tokens
        self._sequences[sequence.request] = sequence
        self.length += length
        self._crossings[self._crossing(sequence)] += 1
        heappush(self._ends, (self._pass + sequence.total - length, sequence.order, sequence))

    def remove(self, sequence: Sequence) -> None:
        """It decodes no more."""
        del self._sequences[sequence.request]
        length = self.length_of(sequence)
        self.length -= length
        self._crossings[self._crossing(sequence)] -= 1
        if length < sequence.total:
            self._ends = [each for each in self._ends if each[2] is not sequence]
            heapify(self._ends)

    def pop_ended(self) -> Sequence | None:
        """The next that has all its tokens, in order; `remove` is for the caller."""
        return heappop(self._ends)[2] if self._ends and self._ends[0][0] <= self._pass else None

    def advance(self, passes: int) -> None:
        """Each has got so many tokens."""
        self.length += passes * len(self._sequences)
        self._pass += passes

    def length_of(self, sequence: Sequence) -> int:
        """Tokens that it has, the last of them not computed."""
        return sequence.known + 1 + self._pass - sequence.joined

    def needs_block(self, sequence: Sequence) -> bool:
        """Whether the next pass begins a block of it."""
        return self._crossing(sequence) == self._pass % self._size

    def blocks(self, start: int, end: int) -> int:
        """Blocks that the passes from ``start`` to ``end`` from now begin."""
        whole, rest = divmod(end - start, self._size)
        at = (self._pass + start) % self._size
        around = self._crossings[at : at + rest]
        needed = sum(around) + sum(self._crossings[: rest - len(around)])
        return needed + whole * len(self._sequences)

    def passes_ahead(self, free: int, longest: int) -> int:
        """Passes until one ends, or blocks might be more than those free slots, but 1 at least.

        Args:
            free: slots.
            longest: passes, 1 or more.
        """
        high = min(self._ends[0][0] - self._pass, longest)
        if high == 1 or self.blocks(0, high) <= free:
            return high
        low = 1
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self.blocks(0, middle) <= free else (low, middle)
        return low

    def keep(self, slots: Slots) -> None:
        """Slots for blocks that begin."""
        self._tail.extend(slots.tolist())

    def take_back(self, n: int) -> Slots:
        """So many of the slots that were kept last, whose blocks are not to begin yet."""
        back = self._tail[len(self._tail) - n :]
        del self._tail[len(self._tail) - n :]
        return np.array(back, dtype=np.int32)

    def slots_of(self, sequence: Sequence, computed: int) -> Slots:
        """Its slots up to so many computed tokens: its own, and as many as it takes of those that were kept."""
        taken = -(-computed // self._size) - len(sequence.slots)
        if not taken:
            return sequence.slots
        tail, self._tail[-taken:] = self._tail[-taken:], []
        return np.concatenate((sequence.slots, np.array(tail, dtype=np.int32)))

    def _crossing(self, sequence: Sequence) -> int:
        """Number, modulo, of the passes that begin a block of it: its length is one more than whole blocks then."""
        return (sequence.joined - sequence.known) % self._size
