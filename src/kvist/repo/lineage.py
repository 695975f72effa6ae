"""Lineage: walks over the graph of snapshots by parent. Pure: knows cids, parents and times, does no I/O."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvist.repo.snapshot import Snapshot


def ancestors(tips: Iterable[str], parents: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """``tips`` and all they descend from, each once, in no promised order.

    ``parents`` is asked once for each; it raises what it likes for a cid it does not know.
    """
    seen: set[str] = set()
    waiting = list(tips)
    while waiting:
        cid = waiting.pop()
        if cid not in seen:
            seen.add(cid)
            yield cid
            waiting += parents(cid)


def newest_first(snapshots: Mapping[str, Snapshot]) -> list[str]:
    """Every cid before its parents; among those free to come next, the newest first, then the smallest cid.

    Parents that are not in ``snapshots`` are ignored. Clocks of different makers need not agree: a parent that
    claims to be younger than its child still comes after it.
    """
    children = dict.fromkeys(snapshots, 0)
    for snapshot in snapshots.values():
        for parent in snapshot.parents:
            if parent in children:
                children[parent] += 1
    ready = [(-snapshots[cid].created_ns, cid) for cid, count in children.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        cid = heapq.heappop(ready)[1]
        order.append(cid)
        for parent in snapshots[cid].parents:
            if parent in children:
                children[parent] -= 1
                if not children[parent]:
                    heapq.heappush(ready, (-snapshots[parent].created_ns, parent))
    return order


@dataclass(frozen=True, slots=True)
class Row:
    """One snapshot's place in a drawn graph.

    Attributes:
        cid: which.
        lane: the column of its node.
        before: for each lane above the node, the cid that lane is waiting for, or ``None`` where it is free.
        after: the same, below the node.
    """

    cid: str
    lane: int
    before: tuple[str | None, ...]
    after: tuple[str | None, ...]


def lanes(order: Iterable[str], parents: Callable[[str], Iterable[str]]) -> Iterator[Row]:
    """Lay a graph out in lanes, top to bottom.

    Each lane holds the cid it waits for. A node takes the first lane that waits for it, else the first free one; its
    first parent takes over the lane, further parents take free ones unless some lane already waits for them.
    """
    waiting: list[str | None] = []
    for cid in order:
        before = tuple(waiting)
        lane = _first(waiting, cid)
        waiting[:] = [None if waits == cid else waits for waits in waiting]
        for parent in parents(cid):
            if parent not in waiting:
                place = lane if waiting[lane] is None else _first(waiting, None)
                waiting[place] = parent
        while waiting and waiting[-1] is None:
            waiting.pop()
        yield Row(cid, lane, before, tuple(waiting))


def _first(waiting: list[str | None], cid: str | None) -> int:
    """The first lane that waits for ``cid``, else the first free lane, made if need be."""
    for wanted in (cid, None):
        if wanted in waiting:
            return waiting.index(wanted)
    waiting.append(None)
    return len(waiting) - 1
