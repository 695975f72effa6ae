"""Prometheus metrics of a server: ``kvist_*``. Knows Prometheus and the recorders' contract; see ADR 18.

Nothing is made at import. `Metrics` counts what happens from its `recording` on; gauges are read when somebody scrapes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

from anyio import to_thread
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import kvist
from kvist.server.recent import Answered
from kvist.telemetry import Recorder, recording, server_span

_SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
)  # fmt: skip
_OTHER: Final = "(other)"
"""The route or method of a request that no route takes: what somebody typed is no label."""
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics(Recorder):
    """The metrics of one server.

    Attributes:
        registry: where they are; further collectors may be registered there.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """``registry``: of the process that this is a guest in (vLLM's); default one of its own, process and all."""
        self.registry = CollectorRegistry() if registry is None else registry
        if registry is None:
            for about_process in (ProcessCollector, PlatformCollector, GCCollector):
                about_process(registry=self.registry)
        self._make_operations()
        self._make_requests()
        info = Gauge(
            "kvist_build_info", "1; what runs is in the labels.", ("version", "python"), registry=self.registry,
            multiprocess_mode="livemax",
        )  # fmt: skip
        info.labels(kvist.__version__, platform.python_version()).set(1)

    def _make_operations(self) -> None:
        registry = self.registry
        self._operations = Histogram(
            "kvist_operation_seconds", "Seconds that operations took, by operation.", ("operation",),
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self._operation_bytes = Counter(
            "kvist_operation_bytes", "Bytes that operations moved or read.", ("operation",), registry=registry
        )
        self._operation_pages = Counter(
            "kvist_operation_pages", "Page halves that operations moved or read.", ("operation",), registry=registry
        )
        self._operation_failures = Counter(
            "kvist_operation_failures", "Operations that failed, by the kind of the error.", ("operation", "kind"),
            registry=registry,
        )  # fmt: skip
        self._calls = Histogram(
            "kvist_store_call_seconds", "Seconds that calls of the store took, by call.", ("call",),
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self._call_bytes = Counter(
            "kvist_store_bytes", "Bytes that calls of the store moved.", ("call",), registry=registry
        )
        self._call_errors = Counter(
            "kvist_store_errors", "Calls of the store that failed, by the kind of the error.", ("call", "kind"),
            registry=registry,
        )  # fmt: skip

    def _make_requests(self) -> None:
        registry = self.registry
        self._requests = Counter(
            "kvist_http_requests", "HTTP requests answered, by route and status.", ("method", "route", "status"),
            registry=registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "kvist_http_request_seconds", "Seconds to the last byte of the answer, by route.", ("method", "route"),
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        # of several API processes of a vLLM, those that live count together
        self._in_flight = Gauge(
            "kvist_http_requests_in_flight", "HTTP requests being answered.", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self._tokens = Counter(
            "kvist_tokens",
            "Tokens of the requests answered: of prompts, those of them found in the cache, and generated ones.",
            ("kind",),
            registry=registry,
        )

    def recording(self) -> AbstractContextManager[None]:
        """Count what happens in this process meanwhile."""
        return recording(self)

    # -- what is told ---------------------------------------------------------------------------------------------

    def operation(self, name: str, seconds: float, *, nbytes: int, pages: int, error: str | None) -> None:
        """See `Recorder.operation`."""
        self._operations.labels(name).observe(seconds)
        self._operation_bytes.labels(name).inc(nbytes)
        self._operation_pages.labels(name).inc(pages)
        if error is not None:
            self._operation_failures.labels(name, error).inc()

    def store_call(self, call: str, seconds: float, *, nbytes: int, error: str | None) -> None:
        """See `Recorder.store_call`."""
        self._calls.labels(call).observe(seconds)
        self._call_bytes.labels(call).inc(nbytes)
        if error is not None:
            self._call_errors.labels(call, error).inc()

    def answered(self, request: Answered) -> None:
        """A generation has ended; see `kvist.server.recent.Recent`."""
        self._tokens.labels("prompt").inc(request.prompt_tokens)
        self._tokens.labels("cached").inc(request.cached_tokens)
        self._tokens.labels("generated").inc(request.completion_tokens)

    def began(self) -> None:
        """An HTTP request has come."""
        self._in_flight.inc()

    def ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """It has its answer."""
        self._in_flight.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    # -- what is asked --------------------------------------------------------------------------------------------

    def gauges(self, read: Callable[[], Iterable[Sample]]) -> None:
        """Have ``read`` called at every scrape, in a thread; it must be quick, and list no store."""
        self.registry.register(_Reading(read))

    async def endpoint(self, request: Request) -> Response:
        """``GET /metrics``."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(await to_thread.run_sync(encode, self.registry), headers={"Content-Type": content_type})


class _Reading(Collector):
    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return families(self._read())

    def describe(self) -> Iterable[Metric]:
        return ()  # else the registry would read it once now


class Metered:
    """ASGI middleware: counts requests by the template of their route, and gives each a span."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute], *, prefix: str = "") -> None:
        """
        Args:
            app: what answers.
            metrics: told of it.
            routes: of ``app``, for the labels.
            prefix: where ``app`` is mounted, for the same.
        """
        self.app, self._metrics, self._routes, self._prefix = app, metrics, routes, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, started = 500, time.perf_counter()
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        route = self._route(scope)

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        about = {"http.request.method": method, "http.route": route}
        with server_span(f"{method} {route}", about, headers) as span:
            self._metrics.began()
            try:
                await self.app(scope, receive, sent)
            finally:
                span.set_attributes({"http.response.status_code": status})
                self._metrics.ended(method, route, status, time.perf_counter() - started)

    def _route(self, scope: Scope) -> str:
        """The template of the route that takes a request, whatever its method."""
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return f"{self._prefix}{route.path}"
        return _OTHER


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a gauge, or of a counter that somebody else keeps.

    Attributes:
        name: of the metric; a counter's ends with ``_total``.
        text: what it counts.
        value: as it is now.
        labels: of this number; the same names for every one of a metric.
    """

    name: str
    text: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def families(samples: Iterable[Sample]) -> Iterator[Metric]:
    """The metrics of some samples; those of one metric are put together."""
    found: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for sample in samples:
        family = found.get(sample.name)
        if family is None:
            kind = CounterMetricFamily if sample.name.endswith("_total") else GaugeMetricFamily
            family = found[sample.name] = kind(sample.name, sample.text, labels=tuple(sample.labels))
        family.add_metric(tuple(sample.labels.values()), sample.value)
    yield from found.values()
