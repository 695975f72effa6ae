"""Access: who may call which route. The one guard in front of every HTTP surface.

Knows headers, tokens and the table of routes; must not know what any route does.

A server asks for tokens, or listens at a loopback address only (`require_guarded`). Without tokens whoever is on the
machine may do everything, but a page in its browser may not: requests must be addressed to the loopback address by
name or number (no other name can have been made to lead here), and none that changes anything may come from another
origin. With tokens, the second holds too, since a browser that gave one is known by a cookie (`kvist.server.logins`).

A tenant's token opens its own repository. The guard tells the application who calls, in ``request.state.grant``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Final
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvist.errors import Forbidden, InvalidInput, KvistError, Unauthorized
from kvist.server.errors import Envelope, envelope, error_response
from kvist.server.logins import Logins
from kvist.server.routes import Rule, find_rule, is_mutating
from kvist.server.tokens import Grant, Tokens, digest_of
from kvist.server.tokens import Scope as Reach

LOGIN: Final = "/ui/login"
_COOKIE: Final = "kvist_login_"
_NAMES: Final = frozenset({"localhost", "ip6-localhost"})


class Unguarded(InvalidInput):
    """A server that would listen beyond this machine, and asks nobody for a token."""

    kind = "unguarded"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``: a loopback address, or a name that means one."""
    text = host.strip("[]").lower().rstrip(".")
    if text in _NAMES or text.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def require_guarded(host: str, address: str, *, guarded: bool) -> None:
    """Refuse to listen without tokens, unless only this machine reaches the address.

    Args:
        host: as somebody wrote it.
        address: what it comes to.
        guarded: whether tokens are asked for.

    Raises:
        Unguarded: it would be open to everybody.
    """
    if not guarded and not is_loopback(address):
        raise Unguarded(
            f"cannot listen at {host}: without tokens, whoever reaches it could read and write every conversation; "
            "expected a loopback address, such as 127.0.0.1, or a tokens file",
            hint="kvist token add ID --scope write --tokens FILE, then --tokens FILE",
        )


class Access:
    """Who may call.

    Attributes:
        tokens: that are asked for; ``None``: none, since only this machine can call.
    """

    def __init__(self, tokens: Tokens | None = None) -> None:
        self.tokens: Final = tokens
        self._logins = Logins()

    def grant_of(self, text: str | None, word: str | None = None) -> Grant:
        """What a caller may do.

        Args:
            text: its token; ``None``: it brings none.
            word: of its login, which counts where it brings no token.

        Raises:
            Unauthorized: neither is known, or there is none.
        """
        if self.tokens is None:
            return Grant()
        digest = digest_of(text) if text else self._logins.find(word or "")
        if digest is None:
            raise Unauthorized("this server asks for a token: expected the header 'Authorization: Bearer <token>'")
        return self.tokens.find(digest)

    def log_in(self, text: str) -> str:
        """The word by which a browser that gave the token ``text`` is known from now on; raises as `grant_of`."""
        self.grant_of(text)
        return self._logins.begin(digest_of(text))

    def log_out(self, word: str) -> None:
        """Know a browser no more."""
        self._logins.end(word)

    def require(self, grant: Grant, rule: Rule) -> None:
        """Refuse what a grant does not reach.

        Raises:
            Forbidden: naming what it would take.
        """
        if rule.scope > grant.scope:
            raise Forbidden(f"this takes a token of scope {rule.scope.text}, and {grant.id!r} has {grant.scope.text}")
        if grant.tenant is not None and not rule.for_tenants:
            raise Forbidden(f"this is of the whole server, and token {grant.id!r} is tenant {grant.tenant!r}'s")


