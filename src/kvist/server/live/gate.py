"""kvist's own access in front of an engine's API server: tokens, tenants, and nothing open beyond this machine.

Pure ASGI. Knows the engine's routes by its `Dialect`; must not know engines. The engine's own API key stays in force,
outside of this. Where both are asked for, the key comes in ``Authorization`` and the token in ``X-Kvist-Token``.

Tenants share one engine here, and it has one store. So a tenant's requests are salted, that nobody else's find their
blocks, and named, that nobody else's snapshot is of them; and of the snapshot routes a tenant has those that need its
repository only. Of the engine's other routes it has those that the dialect lists.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from kvist.errors import Forbidden, KvistError, NotFound
from kvist.server.access import Access, Guard, check_origin, is_loopback, path_of
from kvist.server.errors import BadRequest, error_response
from kvist.server.live.dialect import Dialect, TenantBody, is_ours
from kvist.server.live.passing import rewritten
from kvist.server.routes import is_mutating
from kvist.server.schema import BODY_MAX, parse_object, read_bytes
from kvist.server.tokens import Grant, Tokens
from kvist.server.tokens import Scope as Reach

MARK: Final = "kvist-tenant."
"""In the names of tenants' requests, before the tenant's; no client may choose a name with it."""

SaltOf = Callable[[str], Awaitable[str]]
"""Gives the salt of a tenant's blocks."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where an API server listens, and whether it asks who is there.

    Attributes:
        host: an address; ``None``: all of them.
        is_socket: it listens at a socket in the file system instead.
        has_key: it asks for an API key.
    """

    host: str | None
    is_socket: bool
    has_key: bool

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.is_socket or (self.host is not None and is_loopback(self.host))


class Door:
    """Who may come in to one engine; told when that is known.

    Attributes:
        dialect: the engine's.
        access: tokens, or none.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.access = Access()
        self._refusal: str | None = None
        self._is_open = False

    def configure(self, tokens: str | None, listening: Listening | None) -> None:
        """Take the configuration.

        Args:
            tokens: path of a tokens file, or ``None``.
            listening: ``None``: not known yet.

        Raises:
            KvistError: the tokens file cannot be used.
        """
        if tokens and (self.access.tokens is None or self.access.tokens.path != Path(tokens)):
            self.access = Access(Tokens(Path(tokens)))
        self._refusal = None
        if listening is None:
            return  # still starting: none of our routes has an engine
        asks = self.access.tokens is not None or listening.has_key
        self._is_open = not asks and listening.is_local
        if not asks and not listening.is_local:
            self._refusal = (
                f"kvist's routes are closed: {self.dialect.engine} listens at {listening.host or 'every address'} and "
                f"asks nobody who is there; expected a tokens file ({self.dialect.tokens_option}, or KVIST_TOKENS), "
                "--api-key, or --host 127.0.0.1"
            )

    @property
    def refusal(self) -> str | None:
        """Why nobody is let in to kvist's routes; ``None``: some are."""
        return self._refusal

    def require(self, scope: Scope) -> None:
        """Refuse a request to a route of ours, where no tokens are asked for.

        Raises:
            Forbidden: nobody asks who is there, and it is not only this machine; or another site's page sent it.
        """
        if self._refusal is not None:
            raise Forbidden(self._refusal)
        check_origin(scope, Headers(scope=scope), is_open=self._is_open)


class Gate:
    """The middleware."""

    def __init__(self, app: ASGIApp, door: Door, salt_of: SaltOf, *, body_max: int = BODY_MAX) -> None:
        """
        Args:
            app: the engine's, with our routes.
            door: who may come in.
            salt_of: see `SaltOf`.
            body_max: bytes of a tenant's body.
        """
        self._app, self._door, self._salt_of, self._body_max = app, door, salt_of, body_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it."""
        access = self._door.access
        app: ASGIApp = self._app
        if access.tokens is not None:
            app = Guard(self._as_whom, access, rules=self._door.dialect.rule_of)
        elif scope["type"] == "http" and is_ours(path_of(scope)):
            try:
                self._door.require(scope)
            except KvistError as error:
                app = error_response(error)
        await app(scope, receive, send)

    async def _as_whom(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on as its tenant's, if it has one."""
        app: ASGIApp = self._app
        if scope["type"] == "http":
            grant: Grant = scope["state"]["grant"]
            try:
                route = self._door.dialect.generating.get(path_of(scope))
                shape = route.tenant_body if route is not None and is_mutating(scope["method"]) else None
                if grant.tenant is not None and shape is not None:
                    scope, receive = await self._marked(grant.tenant, shape, scope, receive)
                elif MARK in Headers(scope=scope).get("x-request-id", ""):
                    raise BadRequest(f"X-Request-Id: {MARK!r} is for tenants", param="request_id")
            except ClientDisconnect:  # while its body was read; nobody sees an answer
                return
            except KvistError as error:
                app = error_response(error)
        await app(scope, receive, send)

    async def _marked(self, tenant: str, shape: TenantBody, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        body = parse_object(await read_bytes(Request(scope, receive), self._body_max))
        data = json.dumps(shape(body, await self._salt_of(tenant))).encode()
        name = f"{MARK}{tenant}.{Headers(scope=scope).get('x-request-id') or uuid.uuid4().hex}"
        return rewritten(scope, receive, data, {"x-request-id": name})


def grant_of(request: Request) -> Grant:
    """Who sent a request that the gate let through."""
    found: Grant = getattr(request.state, "grant", None) or Grant()
    return found


def require_own(wanted: str | None, grant: Grant) -> None:
    """Refuse a capture that would hold what is a tenant's.

    Args:
        wanted: the request that is to be captured; ``None``: the whole engine, the cached blocks of tenants included.
        grant: of who asks.

    Raises:
        NotFound: the request is a tenant's.
        Forbidden: the whole engine takes an admin.
    """
    if wanted is not None and MARK in wanted:
        raise NotFound(f"no live or recently finished request {wanted!r:.200}", hint="name it by X-Request-Id")
    if wanted is None and grant.scope < Reach.ADMIN:
        raise Forbidden(f"to capture the whole engine takes a token of scope admin, and {grant.id!r} has less")
