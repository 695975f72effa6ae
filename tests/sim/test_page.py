"""The report page: it holds all that it shows, and nothing of a trace's name becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.sim.charts import Series, line_chart, short
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.page import page
from kvist.sim.report import Report, Sla

from .making import records

VOID = {"meta", "line", "polyline"}


class Tree(HTMLParser):
    """Checks that elements nest; keeps their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def made(name: str = "by hand", sla: Sla | None = None, **columns: Any) -> str:
    return page(Report(name, EngineConfig(), ClusterConfig(), records(**columns), 0.5, sla))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = made()
    tree = Tree(text)
    assert not [one for one in tree.attributes if one[1] in ("src", "href", "onclick")]
    assert "<script" not in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_the_figures() -> None:
    text = " ".join(Tree(made(sla=Sla(ttft_ms=10))).words)
    for expected in (
        "by hand",
        "21.33%",
        "requests completed",
        "within the SLA",
        "33.33%",
        "engine.num_blocks",
        "16384",
    ):
        assert expected in text
    assert made().count("<polyline") == 6


def test_prefill_workers_have_rows_of_their_own() -> None:
    disaggregated = records(prefill_worker=[0, 0, -1], busy_ms=[18.0, 10.0])
    text = page(Report("by hand", EngineConfig(), ClusterConfig(prefill_workers=1), disaggregated, 0.5))
    assert " ".join(" ".join(Tree(text).words).split()).count("2 300 21.3%") == 2  # both saw both requests


def test_a_name_is_text() -> None:
    assert "<b>" not in made("<b>&")
    assert "&lt;b&gt;&amp;" in made("<b>&")


def test_a_replay_of_nothing_has_a_page() -> None:
    nothing = records()
    empty = {
        name: getattr(nothing, name)[:0].tolist()
        for name in nothing.__slots__
        if isinstance(getattr(nothing, name), np.ndarray) and name != "busy_ms"
    }
    assert "nothing to draw" in made(**empty, duration_ms=0.0)


@given(
    st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=30),
    st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=30, max_size=30),
    st.booleans(),
)
def test_lines_stay_within_the_drawing(xs: list[float], ys: list[float], log_x: bool) -> None:
    one = Series("a<b", np.array(sorted(xs)), np.array(ys[: len(xs)]), is_stepped=log_x)
    drawn = str(line_chart("t", [one], x="ms", y="part", log_x=log_x))
    Tree(drawn)
    points = re.search(r'points="([^"]*)"', drawn)
    assert points
    for point in points[1].split():
        x, y = map(float, point.split(","))
        assert 64 <= x <= 544
        assert 14 <= y <= 220


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (2e6, "2M"), (3e9, "3G")])
def test_numbers_on_axes_are_short(value: float, text: str) -> None:
    assert short(value) == text
