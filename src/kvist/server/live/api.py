"""The snapshot routes of an engine's API server. Knows HTTP; what is asked is done by `Snapshots` and `History`."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from kvist.server.live.gate import grant_of, require_own
from kvist.server.live.snapshots import Snapshots
from kvist.server.routing import application
from kvist.server.schema import BODY_MAX, CheckoutBody, SnapshotBody, read_body
from kvist.server.wire import json_response


def routes(snapshots: Snapshots, *, prefix: str = "", body_max: int = BODY_MAX) -> Starlette:
    """The routes, below ``prefix``."""

    async def snapshot(request: Request) -> Response:
        body = await read_body(request, SnapshotBody, body_max)
        require_own(body.request_id or body.sequence, grant_of(request))
        return json_response(await snapshots.snapshot(body))

    async def checkout(request: Request) -> Response:
        return json_response(await snapshots.checkout(await read_body(request, CheckoutBody, body_max)))

    async def fork(request: Request) -> Response:
        return await (await snapshots.history(body_max, grant_of(request).tenant)).fork(request)

    async def log(request: Request) -> Response:
        return await (await snapshots.history(tenant=grant_of(request).tenant)).log(request)

    async def show(request: Request) -> Response:
        return await (await snapshots.history(tenant=grant_of(request).tenant)).show(request)

    async def lineage(request: Request) -> Response:
        return await (await snapshots.history(tenant=grant_of(request).tenant)).lineage(request)

    async def layout(request: Request) -> Response:
        return json_response(await snapshots.layout())

    async def stats(request: Request) -> Response:
        return json_response(await snapshots.stats())

    return application(
        [
            ("POST", f"{prefix}/snapshot", snapshot),
            ("POST", f"{prefix}/checkout", checkout),
            ("POST", f"{prefix}/fork", fork),
            ("GET", f"{prefix}/snapshots", log),
            ("GET", f"{prefix}/snapshots/{{rev:path}}", show),
            ("GET", f"{prefix}/lineage", lineage),
            ("GET", f"{prefix}/layout", layout),
            ("GET", f"{prefix}/stats", stats),
        ]
    )
