"""The loss of a run as a picture. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

_WINDOW: Final = 20


def png(losses: Sequence[float], title: str) -> bytes:
    """Loss over steps, each one's and the mean of the last 20, on a log scale; equal losses give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="divergence from the teacher, nats per token", title=title)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="of the step")
    means = [sum(part) / len(part) for end in steps if (part := losses[max(0, end - _WINDOW) : end])]
    axes.plot(steps, means, color="C0", label=f"mean of {_WINDOW}")
    if min(losses) > 0:  # with --top-k a loss may fall below 0
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
