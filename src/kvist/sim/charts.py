"""Line charts as SVG, for a page: colours come from its style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

WIDTH: Final = 560
HEIGHT: Final = 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 40
_TICKS: Final = 5
_SHORT: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """A line.

    Attributes:
        label: its name.
        xs: ascending.
        ys: as many.
        is_stepped: whether a value holds until the next.
    """

    label: str
    xs: Floats
    ys: Floats
    is_stepped: bool = False


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, values: Floats) -> Floats:
        """Where on the drawing."""
        scaled = np.log10(np.maximum(values, self.low)) if self.is_log else values
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        return self.start + (np.clip(scaled, low, high) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if self.is_log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1, max(1, (last - first) // _TICKS))]
        step = _round_step((self.high - self.low) / _TICKS)
        count = int((self.high - self.low) / step + 1e-9)
        return [self.low + step * i for i in range(count + 1)]


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on the horizontal axis that is worth a line.

    Attributes:
        label: its name.
        x: where.
    """

    label: str
    x: float


def line_chart(
    title: str, series: Sequence[Series], *, x: str, y: str, log_x: bool = False, marks: Sequence[Mark] = ()
) -> Markup:
    """A drawing of lines over one pair of axes, which begin at 0, but a logarithmic one at a power of 10.

    Args:
        title: what a screen reader says.
        series: the lines; those without points are left out.
        x: name and unit of the horizontal axis.
        y: of the vertical one.
        log_x: whether the horizontal axis is logarithmic.
        marks: places on it; those beyond its ends are left out.
    """
    drawn = [one for one in series if len(one.xs)]
    if not drawn:
        return Markup('<p class="none">nothing to draw</p>')
    across = _across([one.xs for one in drawn], is_log=log_x)
    most = max(float(one.ys.max()) for one in drawn) or 1.0
    step = _round_step(most / _TICKS)
    up = _Axis(0.0, step * math.ceil(most / step - 1e-9), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_horizontal(at, float(up.place(np.array([at]))[0])) for at in up.ticks()),
        *(_vertical(at, float(across.place(np.array([at]))[0])) for at in across.ticks()),
        *(_mark(mark, across) for mark in marks if across.low <= mark.x <= across.high),
        *(_line(one, number, across, up) for number, one in enumerate(drawn, start=1)),
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x)}</text>',
        f'<text class="axis" x="{_LEFT + 6}" y="{_TOP + 6}">{escape(y)}</text>',
        "</svg>",
    ]
    keys = (f'<li class="s{number}">{escape(one.label)}</li>' for number, one in enumerate(drawn, start=1))
    return Markup("".join(parts) + '<ul class="key">' + "".join(keys) + "</ul>")


def short(value: float) -> str:
    """A number for an axis: 3 digits, and k, M or G."""
    for size, letter in _SHORT:
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _across(columns: Sequence[Floats], *, is_log: bool) -> _Axis:
    high = max(float(xs[-1]) for xs in columns)
    if not is_log:
        return _Axis(0.0, high or 1.0, _LEFT, WIDTH - _RIGHT)
    positive = [float(xs[xs > 0][0]) for xs in columns if (xs > 0).any()] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(positive)))
    return _Axis(low, max(low * 10, 10.0 ** math.ceil(math.log10(max(high, low)))), _LEFT, WIDTH - _RIGHT, is_log=True)


def _line(series: Series, number: int, across: _Axis, up: _Axis) -> str:
    xs, ys = across.place(series.xs), up.place(series.ys)
    if series.is_stepped:
        xs, ys = np.repeat(xs, 2)[1:], np.repeat(ys, 2)[:-1]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True))
    return f'<polyline class="s{number}" points="{points}"/>'


def _horizontal(value: float, at: float) -> str:
    text = f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>'
    return f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>{text}'


def _vertical(value: float, at: float) -> str:
    text = f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{short(value)}</text>'
    return f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>{text}'


def _mark(mark: Mark, across: _Axis) -> str:
    at = float(across.place(np.array([mark.x]))[0])
    side, anchor = (-5, "end") if at > WIDTH / 2 else (5, "start")
    text = f'<text class="axis" x="{at + side:.1f}" y="{HEIGHT - _BOTTOM - 8}" text-anchor="{anchor}">'
    line = f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
    return f"{line}{text}{escape(mark.label)}</text>"


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of 10, at least as large."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
