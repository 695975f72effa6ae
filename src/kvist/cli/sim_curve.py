"""`kvist sim curve`: what each policy would find in caches of many sizes; a table, and pictures of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from kvist.blocks.policy import POLICIES
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Cell, Line, Table
from kvist.cli.sim_options import LIMIT, TRACE, TRACE_BLOCK_SIZE, output_option, require_apart
from kvist.sim import curve_page
from kvist.sim.curve import BELADY, Curves, curves
from kvist.sim.files import write_whole
from kvist.sim.trace import MAX_TOKENS, read_trace


@click.command("curve")
@TRACE
@TRACE_BLOCK_SIZE
@LIMIT
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice([*POLICIES, BELADY]),
    help="Give it once for each.  [default: all but belady]",
)
@click.option(
    "--capacity",
    "capacities",
    multiple=True,
    type=click.IntRange(1, MAX_TOKENS),
    metavar="BLOCKS",
    help="Give it once for each.  [default: see --points]",
)
@click.option(
    "--points",
    default=12,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Without --capacity: so many, evenly by factor, up to the cache that never evicts.",
)
@click.option("--block-size", type=click.IntRange(1, MAX_TOKENS), help="Tokens of a block.  [default: of the trace's]")
@click.option(
    "--jobs", type=click.IntRange(1, 1024), help="Processes of this machine to replay in.  [default: one for each CPU]"
)
@output_option("--png", "Write a picture; needs matplotlib.")
@output_option("--html", "Write a page, in one file.")
@common
def curve(
    run: Invocation,
    trace: Path,
    trace_block_size: int | None,
    limit: int | None,
    policies: tuple[str, ...],
    capacities: tuple[int, ...],
    points: int,
    block_size: int | None,
    jobs: int | None,
    png: Path | None,
    html: Path | None,
) -> None:
    """Draw hit ratio against capacity, for each policy.

    Cache only, without time: each request is served before the next comes. The ceiling is Belady's bound, which no
    policy can be above.
    """
    require_apart(trace, png=png, html=html)
    requests = read_trace(trace, block_size=trace_block_size, limit=limit)
    with run.out.progress("replays") as progress:
        found = curves(
            requests,
            policies=tuple(dict.fromkeys(policies)) or tuple(POLICIES),
            capacities=capacities or None,
            points=points,
            block_size=block_size,
            jobs=jobs or _cpus(),
            progress=progress,
        )
    if png is not None:
        write_whole(png, [curve_page.png(found)])
    if html is not None:
        write_whole(html, [curve_page.page(found).encode()])
    files = {"png": png, "html": html}
    document = found.to_json() | {"files": {name: str(path) for name, path in files.items() if path is not None}}
    run.out.result(document, ids=map(str, found.capacities), text=_text(found, png, html))


def _cpus() -> int:
    """Those that this process may use; where the system does not say, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(found: Curves, *files: Path | None) -> Iterator[Line | Table]:
    yield (
        f"{found.name}: {found.requests:,} requests, {found.blocks:,} blocks of {found.block_size} tokens, "
        f"{found.unique_blocks:,} of them different"
    )
    yield "hits in % of the prompt tokens"
    yield ""
    ratios = [found.ratios(policy) for policy in found.hits]
    rows: list[tuple[Cell, ...]] = [
        (capacity, *(100 * ratio[point] for ratio in ratios)) for point, capacity in enumerate(found.capacities)
    ]
    yield Table(("blocks", *found.hits), rows)
    for path in files:
        if path is not None:
            yield f"wrote {path}"
