"""Logs: lines of text or of JSON."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from kvist.telemetry.logs import JsonFormatter


def record(**extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("kvist.server", logging.WARNING, "x.py", 1, "%s of %s", ("one", "many"), None)
    made.__dict__.update(extra)
    return made


def formatted(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(made)
    assert "\n" not in line
    document: dict[str, Any] = json.loads(line)
    return document


def test_one_object_a_line() -> None:
    document = formatted(record())
    assert datetime.fromisoformat(document.pop("time")).tzinfo is UTC
    assert document == {"level": "warning", "logger": "kvist.server", "message": "one of many"}


def test_what_a_logger_was_given() -> None:
    document = formatted(record(tenant="a", path={"x": 1}, thing=object))
    assert document["fields"] == {"tenant": "a", "path": {"x": 1}, "thing": str(object)}


def test_an_exception_with_its_traceback() -> None:
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        document = formatted(record(exc_info=sys.exc_info()))
    assert document["exception"].startswith("Traceback")
    assert "line two" in document["exception"]


def test_a_span_is_named() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk", exc_type=ImportError)
    with sdk.TracerProvider().get_tracer("test").start_as_current_span("work") as span:
        document = formatted(record())
    context = span.get_span_context()
    assert document["trace_id"] == f"{context.trace_id:032x}"
    assert document["span_id"] == f"{context.span_id:016x}"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_server_logs_in_one_form(form: str) -> None:
    """Uvicorn's lines too: it is given no configuration of its own."""
    code = f"""
import logging
from kvist.telemetry.logs import start_logging
start_logging("info", {form!r})
logging.getLogger("uvicorn.error").info("Started server process [%d]", 7, extra={{"color_message": "x"}})
logging.getLogger("kvist").debug("not this")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    if form == "json":
        document = json.loads(line)
        assert (document["message"], document["level"]) == ("Started server process [7]", "info")
        assert "fields" not in document
    else:
        assert line.endswith("INFO uvicorn.error: Started server process [7]")
