"""Spans: OpenTelemetry's where its API is installed, else ones that do nothing. Chosen once, at the first span.

The API alone records nothing either: where spans go is for whoever starts the process to say, with the SDK or
``opentelemetry-instrument`` (docs/guides/observability.md).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

Attributes = Mapping[str, str | bool | int | float]


class Span(Protocol):
    """What the code of an operation may do with its span."""

    def set_attributes(self, attributes: Attributes) -> None:
        """Say more of it."""


class _Tracing(Protocol):
    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[Span]: ...

    def server_span(
        self, name: str, attributes: Attributes, headers: Mapping[str, str]
    ) -> AbstractContextManager[Span]: ...

    def ids(self) -> tuple[str, str] | None: ...


class _NoSpan:
    def set_attributes(self, attributes: Attributes) -> None:
        pass


_NONE: Final[AbstractContextManager[Span]] = nullcontext(_NoSpan())


class _NoTracing:
    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[Span]:
        return _NONE

    def server_span(
        self, name: str, attributes: Attributes, headers: Mapping[str, str]
    ) -> AbstractContextManager[Span]:
        return _NONE

    def ids(self) -> tuple[str, str] | None:
        return None


class _OpenTelemetry:
    def __init__(self, trace: Any, propagate: Any) -> None:
        self._trace, self._propagate = trace, propagate

    @property
    def _tracer(self) -> Any:
        return self._trace.get_tracer("kvist")  # asked each time: who starts the process may set the provider late

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[Span]:
        current: AbstractContextManager[Span] = self._tracer.start_as_current_span(name, attributes=dict(attributes))
        return current

    def server_span(
        self, name: str, attributes: Attributes, headers: Mapping[str, str]
    ) -> AbstractContextManager[Span]:
        current: AbstractContextManager[Span] = self._tracer.start_as_current_span(
            name,
            context=self._propagate.extract(dict(headers)),
            kind=self._trace.SpanKind.SERVER,
            attributes=dict(attributes),
        )
        return current

    def ids(self) -> tuple[str, str] | None:
        context = self._trace.get_current_span().get_span_context()
        return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None


@functools.cache
def _tracing() -> _Tracing:
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        return _NoTracing()
    return _OpenTelemetry(trace, propagate)


def span(name: str, attributes: Attributes | None = None) -> AbstractContextManager[Span]:
    """A span below the current one. An exception that leaves it is recorded on it."""
    return _tracing().span(name, attributes or {})


def server_span(name: str, attributes: Attributes, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
    """The span of a request that came in; it continues the trace that its ``headers`` name (W3C's ``traceparent``)."""
    return _tracing().server_span(name, attributes, headers)


def current_ids() -> tuple[str, str] | None:
    """Trace id and span id, in hex, of the span that this code runs in; ``None``: in none that is recorded."""
    return _tracing().ids()
