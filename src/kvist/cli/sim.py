"""The group `kvist sim`: its table of commands. Each is imported when it is called, and they import numpy."""

from __future__ import annotations

from typing import Final

import click

from kvist.cli.lazy import Lazy, LazyGroup

SECTIONS: Final[dict[str, dict[str, Lazy]]] = {
    "Traces": {
        "describe": Lazy("kvist.cli.sim_trace:describe", "Count what a trace holds."),
        "generate": Lazy("kvist.cli.sim_generate:generate", "Make a trace by a model of its users."),
    },
    "Simulations": {
        "run": Lazy("kvist.cli.sim_run:run_trace", "Replay a trace on a simulated cluster."),
        "curve": Lazy("kvist.cli.sim_curve:curve", "Draw hit ratio against capacity, for each policy."),
        "sweep": Lazy("kvist.cli.sim_sweep:sweep", "Replay a trace on a grid of clusters."),
        "fit": Lazy("kvist.cli.sim_fit:fit", "Fit the time model to a real server's log."),
    },
}
"""Every command, in the order of `kvist sim --help`."""


class SimGroup(LazyGroup):
    """Finds commands by `SECTIONS`."""

    sections = SECTIONS


@click.group(cls=SimGroup, short_help="Replay traces in virtual time, and make and describe them.")
def sim() -> None:
    """Replay traces of requests in virtual time, and make and describe them.

    A trace is a JSONL file in Mooncake's form, or ours (docs/reference/traces.md); it may end in .gz or .zst.
    """
