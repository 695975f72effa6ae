"""Draws lineage as git's graphical tools do: one small SVG a row, which joins those above and below it.

Pure: knows rows of `kvist.repo.lineage.lanes`; must not know snapshots or pages. A lane never changes its column, so a
row has straight lanes that pass by, the node, and strokes from the node down to the lanes that wait for its parents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from kvist.repo.lineage import Row

HEIGHT: Final = 44
"""Of a row, in pixels; the style sheet's ``--row`` is the same."""
_LANE: Final = 15
_LANE_MIN: Final = 4
_WIDTH_MAX: Final = 256
_COLOURS: Final = 8
_RADIUS: Final = 4.5


@dataclass(frozen=True, slots=True)
class Stroke:
    """One line of a row: from a lane at its top, or from the node, to a lane at its bottom, or to the node.

    Attributes:
        start: the lane at the top; ``None``: the node.
        end: the lane at the bottom; ``None``: the node.
        colour: of the lane whose line it is.
    """

    start: int | None
    end: int | None
    colour: int


def strokes(row: Row, parents: Iterable[str]) -> list[Stroke]:
    """The lines of a row.

    Args:
        row: from `lanes`.
        parents: the node's, as `lanes` was told them.
    """
    found = [
        Stroke(lane, None if waits == row.cid else lane, lane)
        for lane, waits in enumerate(row.before)
        if waits is not None
    ]
    for parent in parents:
        lane = row.after.index(parent)
        found.append(Stroke(None, lane, lane if lane >= len(row.before) or row.before[lane] is None else row.lane))
    return found


@dataclass(frozen=True, slots=True)
class Canvas:
    """How wide all rows of one drawing are.

    Attributes:
        lanes: most lanes side by side.
    """

    lanes: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Canvas:
        """One that holds all rows."""
        return cls(max((max(len(row.before), len(row.after), row.lane + 1) for row in rows), default=1))

    @property
    def step(self) -> float:
        """Pixels from lane to lane; fewer where there are many."""
        return max(_LANE_MIN, min(_LANE, _WIDTH_MAX / self.lanes))

    @property
    def width(self) -> int:
        """Pixels."""
        return round(self.step * self.lanes + _LANE)

    def draw(self, row: Row, parents: Callable[[str], Iterable[str]], *, is_head: bool, label: str) -> Markup:
        """One row.

        Args:
            row: from `lanes`.
            parents: the same that `lanes` was given.
            is_head: whether to mark the node: a ref names it.
            label: what a screen reader says.
        """
        lines = strokes(row, parents(row.cid))
        parts = [
            f'<path class="l{line.colour % _COLOURS}" d="{self._path(line, row.lane)}"/>'
            for line in sorted(lines, key=lambda line: line.start is not None)
        ]
        colour = next((line.colour for line in lines if line.end is None), row.lane) % _COLOURS
        kind = "head" if is_head else "node"
        parts.append(
            f'<circle class="{kind} n{colour}" cx="{self._x(row.lane):g}" cy="{HEIGHT / 2:g}" r="{_RADIUS:g}"/>'
        )
        head = f'<svg class="lanes" width="{self.width}" height="{HEIGHT}" viewBox="0 0 {self.width} {HEIGHT}"'
        return Markup(f'{head} role="img"><title>') + label + Markup("</title>" + "".join(parts) + "</svg>")

    def _x(self, lane: int) -> float:
        return _LANE / 2 + self.step * lane + self.step / 2

    def _path(self, line: Stroke, node: int) -> str:
        middle = HEIGHT / 2
        x1 = self._x(node if line.start is None else line.start)
        x2 = self._x(node if line.end is None else line.end)
        y1 = middle if line.start is None else 0.0
        y2 = middle if line.end is None else float(HEIGHT)
        if x1 == x2:
            return f"M{x1:g} {y1:g}V{y2:g}"
        bend = (y1 + y2) / 2
        return f"M{x1:g} {y1:g}C{x1:g} {bend:g} {x2:g} {bend:g} {x2:g} {y2:g}"
