"""`kvist sim describe`: what a trace holds; and how the result of a command that has a trace is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Table
from kvist.sim.describe import Description, Spread
from kvist.sim.describe import describe as describe_trace
from kvist.sim.trace import MAX_TOKENS, read_trace


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--block-size",
    default=64,
    show_default=True,
    type=click.IntRange(1, MAX_TOKENS),
    help="Tokens of an engine's block.",
)
@click.option(
    "--trace-block-size",
    default=None,
    type=click.IntRange(1, MAX_TOKENS),
    help="Tokens of a trace's block.  [default: as the file says, else 512]",
)
@click.option("--limit", default=None, type=click.IntRange(1), help="Requests to read.  [default: all]")
@common
def describe(run: Invocation, trace: Path, block_size: int, trace_block_size: int | None, limit: int | None) -> None:
    """Count what a trace holds: times, lengths, and how much a cache without limit would save."""
    found = describe_trace(read_trace(trace, block_size=trace_block_size, limit=limit), block_size)
    run.out.result(found.to_json(), ids=[found.name], text=told(found))


def told(found: Description) -> Iterator[Line | Table]:
    """A description for people."""
    rows = [
        ("trace", found.name),
        ("requests", f"{found.requests:,}"),
        ("  after another one", f"{found.turns:,}"),
        ("  of these forks", f"{found.forks:,}"),
        ("span", f"{found.span_ms / 1000:,.3f} s"),
        ("arrivals", f"{found.requests_per_s:,.3f} a second"),
        (f"blocks of {found.trace_block_size}", f"{found.blocks:,}"),
        ("  unique", f"{found.unique_blocks:,}"),
        ("  seen before", f"{found.block_hit_ratio:.2%}"),
        (f"full blocks of {found.block_size}", f"{found.engine_blocks:,}"),
        ("  unique", f"{found.unique_engine_blocks:,}"),
        ("prompt tokens that an endless cache saves", f"{found.reused_ratio:.2%}"),
    ]
    yield Table(("", ""), rows)
    yield ""
    yield Table(
        ("tokens", "total", "mean", "min", "p50", "p90", "p99", "max"),
        [("input", *_cells(found.input_tokens)), ("output", *_cells(found.output_tokens))],
    )


def _cells(spread: Spread) -> tuple[int | float, ...]:
    return spread.total, spread.mean, spread.min, spread.p50, spread.p90, spread.p99, spread.max
