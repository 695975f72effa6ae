"""From a table of routes to an application: the one place where errors become answers. Must not know what routes do."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import kvist
from kvist.server.errors import Envelope, envelope, error_response
from kvist.server.wire import Endpoint, guarded, json_response

Table = list[tuple[str, str, Endpoint]]
"""Method, path and endpoint of each route."""


def application(table: Table, *, form: Envelope = envelope, more: Iterable[BaseRoute] = ()) -> Starlette:
    """The application of a table.

    Args:
        table: of its routes.
        form: of errors, those of paths and methods that nobody takes among them.
        more: routes that are made already; they come first.
    """

    async def http_error(_: Request, error: Exception) -> Response:
        return error_response(error, form)

    return Starlette(
        routes=[*more, *(Route(path, guarded(endpoint, form), methods=[method]) for method, path, endpoint in table)],
        exception_handlers={HTTPException: http_error},
    )


async def health(_: Request) -> Response:
    """``GET /health``."""
    return json_response({"status": "ok"})


async def version(_: Request) -> Response:
    """``GET /version``."""
    return json_response({"version": kvist.__version__})
