"""Spans through the real SDK, and without its API."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk", exc_type=ImportError)

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvist.errors import NotFound
from kvist.repo import Repository
from kvist.telemetry import operation, server_span
from kvist.telemetry.spans import current_ids

_EXPORTER = InMemorySpanExporter()


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    """One provider a process is all that OpenTelemetry allows."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(_EXPORTER))
        trace.set_tracer_provider(provider)
    _EXPORTER.clear()
    yield _EXPORTER
    _EXPORTER.clear()


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = [span for span in exporter.get_finished_spans() if span.name == name]
    return found


def test_operations_nest_and_say_what_they_moved(exported: InMemorySpanExporter) -> None:
    with operation("snapshot", branch="main") as done:
        with operation("put_pages") as inner:
            inner.add(nbytes=64, pages=2)
        done.add(nbytes=64, pages=2)
        assert current_ids() is not None
    outer, inside = named(exported, "kvist.snapshot"), named(exported, "kvist.put_pages")
    assert outer.attributes == {"kvist.branch": "main", "kvist.bytes": 64, "kvist.pages": 2}
    assert inside.parent is not None and inside.parent.span_id == outer.context.span_id
    assert current_ids() is None


def test_an_error_is_on_the_span(exported: InMemorySpanExporter) -> None:
    with pytest.raises(NotFound), operation("checkout"):
        raise NotFound("no such snapshot")
    span = named(exported, "kvist.checkout")
    assert not span.status.is_ok
    assert span.events[0].attributes is not None
    assert span.events[0].attributes["exception.type"] == "kvist.errors.NotFound"


def test_a_request_continues_the_trace_of_its_headers(exported: InMemorySpanExporter) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with server_span("GET /", {"http.route": "/"}, {"traceparent": parent}), operation("fsck"):
        assert current_ids() is not None
    request, inner = named(exported, "GET /"), named(exported, "kvist.fsck")
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert request.kind is trace.SpanKind.SERVER
    assert inner.context.trace_id == request.context.trace_id


def test_a_repository_tells_of_its_pages(exported: InMemorySpanExporter, tmp_path: Path) -> None:
    with Repository.open(str(tmp_path / "store"), create=True) as repo:
        put = repo.put_pages([b"a" * 100, b"b" * 100])
        repo.get_pages(put.digests, [memoryview(bytearray(100)) for _ in range(2)])
    for name in ("kvist.put_pages", "kvist.get_pages"):
        attributes = named(exported, name).attributes
        assert attributes is not None
        assert (attributes["kvist.bytes"], attributes["kvist.pages"]) == (200, 2)


def test_without_the_api_nothing_is_missing() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
from kvist.telemetry import operation, server_span
from kvist.telemetry.spans import current_ids
with server_span("GET /", {}, {}) as span, operation("gc", branch="main"):
    span.set_attributes({"http.response.status_code": 200})
    print(current_ids())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
