"""`kvist sim run`: one trace through one cluster; a table, and files to look into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Cell, Line, Table
from kvist.cli.sim_options import (
    LIMIT,
    TRACE,
    TRACE_BLOCK_SIZE,
    output_option,
    require_apart,
    setup_of,
    with_settings,
    with_sla,
)
from kvist.sim.files import write_whole
from kvist.sim.perfetto import chrome_trace
from kvist.sim.replay import replay
from kvist.sim.report import Report, Sla
from kvist.sim.trace import read_trace

_COLUMNS: Final = ("mean", "median", "p90", "p95", "p99", "max")
_LATENCIES: Final = {
    "ttft_ms": "first token",
    "ttst_ms": "first to second token",
    "tpot_ms": "a token, by request",
    "itl_ms": "a token",
    "e2e_latency_ms": "last token",
}


@click.command("run")
@TRACE
@TRACE_BLOCK_SIZE
@LIMIT
@with_settings()
@with_sla
@output_option("--per-request", "Write a line of JSON for each request.")
@output_option("--chrome-trace", "Write a timeline that Perfetto opens.", name="timeline")
@output_option("--html", "Write a report page, in one file.")
@common
def run_trace(
    run: Invocation,
    trace: Path,
    trace_block_size: int | None,
    limit: int | None,
    settings: Mapping[str, Any],
    sla: Sla | None,
    per_request: Path | None,
    timeline: Path | None,
    html: Path | None,
) -> None:
    """Replay a trace on a simulated cluster.

    Nothing is simulated before the whole trace and every setting have been checked. Equal traces and settings give
    equal results, whatever the machine.
    """
    setup = setup_of(settings)
    require_apart(trace, per_request=per_request, chrome_trace=timeline, html=html)
    render = None if html is None else _renderer()
    requests = read_trace(trace, block_size=trace_block_size, limit=limit)
    started = time.perf_counter()
    with run.out.progress("requests") as draw:
        records = replay(
            requests,
            setup.engine,
            setup.cluster,
            timeline=timeline is not None,
            progress=None if draw is None else _counting(draw, len(requests)),
        )
    report = Report(requests.name, setup.engine, setup.cluster, records, time.perf_counter() - started, sla)
    summary = report.summary()
    written: dict[str, str] = {}
    if per_request is not None:
        report.write_requests(per_request)
        written["per_request"] = str(per_request)
    if timeline is not None:
        write_whole(timeline, chrome_trace(report))
        written["chrome_trace"] = str(timeline)
    if html is not None and render is not None:
        write_whole(html, [render(report).encode()])
        written["html"] = str(html)
    document = {"trace": requests.name, "settings": setup.settings, "summary": summary, "files": written}
    run.out.result(document, ids=written.values(), text=_text(report, summary, written))


def _renderer() -> Callable[[Report], str]:
    """What makes the page; it needs jinja2, which is missed here before the run and not after."""
    from kvist.sim.page import page

    return page


def _counting(draw: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done = 0

    def ended(count: int) -> None:
        nonlocal done
        done += count
        draw(done, total)

    return ended


def _text(report: Report, summary: Mapping[str, Any], written: Mapping[str, str]) -> Iterator[Line | Table]:
    workers = "1 worker" if report.cluster.workers == 1 else f"{report.cluster.workers} workers"
    yield f"{report.trace_name}: {summary['num_requests']:,} requests on {workers}, {report.cluster.router}"
    yield ""
    rows = [
        ("completed", f"{summary['completed_requests']:,}"),
        ("rejected", f"{summary['rejected_requests']:,}"),
        ("simulated", f"{summary['duration_ms'] / 1e3:,.1f} s"),
        ("replayed in", f"{summary['wall_time_ms'] / 1e3:,.2f} s"),
        ("prompt tokens from cache", f"{summary['prefix_cache_reused_ratio']:.2%}"),
        ("input", f"{summary['input_throughput_tok_s']:,.0f} tokens/s"),
        ("output", f"{summary['output_throughput_tok_s']:,.0f} tokens/s"),
        ("workers busy", f"{summary['mean_busy_ratio']:.1%}"),
        ("preemptions", f"{summary['preemptions']:,}"),
        ("evicted blocks", f"{summary['evicted_blocks']:,}"),
        ("GPU hours", f"{summary['gpu_hours']:,.2f}"),
    ]
    if report.sla is not None:
        share = summary["goodput_completed_requests"] / max(1, summary["num_requests"])
        rows.append(("within the SLA", f"{share:.2%}, {summary['goodput_request_throughput_rps']:,.2f} requests/s"))
    width = max(len(value) for _, value in rows)
    yield Table(("", ""), [(name, value.rjust(width)) for name, value in rows])
    yield ""
    latencies: list[tuple[Cell, ...]] = [
        (label, *(float(summary[f"{column}_{name}"]) for column in _COLUMNS)) for name, label in _LATENCIES.items()
    ]
    yield Table(("time to, ms", *_COLUMNS), latencies)
    for path in written.values():
        yield f"wrote {path}"