class Guard:
    """ASGI middleware: lets through what the caller may do."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        *,
        form: Envelope = envelope,
        rules: Callable[[str, str], Rule | None] = find_rule,
    ) -> None:
        """
        Args:
            app: what is guarded.
            access: who may call.
            form: of errors.
            rules: the rule of a method and path; ``None``: there is no such route.
        """
        self._app, self._access, self._form, self._rules = app, access, form, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it."""
        if scope["type"] == "websocket":  # none of ours; what is behind us may have some
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            rule = self._rules(scope["method"], path_of(scope))
            check_origin(scope, headers, is_open=self._access.tokens is None)
            grant = self._grant(scope, headers, rule)
        except (KvistError, HTTPException) as error:
            await self._refusal(scope, headers, error)(scope, receive, send)
            return
        state = {**scope.get("state", {}), "grant": grant, "access": self._access}
        await self._app({**scope, "state": state}, receive, send)

    def _grant(self, scope: Scope, headers: Headers, rule: Rule | None) -> Grant:
        if rule is not None and rule.scope is Reach.OPEN:
            return Grant(scope=Reach.OPEN)
        grant = self._access.grant_of(token_of(headers), word_of(scope, headers))
        if rule is None:
            raise HTTPException(404)
        self._access.require(grant, rule)
        return grant

    def _refusal(self, scope: Scope, headers: Headers, error: KvistError | HTTPException) -> ASGIApp:
        is_seen = scope["method"] == "GET" and "text/html" in headers.get("accept", "")
        if isinstance(error, Unauthorized) and is_seen and _is_of_the_page(scope):
            query = scope.get("query_string", b"").decode("latin-1")
            there = path_of(scope) + (f"?{query}" if query else "")
            return RedirectResponse(f"{LOGIN}?next={quote(there, safe='')}", 303)
        return error_response(error, self._form)


def path_of(scope: Scope) -> str:
    """The path below the prefix of a proxy."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def token_of(headers: Headers) -> str | None:
    """The token that a request brings; ``None``: none of ours."""
    if "x-kvist-token" in headers:
        return headers["x-kvist-token"].strip()
    if "authorization" in headers:
        kind, _, text = headers["authorization"].partition(" ")
        return text.strip() if kind.lower() == "bearer" else None
    return None


def cookie_of(scope: Scope) -> str:
    """The name of the cookie with the word of a login: one for each port, as browsers keep one jar for all of them."""
    return f"{_COOKIE}{(scope.get('server') or ('', ''))[1]}"


def word_of(scope: Scope, headers: Headers) -> str | None:
    """The word of the login that a request brings; it counts for the page, and for the metrics that it links to."""
    counts = _is_of_the_page(scope) or path_of(scope) == "/metrics"
    return cookie_parser(headers.get("cookie", "")).get(cookie_of(scope)) if counts else None


def check_origin(scope: Scope, headers: Headers, *, is_open: bool) -> None:
    """Refuse what a page of somebody else's makes a browser send.

    Args:
        scope, headers: of the request.
        is_open: no token is asked for: then the name that the request is addressed to must be a loopback one, or a
            page whose name was led to this machine could read the answers.

    Raises:
        Forbidden: it is.
    """
    host = headers.get("host", "")
    if is_open and host and not is_loopback(_hostname(host)):
        raise Forbidden(
            f"this server answers at loopback addresses only, and the request is addressed to {host!r:.200}",
            hint="use http://127.0.0.1 or http://localhost; behind a proxy, tokens",
        )
    if not is_mutating(scope["method"]):
        return
    origin = headers.get("origin")
    if origin is not None and (not host or _place(origin) != host.lower()):
        raise Forbidden(f"a page of {origin!r:.200} may not change anything at {host!r:.200}")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Forbidden("a page of another site may not change anything here")


def _place(origin: str) -> str:
    """Host and port of an ``Origin`` header; ``""``: it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    """A ``Host`` header without its port."""
    if host.startswith("["):
        return host.partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_of_the_page(scope: Scope) -> bool:
    path = path_of(scope)
    return path == "/" or path.startswith("/ui/")
