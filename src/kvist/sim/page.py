"""A report as one HTML page that holds all it shows: no script, nothing from elsewhere, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any, Final

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from kvist.sim.charts import Series, line_chart
from kvist.sim.records import COMPLETED, Records
from kvist.sim.report import Latencies, Report
from kvist.sim.sweep import Setup

_COLUMNS: Final = ("mean", "median", "p75", "p90", "p95", "p99", "max")
_LATENCIES: Final = {
    "ttft_ms": ("first token", "from a request's arrival to its first token"),
    "ttst_ms": ("second token", "from its first token to its second"),
    "tpot_ms": ("each token, by request", "mean time between the tokens of a request; one sample a request"),
    "itl_ms": ("each token", "time between two tokens of a request; one sample for each pair"),
    "e2e_latency_ms": ("last token", "from a request's arrival to its last token"),
}
_POINTS: Final = 200

Floats = NDArray[np.float64]


def page(report: Report) -> str:
    """The page of one replay."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    summary = report.summary()
    return template.render(
        name=report.trace_name,
        about=_about(report),
        cards=list(_cards(report, summary)),
        columns=_COLUMNS,
        latencies=[
            {"name": label, "means": means, "values": [f"{summary[f'{one}_{name}']:,.1f}" for one in _COLUMNS]}
            for name, (label, means) in _LATENCIES.items()
        ],
        charts=list(_charts(report)),
        workers=list(_workers(report)),
        settings=list(_settings(Setup(engine=report.engine, cluster=report.cluster).settings)),
    )


def _about(report: Report) -> str:
    cluster, engine = report.cluster, report.engine
    prefill = f", {cluster.prefill_workers} for prefill" if cluster.prefill_workers else ""
    return (
        f"{len(report.records):,} requests replayed in virtual time on {cluster.workers} x {engine.num_blocks:,} "
        f"blocks of {engine.block_size} tokens{prefill}; routed {cluster.router}, evicted by {engine.policy}; "
        f"seed {cluster.seed}."
    )


def _cards(report: Report, summary: dict[str, Any]) -> Iterator[dict[str, str]]:
    seconds = summary["duration_ms"] / 1e3
    cards = [
        ("requests completed", f"{summary['completed_requests']:,}", "requests that got all their tokens"),
        ("rejected", f"{summary['rejected_requests']:,}", "requests that could never run"),
        ("prompt from cache", f"{summary['prefix_cache_reused_ratio']:.2%}", "prompt tokens that were not computed"),
        ("virtual time", f"{seconds:,.1f} s", "from the first arrival to the end of the last pass"),
        ("output", f"{summary['output_throughput_tok_s']:,.0f} tok/s", "generated tokens a second of virtual time"),
        ("workers busy", f"{summary['mean_busy_ratio']:.1%}", "time in passes, mean of all workers"),
        ("preemptions", f"{summary['preemptions']:,}", "times that a request gave way and was computed anew"),
        ("GPU time", f"{summary['gpu_hours']:,.2f} h", "one GPU a worker, for the virtual time"),
    ]
    if report.sla is not None:
        limits = ", ".join(f"{name} at most {limit:g}" for name, limit in report.sla.limits.items())
        share = summary["goodput_completed_requests"] / max(1, summary["num_requests"])
        cards.append(("within the SLA", f"{share:.2%}", f"requests with {limits}"))
    for name, value, means in cards:
        yield {"name": name, "value": value, "means": means}


def _charts(report: Report) -> Iterator[dict[str, Any]]:
    records, latencies = report.records, Latencies.of(report.records)
    ends = np.cumsum(records.token_gap_counts)
    yield {
        "title": "How long requests take",
        "means": "Part of the requests that have their first, or their last, token within a time.",
        "drawing": line_chart(
            "part of the requests over latency",
            [_distribution("first token", latencies.ttft_ms), _distribution("last token", latencies.e2e_ms)],
            x="ms",
            y="part",
            log_x=True,
        ),
    }
    yield {
        "title": "Time between tokens",
        "means": "Part of all tokens but the first that come within a time of the one before.",
        "drawing": line_chart(
            "part of the tokens over time between tokens",
            [_thinned("each token", records.token_gaps_ms, ends / ends[-1] if len(ends) else np.empty(0))],
            x="ms",
            y="part",
            log_x=True,
        ),
    }
    left = np.where(np.isnan(records.last_token_ms), records.arrival_ms, records.last_token_ms)
    admitted = np.where(np.isnan(records.first_admit_ms), records.arrival_ms, records.first_admit_ms)
    yield {
        "title": "Requests under way",
        "means": "At each moment: those that have come and not ended, and those of them that never ran yet.",
        "drawing": line_chart(
            "requests over time",
            [_present("under way", records.arrival_ms, left), _present("waiting", records.arrival_ms, admitted)],
            x="s",
            y="requests",
        ),
    }
    yield {
        "title": "Prompt tokens from cache",
        "means": "By the time of arrival, in 60 equal intervals.",
        "drawing": line_chart("part of prompt tokens from cache over time", [_reuse(records)], x="s", y="part"),
    }


def _distribution(label: str, values: Floats) -> Series:
    ordered = np.sort(values[np.isfinite(values)])
    return _thinned(label, ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)))


def _thinned(label: str, xs: Floats, parts: Floats) -> Series:
    """As many points of an ascending line as can be seen, evenly by height."""
    if not len(xs):
        return Series(label, xs, parts)
    kept = np.unique(np.append(np.searchsorted(parts, np.linspace(0, 1, _POINTS)[:-1]), len(xs) - 1))
    return Series(label, xs[kept], parts[kept])


def _present(label: str, came: Floats, left: Floats) -> Series:
    """How many are there, at the end of each of some equal intervals."""
    at = np.linspace(0.0, float(np.nanmax(left)), _POINTS) if len(came) else np.empty(0)
    counts = np.searchsorted(np.sort(came), at, "right") - np.searchsorted(np.sort(left), at, "right")
    return Series(label, at / 1e3, counts.astype(np.float64), is_stepped=True)


def _reuse(records: Records) -> Series:
    done = records.status == COMPLETED
    if not done.any():
        return Series("from cache", np.empty(0), np.empty(0))
    at, edges = records.arrival_ms[done], np.linspace(0.0, max(1.0, float(records.arrival_ms[done].max())), 61)
    reused, _ = np.histogram(at, edges, weights=records.reused_input_tokens[done])
    tokens, _ = np.histogram(at, edges, weights=records.input_length[done])
    seen = tokens > 0
    return Series("from cache", edges[:-1][seen] / 1e3, reused[seen] / tokens[seen], is_stepped=True)


def _workers(report: Report) -> Iterator[dict[str, Any]]:
    records = report.records
    done, serving = records.status == COMPLETED, report.cluster.workers * report.cluster.dp_size
    for number, (name, busy_ms) in enumerate(zip(report.worker_names, records.busy_ms.tolist(), strict=True)):
        served = records.worker == number if number < serving else records.prefill_worker == number - serving
        tokens = int(records.input_length[served & done].sum())
        part = busy_ms / records.duration_ms if records.duration_ms else 0.0
        yield {
            "name": name,
            "requests": f"{int((served & done).sum()):,}",
            "tokens": f"{tokens:,}",
            "reused": f"{int(records.reused_input_tokens[served & done].sum()) / max(1, tokens):.1%}",
            "busy": f"{part:.1%}",
            "part": f"{part:.4f}",
        }


def _settings(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value if isinstance(value, str) else json.dumps(value)
