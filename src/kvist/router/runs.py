"""The tree below `kvist.router.index.Index`: runs of blocks, and who holds them.

A run is a stretch of one path that the same holders hold whole; where holders differ there is a cut. A lookup compares
tuples, a run at a time, and meets something new only where something changes. A holder is a bit: one tier of one pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

# Neighbours that have become alike are joined up to this length: longer runs make lookups faster, cuts dearer. Engines
# store one block at a time as they decode, and as many as a prompt has before.
JOINED = 16
# No run is longer than this: a cut copies what follows it in the run.
LONGEST = 128
_PASSED_ON: Final[Any] = object()  # stands for a name that moves from one block to another


class Run:
    """A stretch of blocks.

    Attributes:
        parent: the run before, or ``None`` for the first of a tree, which has no blocks.
        blocks: local hash of each block.
        children: runs that follow, by their first local hash.
        names: block hashes by holder; those of all blocks, then, if they have second names, those of all blocks again.
        held: the holders as one number, the union of the keys of ``names``.
    """

    __slots__ = ("blocks", "children", "held", "names", "parent")

    def __init__(self, parent: Run | None, blocks: tuple[int, ...]) -> None:
        self.parent = parent
        self.blocks = blocks
        self.children: dict[int, Run] = {}
        self.names: dict[int, tuple[int, ...]] = {}
        self.held = 0


class Tree:
    """Runs, and for each holder a map from its block hashes to them.

    Attributes:
        root: the run before all paths.
        maps: by holder, block hash to run. A holder must be entered here before it is used.
    """

    def __init__(self) -> None:
        self.root = Run(None, ())
        self.maps: dict[int, dict[int, Run]] = {}

    def position(self, bit: int, name: int) -> tuple[Run, int]:
        """The run that has this holder's block, and how many of its blocks end with it; KeyError if unknown."""
        run = self.maps[bit][name]
        names = run.names[bit]
        if names[-1] == name:
            return run, len(run.blocks)
        return run, names.index(name) % len(run.blocks) + 1

    def place(self, bit: int, run: Run, at: int, names: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        """Name blocks that follow the first ``at`` of ``run``. None of the names may be known to this holder."""
        done, count = 0, len(names)
        changed = []
        while done < count:
            if at == len(run.blocks):
                child = run.children.get(blocks[done])
                if child is None:
                    self._grow(bit, run, names[done:], blocks[done:])
                    break
                run, at = child, 0
            same = alike(run.blocks, at, blocks, done)
            if at:
                tail = self._split(run, at)
                if not same:
                    continue
                run = tail
            if same < len(run.blocks):
                self._split(run, same)
            part = names[done : done + same]
            run.held |= bit
            run.names[bit] = run.names.get(bit, ()) + part
            self.maps[bit].update(dict.fromkeys(part, run))
            changed.append(run)
            done += same
            at = same
        for run in changed:
            if run.parent is not None:
                self._join(run.parent)

    def place_again(self, bit: int, run: Run, at: int, names: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        """As `place`, of names some of which this holder has: here already, which is well, or elsewhere, which ends."""
        held_by = self.maps[bit]
        done, count = 0, len(names)
        while done < count:
            here: Run | None = run
            if at == len(run.blocks):
                here, at = run.children.get(blocks[done]), 0
            if here is not None and bit in here.names:
                most = min(alike(here.blocks, at, blocks, done), count - done)
                size = len(here.blocks)
                known = max(
                    alike(here.names[bit][layer : layer + size], at, names[: done + most], done)
                    for layer in range(0, len(here.names[bit]), size)
                )
                if known:
                    run, at, done = here, at + known, done + known
                    continue
            if here is not run:
                at = len(run.blocks)
            name = names[done]
            if name in held_by:
                old = held_by.pop(name)
                old.names[bit] = tuple(_PASSED_ON if other == name else other for other in old.names[bit])
                held_by[_PASSED_ON] = old
            self.place(bit, run, at, (name,), (blocks[done],))
            self.drop(bit, (_PASSED_ON,))
            run, at = self.position(bit, name)
            done += 1

    def drop(self, bit: int, names: Sequence[int]) -> None:
        """Forget these names of a holder; unknown ones are passed over."""
        held_by = self.maps[bit]
        names = tuple(names)
        done, count = 0, len(names)
        while done < count:
            name = names[done]
            run = held_by.get(name)
            if run is None:
                done += 1
                continue
            known = run.names[bit]
            size, many = len(run.blocks), 1
            if known[-1] == name:  # the tail first, as caches do
                many = alike(known[: -size - 1 : -1], 0, names, done)
                at = len(known) - many
            else:
                at = known.index(name)
                if len(known) == size:
                    many = alike(known, at, names, done)
            done += many
            if at and at + many == size == len(known) and run.held == bit and not run.children:  # a leaf shrinks
                for name in known[at:]:
                    del held_by[name]
                run.names[bit] = known[:at]
                run.blocks = run.blocks[:at]
            else:
                self._forget(bit, run, at, many)

    def clear(self, bit: int) -> None:
        """Forget all names of a holder."""
        held_by = self.maps[bit]
        runs = set(held_by.values())
        held_by.clear()
        for run in runs:
            del run.names[bit]
            run.held ^= bit
        for run in runs:
            self._prune(run)

    def walk(self, start: Run) -> Iterator[Run]:
        """All runs below one, each after its parent."""
        open_runs = list(start.children.values())
        while open_runs:
            run = open_runs.pop()
            yield run
            open_runs.extend(run.children.values())

    def _grow(self, bit: int, run: Run, names: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        """Add blocks that nobody has after the end of a run: to itself, if it is a short leaf of this holder alone."""
        if run.held == bit and not run.children:
            size = len(run.blocks)
            if size + len(names) <= JOINED and len(run.names[bit]) == size:
                run.blocks += blocks
                run.names[bit] += names
                self.maps[bit].update(dict.fromkeys(names, run))
                return
        for start in range(0, len(blocks), LONGEST):
            leaf = Run(run, blocks[start : start + LONGEST])
            leaf.held = bit
            leaf.names[bit] = names[start : start + LONGEST]
            run.children[blocks[start]] = leaf
            self.maps[bit].update(dict.fromkeys(leaf.names[bit], leaf))
            run = leaf

    def _forget(self, bit: int, run: Run, start: int, many: int) -> None:
        """Take ``many`` of a holder's names from a run, from that which is number ``start``."""
        size = len(run.blocks)
        layer, at = divmod(start, size)
        if at:
            run = self._split(run, at)
        if at + many < size:
            self._split(run, many)
        known = run.names[bit]
        gone = known[layer * many : (layer + 1) * many]
        held_by = self.maps[bit]
        for name in gone:
            del held_by[name]
        if len(known) > many:
            run.names[bit] = known[: layer * many] + known[(layer + 1) * many :]
        else:
            del run.names[bit]
            run.held ^= bit
        self._prune(run)
        self._join(run)
        if run.parent is not None:
            self._join(run.parent)

    def _split(self, run: Run, at: int) -> Run:
        """Cut a run in two; returns the second, new one."""
        size = len(run.blocks)
        blocks = run.blocks[at:]
        tail = Run(run, blocks)
        run.blocks = run.blocks[:at]
        tail.children = run.children
        for child in tail.children.values():
            child.parent = tail
        run.children = {blocks[0]: tail}
        tail.held = run.held
        for bit, names in run.names.items():
            if len(names) == size:
                run.names[bit], rest = names[:at], names[at:]
            else:
                layers = range(0, len(names), size)
                run.names[bit] = tuple(name for start in layers for name in names[start : start + at])
                rest = tuple(name for start in layers for name in names[start + at : start + size])
            tail.names[bit] = rest
            self.maps[bit].update(dict.fromkeys(rest, tail))
        return tail

    def _join(self, run: Run) -> None:
        """Make one run of this and its only child, if they are alike and it will not be long."""
        if len(run.children) != 1 or not run.held:
            return
        (child,) = run.children.values()
        size, more = len(run.blocks), len(child.blocks)
        if child.held != run.held or size + more > JOINED:
            return
        if any(len(run.names[bit]) != size or len(names) != more for bit, names in child.names.items()):
            return
        for bit, names in child.names.items():
            run.names[bit] += names
            self.maps[bit].update(dict.fromkeys(names, run))
        run.blocks += child.blocks
        run.children = child.children
        for below in run.children.values():
            below.parent = run

    def _prune(self, run: Run) -> None:
        """Take away a run that nobody holds and that leads nowhere, and those above it for which the same is true."""
        while not run.held and not run.children and (parent := run.parent) is not None:
            if parent.children.get(run.blocks[0]) is run:
                del parent.children[run.blocks[0]]
            run = parent


def alike(left: Sequence[int], at: int, right: Sequence[int], start: int) -> int:
    """How many leading entries of ``left[at:]`` and ``right[start:]`` are the same; both of one type."""
    most = min(len(left) - at, len(right) - start)
    if left[at : at + most] == right[start : start + most]:
        return most
    same = 0  # no more than most - 1 are
    while most - same > 1:
        middle = (same + most) // 2
        if left[at : at + middle] == right[start : start + middle]:
            same = middle
        else:
            most = middle
    return same
