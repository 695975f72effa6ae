r"""Draws lineage as text, as git does: a node is ``*``, a lane ``|``, and ``/`` and ``\`` join a node to its parents.

Pure: knows rows of `kvist.repo.lineage.lanes`, not snapshots. A lane never changes its column, so the only strokes
besides lanes lead from a node to a parent that another lane waits for: ``|/`` next door, ``|_|/`` across lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kvist.repo.lineage import Row


class Drawn(NamedTuple):
    """One line of the drawing.

    Attributes:
        art: the drawn part.
        cid: the node on it; ``None`` on lines that only join.
    """

    art: str
    cid: str | None


def draw(rows: Iterable[Row], parents: Callable[[str], Iterable[str]]) -> Iterator[Drawn]:
    """Draw a graph.

    Args:
        rows: from `lanes`.
        parents: the same that `lanes` was given.
    """
    root: Row | None = None
    for row in rows:
        if root is not None and root.lane == row.lane:
            # an unrelated tip right below a root would look like its parent
            yield Drawn(_line(lane is not None for lane in root.after), None)
        yield Drawn(_node(row), row.cid)
        targets = [row.after.index(parent) for parent in parents(row.cid)]
        yield from (Drawn(art, None) for art in _joins(row, targets))
        root = None if targets else row


def _node(row: Row) -> str:
    lanes = [lane is not None for lane in row.before]
    lanes += [False] * (row.lane + 1 - len(lanes))
    art = list(_line(lanes).ljust(2 * row.lane + 1))
    art[2 * row.lane] = "*"
    return "".join(art)


def _joins(row: Row, targets: list[int]) -> Iterator[str]:
    """One line for each parent that is not straight below."""
    width = max(len(row.before), len(row.after), row.lane + 1)
    lanes = [lane < len(row.before) and row.before[lane] is not None for lane in range(width)]
    aside = [target for target in targets if target != row.lane]
    for number, target in enumerate(aside):
        lanes[row.lane] = row.lane in targets or number < len(aside) - 1
        art = list(_line(lanes).ljust(2 * width - 1))
        if target < row.lane:
            art[2 * row.lane - 1] = "/"
            across = range(2 * target + 1, 2 * row.lane - 1)
        else:
            art[2 * row.lane + 1] = "\\"
            across = range(2 * row.lane + 2, 2 * target)
        if len(across) > 1:  # else the target is next door
            for place in across:
                art[place] = "_" if art[place] == " " else art[place]
        yield "".join(art).rstrip()
        lanes[target] = True


def _line(lanes: Iterable[bool]) -> str:
    return " ".join("|" if lane else " " for lane in lanes).rstrip()
