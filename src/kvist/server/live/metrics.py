"""The metrics of an engine's API process: ``kvist_*`` in the registry that its own ``/metrics`` shows.

Made once a process, at the first application; with several API processes, engines add their values up by way of files.
"""

from __future__ import annotations

import functools

from prometheus_client import REGISTRY
from starlette.applications import Starlette

from kvist.server.metrics import Metered, Metrics
from kvist.telemetry import add_recorder


@functools.cache
def metrics_of_process() -> Metrics:
    """The metrics, counting from the first call on."""
    metrics = Metrics(REGISTRY)
    add_recorder(metrics)
    return metrics


def metered(app: Starlette, *, prefix: str = "") -> Metered:
    """``app``, with its requests counted; ``prefix``: where it will be mounted."""
    return Metered(app, metrics_of_process(), app.routes, prefix=prefix)
