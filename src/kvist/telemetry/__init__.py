"""What happens, for whoever watches: operations with their times, bytes and failures; spans; structured logs.

Knows names and numbers. Must not know stores, engines, HTTP or Prometheus: who counts registers a `Recorder`, and while
nobody has, an operation costs two readings of a clock. Spans are OpenTelemetry's where its API is installed.
"""

from __future__ import annotations

from kvist.telemetry.recorder import (
    Operation,
    Recorder,
    add_recorder,
    counted,
    kind_of,
    operation,
    recorders,
    recording,
)
from kvist.telemetry.spans import Attributes, Span, server_span, span

__all__ = [
    "Attributes",
    "Operation",
    "Recorder",
    "Span",
    "add_recorder",
    "counted",
    "kind_of",
    "operation",
    "recorders",
    "recording",
    "server_span",
    "span",
]
