"""The Chrome trace: its form, and that spans nest and close."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.perfetto import chrome_trace
from kvist.sim.records import Segment
from kvist.sim.report import Report

from .making import NAN, records

REQUIRED = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid"},
    "C": {"name", "ts", "pid", "args"},
    "M": {"name", "pid", "args"},
    "b": {"name", "cat", "id2", "ts", "pid"},
    "e": {"name", "cat", "id2", "ts", "pid"},
    "i": {"name", "ts", "pid", "s"},
}


def exported(cluster: ClusterConfig | None = None, **columns: Any) -> dict[str, Any]:
    made = Report("by hand", EngineConfig(), cluster or ClusterConfig(), records(**columns), 0.5)
    return json.loads(b"".join(chrome_trace(made)))


def test_every_event_has_what_its_phase_needs() -> None:
    document = exported()
    assert document["otherData"]["trace"] == "by hand"
    events = document["traceEvents"]
    assert {event["ph"] for event in events} == REQUIRED.keys()
    for event in events:
        assert REQUIRED[event["ph"]] <= event.keys(), event
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0


def test_passes_are_slices_with_counters_beside_them() -> None:
    events = exported()["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [(one["name"], one["ts"], one["dur"]) for one in slices] == [
        ("prefill", 0.0, 10_000.0),
        ("prefill + decode", 12_000.0, 18_000.0),
    ]
    counters = [(one["name"], *one["args"].values()) for one in events if one["ph"] == "C"]
    assert counters == [("waiting", 0), ("used", 2), ("waiting", 1), ("used", 5)]
    names = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    assert names == {1: "worker 0", 2: "not served"}


def test_slices_without_prompt_tokens_decode() -> None:
    only = Segment(worker=1, start_ms=0, end_ms=5, prefill_tokens=0, decodes=3, passes=9, waiting=0, used_blocks=4)
    document = exported(ClusterConfig(workers=2), segments=(only,), busy_ms=[1.0, 1.0])
    (one,) = (event for event in document["traceEvents"] if event["ph"] == "X")
    assert (one["name"], one["pid"], one["args"]["passes"]) == ("decode", 2, 9)


def test_spans_of_a_request_nest_and_close() -> None:
    events = exported()["traceEvents"]
    open_spans: dict[str, list[str]] = defaultdict(list)
    last: dict[str, float] = defaultdict(float)
    told = []
    for event in (one for one in events if one["ph"] in "be"):
        name, at, request = event["name"], event["ts"], event["id2"]["local"]
        assert at >= last[request]
        last[request] = at
        if event["ph"] == "b":
            open_spans[request].append(name)
            told.append((request, name))
        else:
            assert open_spans[request].pop() == name
    assert not any(open_spans.values())
    assert told[:4] == [("0", "request"), ("0", "queued"), ("0", "prefill"), ("0", "decode")]
    (rejected,) = (one for one in events if one["ph"] == "i")
    assert (rejected["pid"], rejected["args"]["request"]) == (2, 2)


def test_a_request_that_got_no_token_ends_with_its_wait() -> None:
    events = exported(first_token_ms=[10.0, NAN, NAN], last_token_ms=[30.0, NAN, NAN])["traceEvents"]
    spans = [one["name"] for one in events if one["ph"] == "b" and one["id2"]["local"] == "1"]
    assert spans == ["request", "queued"]
