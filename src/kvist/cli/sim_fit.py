"""`kvist sim fit`: a real server's log becomes a time model for `kvist sim run --timing`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Table
from kvist.cli.sim_options import output_option, require_apart
from kvist.sim import fit as fitting
from kvist.sim.observations import read_log


@click.command()
@click.argument("log", type=click.Path(path_type=Path, dir_okay=False))
@output_option("--output", "Write the model: JSON, or a table in Dynamo's form if the name ends in .npz.", short="-o")
@common
def fit(run: Invocation, log: Path, output: Path | None) -> None:
    """Fit the time model to a real server's log.

    LOG is what a vLLM prints that was started with --enable-logging-iteration-details, or a JSONL of requests as
    `kvist sim run --per-request` writes it: arrival_time_ms, first_token_ms, last_token_ms, input_length, output_length
    and reused_input_tokens, of any server.
    """
    require_apart(log, output=output)
    found = fitting.fit(read_log(log))
    if output is not None:
        found.write(output)
    document = found.document() | {"log": str(log), "file": None if output is None else str(output)}
    run.out.result(document, ids=[] if output is None else [str(output)], text=_text(found, log, output))


def _text(found: fitting.Fit, log: Path, output: Path | None) -> Iterator[Line | Table]:
    source = {"vllm-iterations": "passes", "requests": "times of requests"}[found.kind]
    yield f"{log}: {found.rows:,} {source}, {found.dropped:,} left out as too far off; R² {found.r2:.4f}"
    yield ""
    names = ("t² + ", "t + ", ""), ("n + ", "L + ", "")
    for what, values, units in zip(("prefill", "decode"), (found.prefill, found.decode), names, strict=True):
        terms = "".join(f"{value:.6g} {unit}" for value, unit in zip(values, units, strict=True))
        yield f"{what:8}{terms.strip()} ms"
    yield f"{'both':8}the sum, {found.mixed_ms:.6g} ms"
    yield "        t: new prompt tokens of a pass; n: sequences that get a token; L: sum of their lengths"
    ranges = (f"{name.replace('_', ' ')} {least:,.0f} to {most:,.0f}" for name, (least, most) in found.seen.items())
    yield f"seen    {', '.join(ranges)}"
    yield ""
    rows: list[tuple[str | float, ...]] = [
        (part.name, part.rows, round(part.mean_ms, 3), round(part.median_off_ms, 3), round(part.p95_off_ms, 3))
        for part in found.parts
    ]
    yield Table(("passes with", "observed", "mean ms", "median off ms", "p95 off ms"), rows)
    if output is not None:
        yield f"wrote {output}"
