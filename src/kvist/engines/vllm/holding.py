"""What snapshots hold, in blocks: of requests that run, and of those that have ended, as long as their blocks last.

Beside vLLM's scheduler, in its thread. Knows blocks, how often each was handed out, and sequences; must not know vLLM's
requests.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvist.engines.paged.matching import first_block
from kvist.engines.paged.plans import CapturePlan, Place, SequencePlan
from kvist.engines.paged.requests import newest, told_apart
from kvist.engines.vllm.internals import Blocks

FINISHED_MAX: Final = 1024
"""Finished requests that can still be snapshotted, as far as their blocks are in place."""

Places = dict[tuple[int, int], Place]
"""By group and block."""


@dataclass(frozen=True, slots=True)
class _Finished:
    """A request that has ended: what a snapshot of it needs."""

    sequence: SequencePlan
    generations: list[list[int]]
    names: list[str]


@dataclass(slots=True)
class _Held:
    """Blocks of a capture: those that are pinned, and the pages of those that are not."""

    pinned: list[int]
    loose: list[Place]


class Holding:
    """See the module."""

    def __init__(self, blocks: Blocks, windows: Sequence[int | None], size: int) -> None:
        """
        Args:
            blocks: vLLM's.
            windows: by group: the tokens that one looks back on, itself included, or ``None``: all.
            size: tokens a block.
        """
        self._blocks, self._windows, self._size = blocks, windows, size
        self._finished: OrderedDict[str, _Finished] = OrderedDict()
        self._captures: dict[str, _Held] = {}
        self._tails: list[int] = []  # partly filled last blocks of requests that just ended
        self._numbers = itertools.count(1)

    # -- requests that end ---------------------------------------------------------------------------------------

    def end(self, sequence: SequencePlan, names: list[str]) -> None:
        """A request has ended; its blocks are about to be let go.

        Args:
            sequence: of the request.
            names: of its full blocks.
        """
        blocks = [ids for _, ids in sequence.blocks]
        generations = [[self._blocks.generation[block] for block in ids] for ids in blocks]
        self._finished[sequence.request_id] = _Finished(sequence, generations, names)
        while len(self._finished) > FINISHED_MAX:
            self._finished.popitem(last=False)
        if sequence.cached % self._size and self._blocks.can_linger:
            tails = [ids[-1] for ids in blocks if ids]
            self._blocks.pin(tails)
            self._tails += tails

    def settle(self) -> None:
        """Between two steps: let go of last blocks whose requests have done so."""
        if self._tails:
            free = self._blocks.only_pinned(self._tails)
            self._blocks.linger(free)
            self._tails = [block for block in self._tails if block not in free]

    def forget(self) -> None:
        """No request that has ended can be snapshotted any more."""
        self._finished.clear()

    def ended(self, is_meant: Callable[[str], bool], places: Places) -> list[SequencePlan]:
        """The sequences of finished requests, the newest of each name, as far as their blocks still hold them.

        Args:
            is_meant: whether a request, by vLLM's id, is wanted.
            places: their pages go here.
        """
        found = [done for name, done in reversed(self._finished.items()) if is_meant(name)]
        return [self._left_of(done, places) for done in newest(found, lambda done: done.sequence.id)]

    def _left_of(self, done: _Finished, places: Places) -> SequencePlan:
        sequence, last = done.sequence, -(-done.sequence.cached // self._size)
        for (first, ids), generations in zip(sequence.blocks, done.generations, strict=True):
            kept = [self._blocks.generation[block] == old for block, old in zip(ids, generations, strict=True)]
            whole = kept.index(False) if False in kept else len(ids)
            last = min(last, first + whole if whole else 0)
        cached = min(sequence.cached, last * self._size)
        blocks = []
        for (first, ids), window in zip(sequence.blocks, self._windows, strict=True):
            if cached and first > first_block(cached, window, self._size):
                cached = 0  # the window's first blocks are gone since
            blocks.append((first, ids[: max(0, last - first)]))
        if not cached:
            blocks = [(0, []) for _ in blocks]
        left = replace(sequence, cached=cached, blocks=blocks)
        self.add(left, done.names, places)
        return left

    # -- captures ------------------------------------------------------------------------------------------------

    def add(self, sequence: SequencePlan, names: list[str], places: Places) -> None:
        """Put the pages of a sequence into ``places``; ``names``: of its full blocks."""
        for group, (first, ids) in enumerate(sequence.blocks):
            for number, block in enumerate(ids, first):
                fill = min(self._size, sequence.cached - number * self._size)
                name = names[number] if fill == self._size and number < len(names) else None
                known = places.get((group, block))
                if known is None or known.fill < fill:
                    places[group, block] = Place(group, block, self._blocks.generation[block], fill, name)

    def capture(self, sequences: Sequence[SequencePlan], places: Places, loose: Iterable[Place]) -> CapturePlan:
        """Begin a capture.

        Args:
            sequences: what it holds.
            places: their pages, which are kept in place until `release`.
            loose: further pages, which are not.
        """
        pinned, others = [block for _, block in places], list(loose)
        self._blocks.pin(pinned)
        capture = f"capture-{next(self._numbers)}"
        self._captures[capture] = _Held(pinned, others)
        return CapturePlan(capture, [*places.values(), *others], told_apart(sequences))

    def gone(self, capture: str) -> list[tuple[int, int]]:
        """Group and block of the pages of a capture that are lost since the last call: their block was reused."""
        held, generation = self._captures[capture], self._blocks.generation
        gone = [place for place in held.loose if generation[place.block] != place.generation]
        if gone:
            held.loose = [place for place in held.loose if generation[place.block] == place.generation]
        return [(place.group, place.block) for place in gone]

    def release(self, capture: str) -> None:
        """Let go of what a capture pinned. Idempotent."""
        held = self._captures.pop(capture, None)
        if held is not None:
            self._blocks.unpin(held.pinned)
