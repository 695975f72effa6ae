"""Contents by number: what the scheduler's interned contents are called on the wire, and which tokens they hold.

Equal prefixes have one number, be they prompt or answer. A number is free again when no request names it and the pool
does not hold it. Knows vLLM's block hashes and events; must not know sockets, times or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvist.blocks.events import EventData, Removed, Stored
from kvist.hashing.vllm import event_hash
from kvist.sim.pool import Contents


@dataclass(slots=True)
class ContentTable:
    """Numbers of contents, from 0. Not thread safe.

    Attributes:
        block_size: tokens a block.
    """

    block_size: int
    _numbers: dict[bytes, int] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)
    # By number.
    _hashes: list[bytes] = field(default_factory=list)
    _names: list[int] = field(default_factory=list)
    _parents: list[int | None] = field(default_factory=list)
    _tokens: list[Sequence[int]] = field(default_factory=list)
    _uses: list[int] = field(default_factory=list)
    _is_here: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        """All numbers are below this."""
        return len(self._hashes)

    @property
    def num_known(self) -> int:
        """Contents that have a number now."""
        return len(self._numbers)

    def take(self, hashes: Sequence[bytes], token_ids: Sequence[int]) -> Contents:
        """Numbers of a sequence's blocks, for one user more, who gives them back with `give_back`.

        Args:
            hashes: of its full blocks, the first one first.
            token_ids: the sequence.
        """
        size = self.block_size
        numbers = []
        parent: int | None = None
        for place, name in enumerate(hashes):
            number = self._numbers.get(name)
            if number is None:
                number = self._new(name, parent, token_ids[place * size : (place + 1) * size])
            self._uses[number] += 1
            numbers.append(number)
            parent = self._names[number]
        return np.array(numbers, dtype=np.int64)

    def give_back(self, numbers: Contents) -> None:
        """Their user is gone."""
        for number in numbers.tolist():
            self._uses[number] -= 1
            self._drop_if_unused(number)

    def find(self, hashes: Iterable[bytes]) -> Contents:
        """Numbers of the leading hashes that have one."""
        numbers = []
        for name in hashes:
            number = self._numbers.get(name)
            if number is None:
                break
            numbers.append(number)
        return np.array(numbers, dtype=np.int64)

    def tell(self, moves: Iterable[tuple[bool, Contents]]) -> list[EventData]:
        """What to publish after the pool has changed.

        Args:
            moves: what came into the pool (True) and what left it, in order, a block after its parent.
        """
        events: list[EventData] = []
        for came, numbers in moves:
            row = numbers.tolist()
            for number in row:
                self._is_here[number] = came
            if came:
                starts = [at for at in range(len(row)) if not at or self._parents[row[at]] != self._names[row[at - 1]]]
                events += [self._stored(row[a:b]) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
            else:
                events.append(Removed([self._names[number] for number in row]))
                for number in row:
                    self._drop_if_unused(number)
        return events

    def _stored(self, run: Sequence[int]) -> Stored:
        names, tokens = [self._names[number] for number in run], [self._tokens[number] for number in run]
        return Stored(names, self._parents[run[0]], token_ids=tokens)

    def _new(self, name: bytes, parent: int | None, tokens: Sequence[int]) -> int:
        row = (name, event_hash(name), parent, tokens, 0, False)
        columns = (self._hashes, self._names, self._parents, self._tokens, self._uses, self._is_here)
        if self._free:
            number = self._free.pop()
            for column, value in zip(columns, row, strict=True):
                column[number] = value  # type: ignore[index]
        else:
            number = len(self._hashes)
            for column, value in zip(columns, row, strict=True):
                column.append(value)  # type: ignore[attr-defined]
        self._numbers[name] = number
        return number

    def _drop_if_unused(self, number: int) -> None:
        if not self._uses[number] and not self._is_here[number]:
            del self._numbers[self._hashes[number]]
            self._tokens[number] = ()
            self._free.append(number)
