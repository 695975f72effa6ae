"""The API's own description, ``GET /openapi.json``, made of the table of routes and the types of the bodies.

Knows both; must not know who answers. What a body may hold beyond its type (`kvist.server.schema`: fields that ask for
nothing, a router's own) is told in docs/reference/http.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import kvist
from kvist.server.routes import ROUTES, Rule
from kvist.server.tokens import Scope

_PARAMETER: Final = re.compile(r"{(\w+)(?::\w+)?}")
_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def describe(routes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes that an application has, by method and path as Starlette writes it."""
    told = {key: ROUTES[key] for key in routes if key in ROUTES and ROUTES[key].in_api}
    bodies = sorted({rule.body for rule in told.values() if rule.body is not None}, key=lambda body: body.__name__)
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    of = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), rule in told.items():
        operation = _operation(path, rule, None if rule.body is None else of[rule.body])
        paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvist", "version": kvist.__version__},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def add_description(app: Starlette) -> None:
    """Let an application whose routes are complete tell what they are."""
    path = "/openapi.json"
    found = [route for route in app.routes if isinstance(route, Route)]
    routes = [(method, route.path) for route in found for method in route.methods or ()]
    document = msgspec.json.encode(describe([*routes, ("GET", path)]))

    async def answer(_: Request) -> Response:
        return Response(document, media_type="application/json")

    app.router.routes.append(Route(path, answer, methods=["GET"]))


def _operation(path: str, rule: Rule, schema: Mapping[str, Any] | None) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(path)
    ]
    parameters += [
        {"name": name, "in": "query", "description": about, "schema": {"type": "string"}} for name, about in rule.query
    ]
    refusal = {"description": "An error.", "content": _json({"$ref": "#/components/schemas/Error"})}
    operation: dict[str, Any] = {
        "summary": rule.about,
        "parameters": parameters,
        "responses": {"200": {"description": "What was asked for."}, "default": refusal},
        "security": [] if rule.scope is Scope.OPEN else [{"token": [rule.scope.text]}],
    }
    if schema is not None:
        operation["requestBody"] = {"content": _json(schema)}
    return operation


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
