"""A replay as a Chrome trace, which https://ui.perfetto.dev opens: passes of each worker, its load, and each request.

The form is the JSON object of the "Trace Event Format" (Google, 2016): times are microseconds of virtual time, a
process is a worker. Only what has a beginning is written: a replay without segments has requests alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from kvist.sim.records import REJECTED, Records, Segment
from kvist.sim.report import Report

_PASSES: Final = 1
"""The only thread of a worker, which is process ``i + 1``; what no worker served is in a process after the last."""

Event = dict[str, Any]


def chrome_trace(report: Report) -> Iterator[bytes]:
    """The file, in parts; passes are there if the replay kept its timeline."""
    encode = msgspec.json.Encoder().encode
    about = {"trace": report.trace_name, "router": report.cluster.router, "seed": report.cluster.seed}
    yield b'{"displayTimeUnit":"ms","otherData":' + encode(about) + b',"traceEvents":['
    separator = b"\n"
    for event in _events(report):
        yield separator + encode(event)
        separator = b",\n"
    yield b"\n]}\n"


def _events(report: Report) -> Iterator[Event]:
    yield from _names(report)
    for segment in report.records.segments:
        yield _slice(segment)
        at: Event = {"ph": "C", "pid": segment.worker + 1, "ts": _us(segment.start_ms)}
        # Perfetto shows both words: "waiting requests", "used blocks"
        yield at | {"name": "waiting", "args": {"requests": segment.waiting}}
        yield at | {"name": "used", "args": {"blocks": segment.used_blocks}}
    yield from _requests(report.records)


def _names(report: Report) -> Iterator[Event]:
    names = report.worker_names
    for pid, name in enumerate([*names, "not served"], start=1):
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
        if pid <= len(names):
            yield {"ph": "M", "pid": pid, "tid": _PASSES, "name": "thread_name", "args": {"name": "passes"}}


def _slice(segment: Segment) -> Event:
    name = "decode" if not segment.prefill_tokens else "prefill + decode" if segment.decodes else "prefill"
    return {
        "ph": "X",
        "pid": segment.worker + 1,
        "tid": _PASSES,
        "cat": "passes",
        "name": name,
        "ts": _us(segment.start_ms),
        "dur": _us(segment.end_ms - segment.start_ms),
        "args": {"passes": segment.passes, "prefill_tokens": segment.prefill_tokens, "decodes": segment.decodes},
    }


def _requests(records: Records) -> Iterator[Event]:
    columns = (
        records.arrival_ms.tolist(),
        records.first_admit_ms.tolist(),
        records.first_token_ms.tolist(),
        records.last_token_ms.tolist(),
        records.worker.tolist(),
        records.status.tolist(),
        records.input_length.tolist(),
        records.output_length.tolist(),
        records.reused_input_tokens.tolist(),
        records.readmission_count.tolist(),
    )
    for i, (came, admitted, first, last, worker, status, inputs, outputs, reused, again) in enumerate(
        zip(*columns, strict=True)
    ):
        args = {"request": i, "input": inputs, "output": outputs, "reused": reused, "readmissions": again}
        if status == REJECTED:
            yield {
                "ph": "i",
                "s": "p",
                "pid": len(records.busy_ms) + 1,
                "tid": _PASSES,
                "cat": "requests",
                "name": "rejected",
                "ts": _us(came),
                "args": args,
            }
            continue
        of_request = {"pid": worker + 1, "tid": _PASSES, "cat": "requests", "id2": {"local": str(i)}}
        stages = (("queued", came, admitted), ("prefill", admitted, first), ("decode", first, last))
        ends = [end for _, _, end in stages if not math.isnan(end)]
        if not ends:
            continue
        # one name for all, so that Perfetto lays them out side by side
        yield of_request | {"ph": "b", "name": "request", "ts": _us(came), "args": args}
        for name, start, end in stages:
            if not math.isnan(end):
                yield of_request | {"ph": "b", "name": name, "ts": _us(start)}
                yield of_request | {"ph": "e", "name": name, "ts": _us(end)}
        yield of_request | {"ph": "e", "name": "request", "ts": _us(ends[-1])}


def _us(ms: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(ms * 1e3, 3)
