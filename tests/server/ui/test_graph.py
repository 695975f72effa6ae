"""The drawing of a graph: whoever follows the lines from a child arrives at each of its parents."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from kvist.repo.lineage import Row, lanes
from kvist.server.ui.graph import HEIGHT, Canvas, Stroke, strokes


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    """Parents by node, children before parents."""
    count = draw(st.integers(1, 14))
    names = [f"n{number}" for number in range(count)]
    graph = {}
    for number, name in enumerate(names):
        older = names[number + 1 :]
        graph[name] = draw(st.lists(st.sampled_from(older), unique=True, max_size=3)) if older else []
    return graph


def follow(rows: list[Row], drawn: dict[str, list[Stroke]], start: int, lane: int) -> str:
    """The node that a line leaving row ``start`` in ``lane`` arrives at."""
    for row in rows[start + 1 :]:
        (line,) = [stroke for stroke in drawn[row.cid] if stroke.start == lane]
        if line.end is None:
            return row.cid
        lane = line.end
    raise AssertionError("a line that ends nowhere")


@given(graphs())
def test_every_line_leads_to_a_parent(graph: dict[str, list[str]]) -> None:
    rows = list(lanes(graph, graph.__getitem__))
    assert [row.cid for row in rows] == list(graph)
    drawn = {row.cid: strokes(row, graph[row.cid]) for row in rows}
    for number, row in enumerate(rows):
        ends = [stroke.end for stroke in drawn[row.cid] if stroke.start is None]
        assert [follow(rows, drawn, number, end) for end in ends if end is not None] == graph[row.cid]


@given(graphs())
def test_lines_meet_from_row_to_row(graph: dict[str, list[str]]) -> None:
    rows = list(lanes(graph, graph.__getitem__))
    bottoms: set[int] = set()
    for row in rows:
        drawn = strokes(row, graph[row.cid])
        assert {stroke.start for stroke in drawn if stroke.start is not None} == bottoms
        bottoms = {stroke.end for stroke in drawn if stroke.end is not None}
    assert not bottoms


@given(graphs())
def test_a_row_is_drawn_inside_its_canvas(graph: dict[str, list[str]]) -> None:
    rows = list(lanes(graph, graph.__getitem__))
    canvas = Canvas.of(rows)
    for row in rows:
        text = canvas.draw(row, graph.__getitem__, is_head=True, label="<b>")
        assert "&lt;b&gt;" in text
        assert text.count("<circle") == 1
        for path in re.findall(r' d="([^"]*)"', text):
            numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
            assert all(0 <= number <= max(canvas.width, HEIGHT) for number in numbers)


def test_many_lanes_become_narrow() -> None:
    wide = Row("a", 99, tuple("x" for _ in range(99)), tuple("x" for _ in range(99)))
    assert Canvas.of([wide]).width < 500
    assert Canvas.of([]).lanes == 1
