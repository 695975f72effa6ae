"""kvist's own access in front of vLLM's API server: tokens, tenants, and nothing open beyond this machine.

Pure ASGI. Knows vLLM's routes by path; must not know engines. vLLM's own ``--api-key`` stays in force, outside of this.
Where both are asked for, the key comes in ``Authorization`` and the token in ``X-Kvist-Token``.

Tenants share one engine here, and vLLM has one store. So a tenant's requests are salted, that nobody else's find their
blocks, and named, that nobody else's snapshot is of them; and of the snapshot routes a tenant has those that need its
repository only. Of vLLM's other routes it has those of `_FOR_TENANTS`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.errors import Forbidden, KvistError, NotFound
from kvist.server.access import Access, Guard, check_origin, is_loopback, path_of
from kvist.server.errors import BadRequest, error_response
from kvist.server.routes import REFUSED, Rule, find_rule, is_mutating
from kvist.server.schema import BODY_MAX, parse_object, read_bytes
from kvist.server.tokens import Grant, Tokens
from kvist.server.tokens import Scope as Reach
from kvist.server.vllm.bodies import tenant_body

MARK: Final = "kvist-tenant."
"""In the names of tenants' requests, before the tenant's; no client may choose a name with it."""
_OURS: Final = ("/v1/processfork/", "/v1/kvist/")
_GENERATE: Final = frozenset({"/v1/completions", "/v1/chat/completions"})
_FOR_TENANTS: Final = frozenset({*_GENERATE, "/v1/models", "/version", "/tokenize", "/detokenize"})
_TENANT_OF_OURS: Final = ("/v1/processfork/snapshots", "/v1/processfork/lineage", "/v1/processfork/fork")
_COMPUTE: Final = frozenset(
    {
        "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank",
        "/pooling", "/classify", "/v1/audio/transcriptions", "/v1/audio/translations", "/inference/v1/generate",
    }
)  # fmt: skip

SaltOf = Callable[[str], Awaitable[str]]
"""Gives the salt of a tenant's blocks."""


def rule_of(method: str, path: str) -> Rule:
    """The rule of a route of ours or of vLLM's; what neither is known to have takes an admin."""
    found, is_ours = find_rule(method, path), path.startswith(_OURS)
    if found is None or (found is REFUSED and not is_ours):  # vLLM may take a method that we do not know
        computes = method == "POST" and path in _COMPUTE
        return Rule(Reach.WRITE if computes else Reach.ADMIN, "A route of vLLM's.", for_tenants=False)
    is_theirs = path in _FOR_TENANTS or (is_ours and _is_of_a_tenant(path)) or found.scope is Reach.OPEN
    return Rule(found.scope, found.about, for_tenants=found.for_tenants and is_theirs)


def _is_of_a_tenant(path: str) -> bool:
    return path.startswith("/v1/kvist/") or any(path == one or path.startswith(f"{one}/") for one in _TENANT_OF_OURS)


class Door:
    """Who may come in to one vLLM; told when that is known.

    Attributes:
        access: tokens, or none.
    """

    def __init__(self) -> None:
        self.access = Access()
        self._refusal: str | None = None
        self._is_open = False

    def configure(self, tokens: str | None, args: Any) -> None:
        """Take the configuration.

        Args:
            tokens: path of a tokens file, or ``None``.
            args: vLLM's arguments: where it listens, and whether it asks for a key; ``None``: not known yet.

        Raises:
            KvistError: the tokens file cannot be used.
        """
        if tokens and (self.access.tokens is None or self.access.tokens.path != Path(tokens)):
            self.access = Access(Tokens(Path(tokens)))
        self._refusal = None
        if args is None:
            return  # still starting: none of our routes has an engine
        host = getattr(args, "host", None)
        has_key = bool(getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY"))
        is_local = bool(getattr(args, "uds", None)) or (isinstance(host, str) and is_loopback(host))
        self._is_open = self.access.tokens is None and is_local and not has_key
        if self.access.tokens is None and not is_local and not has_key:
            self._refusal = (
                f"kvist's routes are closed: vLLM listens at {host or 'every address'} and asks nobody who is there; "
                "expected a tokens file (tokens in kv_connector_extra_config, or KVIST_TOKENS), --api-key, or --host "
                "127.0.0.1"
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
            app: vLLM, with our routes.
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
            app = Guard(self._as_whom, access, rules=rule_of)
        elif scope["type"] == "http" and path_of(scope).startswith(_OURS):
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
                if grant.tenant is not None and path_of(scope) in _GENERATE and is_mutating(scope["method"]):
                    scope, receive = await self._marked(grant.tenant, scope, receive)
                elif MARK in Headers(scope=scope).get("x-request-id", ""):
                    raise BadRequest(f"X-Request-Id: {MARK!r} is for tenants", param="request_id")
            except ClientDisconnect:  # while its body was read; nobody sees an answer
                return
            except KvistError as error:
                app = error_response(error)
        await app(scope, receive, send)

    async def _marked(self, tenant: str, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        body = parse_object(await read_bytes(Request(scope, receive), self._body_max))
        data = json.dumps(tenant_body(body, await self._salt_of(tenant))).encode()
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        headers["content-length"] = str(len(data))
        headers["x-request-id"] = f"{MARK}{tenant}.{headers.get('x-request-id') or uuid.uuid4().hex}"
        messages: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return scope, replay


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
