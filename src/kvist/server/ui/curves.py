"""Hit curves for the page: what caches of other sizes, and other policies, would have found in this server's traffic.

Knows prompts, traces and `kvist.sim.curve`. Needs NumPy (the extra ``sim``), so that a page imports it when it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup

from kvist.server.recent import Recent
from kvist.server.ui import figures
from kvist.sim.charts import Mark, Series, line_chart
from kvist.sim.curve import CEILING, Curves, curves
from kvist.sim.trace import Trace, TraceBuilder

POLICIES: Final = ("lru", "arc", "s3fifo", "sieve")
"""Those that the page draws; `kvist sim curve` knows more."""
_POINTS: Final = 16


@dataclass(frozen=True, slots=True)
class Drawing:
    """Curves, drawn.

    Attributes:
        svg: the picture.
        about: what was replayed.
        rows: (capacity in blocks, in tokens, in bytes or ``""``, hit ratio of each policy), as text.
        policies: their names, in the order of the columns; the ceiling last.
    """

    svg: Markup
    about: str
    rows: tuple[tuple[str, str, str, tuple[str, ...]], ...]
    policies: tuple[str, ...]


def trace_of(recent: Recent) -> Trace | None:
    """The traffic that a server remembers; ``None``: there is none yet."""
    prompts = recent.prompts()
    if not prompts:
        return None
    builder = TraceBuilder(block_size=recent.block_size)
    for number, prompt in enumerate(prompts):
        builder.add(prompt.tokens, 0, prompt.blocks, arrival_ms=float(number))
    return builder.build("the last requests")


def draw(trace: Trace, *, capacity: int | None = None, block_bytes: int | None = None) -> Drawing:
    """The curves of a trace.

    Args:
        trace: what is replayed.
        capacity: blocks that the engine's pool has, to be marked.
        block_bytes: bytes of a block in it; ``None``: not known.
    """
    found = curves(trace, policies=POLICIES, points=_POINTS)
    at = np.array(found.capacities, np.float64)
    series = [Series(name, at, np.array(found.ratios(name))) for name in found.hits]
    marks = [] if capacity is None else [Mark("pool now", float(capacity))]
    svg = line_chart("hit ratio against capacity", series, x="capacity, blocks", y="hit ratio", log_x=True, marks=marks)
    return Drawing(svg, _about(found), tuple(_rows(found, block_bytes)), tuple(found.hits))


def _about(found: Curves) -> str:
    return (
        f"{found.name}: {found.requests:,} prompts of {found.prompt_tokens:,} tokens; {found.unique_blocks:,} "
        f"different blocks of {found.block_size} tokens. {CEILING.capitalize()}: Belady's bound; no policy passes it."
    )


def _rows(found: Curves, block_bytes: int | None) -> Sequence[tuple[str, str, str, tuple[str, ...]]]:
    ratios = [found.ratios(name) for name in found.hits]
    return [
        (
            f"{capacity:,}",
            f"{capacity * found.block_size:,}",
            "" if block_bytes is None else figures.nbytes(capacity * block_bytes),
            tuple(figures.percent(ratio[point]) for ratio in ratios),
        )
        for point, capacity in enumerate(found.capacities)
    ]
