"""Curves as a picture, and as one HTML page: no script, nothing from elsewhere, light and dark."""

from __future__ import annotations

import io
from importlib import resources
from typing import Any, Final

import numpy as np
from jinja2 import Environment, StrictUndefined

from kvist.sim.charts import Series, line_chart
from kvist.sim.curve import CEILING, Curves

_X: Final = "capacity, blocks"
_Y: Final = "hit ratio, part of the prompt tokens"


def page(curves: Curves) -> str:
    """A drawing and a table of all curves."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(resources.files(__package__).joinpath("curve_page.html").read_text("utf-8"))
    at = np.array(curves.capacities, np.float64)
    series = [Series(policy, at, np.array(curves.ratios(policy))) for policy in curves.hits]
    return template.render(
        name=curves.name,
        about=_about(curves),
        drawing=line_chart("hit ratio over capacity", series, x=_X, y="hit ratio", log_x=True),
        policies=list(curves.hits),
        rows=list(_rows(curves)),
        ceiling=CEILING,
    )


def png(curves: Curves) -> bytes:
    """A picture of all curves. Needs matplotlib; equal curves give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel=_X, ylabel=_Y, title=curves.name)
    for policy in curves.hits:
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if policy == CEILING else {"marker": "."}
        axes.plot(curves.capacities, curves.ratios(policy), label=policy, **style)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _about(curves: Curves) -> str:
    return (
        f"{curves.requests:,} requests of {curves.prompt_tokens:,} prompt tokens, in {curves.blocks:,} full blocks of "
        f"{curves.block_size} tokens, of which {curves.unique_blocks:,} differ."
    )


def _rows(curves: Curves) -> list[dict[str, Any]]:
    ratios = [curves.ratios(policy) for policy in curves.hits]
    return [
        {
            "capacity": f"{capacity:,}",
            "tokens": f"{capacity * curves.block_size:,}",
            "ratios": [f"{ratio[point]:.2%}" for ratio in ratios],
        }
        for point, capacity in enumerate(curves.capacities)
    ]
