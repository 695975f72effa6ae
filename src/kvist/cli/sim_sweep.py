"""`kvist sim sweep`: one trace on a grid of clusters, in processes of this machine or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Cell, Table
from kvist.cli.sim_options import (
    LIMIT,
    TRACE,
    TRACE_BLOCK_SIZE,
    output_option,
    require_apart,
    setups_of,
    with_settings,
    with_sla,
)
from kvist.sim.files import write_whole
from kvist.sim.report import Sla
from kvist.sim.sweep import Row, Runner, local, on_ray, to_csv
from kvist.sim.trace import Trace, read_trace

AXES: Final = ("workers", "router", "policy", "num_blocks", "host_blocks", "disk_blocks")

JOBS: Final = click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(1, 1024), help="Processes of this machine to replay in."
)
RAY: Final = click.option(
    "--ray", metavar="ADDRESS", help="Replay on this Ray cluster; its nodes need kvist. local: start one here."
)


@click.command()
@TRACE
@TRACE_BLOCK_SIZE
@LIMIT
@with_settings(*AXES)
@with_sla
@JOBS
@RAY
@output_option("--csv", "Write the rows with all their figures.")
@common
def sweep(
    run: Invocation,
    trace: Path,
    trace_block_size: int | None,
    limit: int | None,
    settings: Mapping[str, Any],
    sla: Sla | None,
    jobs: int,
    ray: str | None,
    csv: Path | None,
) -> None:
    """Replay a trace on a grid of clusters.

    Workers, router, policy, and the blocks of pool, host memory and disk take several values with commas between; every
    combination is replayed. The rows are the same wherever they are made.
    """
    setups = setups_of(settings, AXES)
    require_apart(trace, csv=csv)
    requests = read_trace(trace, block_size=trace_block_size, limit=limit)
    with run.out.progress("replays") as progress, runner(requests, sla, jobs, ray, progress) as replay_all:
        rows = replay_all(setups)
    if csv is not None:
        write_whole(csv, [to_csv(rows).encode()])
    document = {"trace": requests.name, "rows": [row.to_json() for row in rows]}
    ids = (" ".join(f"{name}={value}" for name, value in row.setup.axes.items()) for row in rows)
    run.out.result(document, ids=ids, text=[rows_table(rows)])


def runner(
    trace: Trace, sla: Sla | None, jobs: int, ray: str | None, progress: Callable[[int, int], None] | None
) -> AbstractContextManager[Runner]:
    """Where the replays run, as the options say."""
    if ray is not None:
        return on_ray(trace, ray, sla=sla, progress=progress)
    return local(trace, sla=sla, jobs=jobs, progress=progress)


_FIGURES: Final = {
    "from cache": "prefix_cache_reused_ratio",
    "p50 ttft ms": "median_ttft_ms",
    "p95 ttft ms": "p95_ttft_ms",
    "p95 tpot ms": "p95_tpot_ms",
    "p95 e2e ms": "p95_e2e_latency_ms",
    "tokens/s": "output_throughput_tok_s",
}


def rows_table(rows: Sequence[Row]) -> Table:
    """Axes that differ, and the figures that people choose by."""
    axes = [name for name in AXES if len({row.setup.axes[name] for row in rows}) > 1] or ["workers"]
    titles = (*(name.replace("_", " ") for name in axes), *_FIGURES, "rejected")
    has_sla = any("goodput_completed_requests" in row.figures for row in rows)
    lines: list[tuple[Cell, ...]] = []
    for row in rows:
        figures: list[Cell] = [float(row.figures[name]) for name in _FIGURES.values()]
        figures[0] = f"{row.figures['prefix_cache_reused_ratio']:.2%}"
        cells: list[Cell] = [*(row.setup.axes[name] for name in axes), *figures, row.figures["rejected_requests"]]
        if has_sla:
            cells.append(f"{row.figures['goodput_completed_requests'] / max(1, row.figures['num_requests']):.2%}")
        lines.append(tuple(cells))
    return Table((*titles, "within SLA") if has_sla else titles, lines)
