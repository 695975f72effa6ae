"""The page over HTTP: GETs that show, forms that do one thing and redirect, and the policy that keeps it to itself.

Knows HTTP, templates and `Page`. Who may call what is asked before it comes here (`kvist.server.access`).
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from anyio import CapacityLimiter, to_thread
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

import kvist
from kvist.errors import InvalidInput, KvistError, NotFound, Unauthorized
from kvist.ids import short
from kvist.server.access import Access, cookie_of
from kvist.server.errors import BadRequest, status_of
from kvist.server.schema import read_bytes
from kvist.server.tokens import Grant, Scope
from kvist.server.ui import figures
from kvist.server.ui.page import Page
from kvist.server.wire import Endpoint

_T = TypeVar("_T")
_POLICY: Final = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_THEMES: Final = ("auto", "light", "dark")
_THEME: Final = "kvist_theme"
_YEAR_S: Final = 365 * 86400
_FORM_MAX: Final = 16 * 1024
_FIELDS_MAX: Final = 20
_ROWS: Final = 20
_REQUESTS: Final = 12
_ROWS_OF_LINEAGE: Final = 250
_FORKS_MAX: Final = 100
_NOTES_MAX: Final = 200


class View:
    """The endpoints over one `Page`."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._limiter = CapacityLimiter(8)
        self._notes = _Notes()
        self._files = _files()
        environment = Environment(
            loader=PackageLoader("kvist.server.ui"), autoescape=True, undefined=StrictUndefined, trim_blocks=False
        )
        shown = (figures.nbytes, figures.count, figures.percent, figures.seconds, figures.ago, figures.since)
        environment.filters.update({one.__name__: one for one in (*shown, figures.moment, short)})
        environment.filters["shell"] = shlex.quote
        self._environment = environment

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path and endpoint of each."""
        found: list[tuple[str, str, Endpoint]] = [
            ("GET", "/", self.index),
            ("GET", "/ui/lineage", self.lineage),
            ("GET", "/ui/snapshots/{rev:path}", self.snapshot),
            ("POST", "/ui/fork", self.fork),
            ("POST", "/ui/tag", self.tag),
            ("POST", "/ui/checkout", self.checkout),
            ("GET", "/ui/login", self.login),
            ("POST", "/ui/login", self.log_in),
            ("POST", "/ui/logout", self.log_out),
            ("POST", "/ui/theme", self.theme),
            ("GET", "/ui/static/{name}", self.static),
            ("GET", "/favicon.svg", self.favicon),
            ("GET", "/favicon.ico", self.favicon),
        ]
        return [(method, path, self._telling(endpoint)) for method, path, endpoint in found]

    # -- what is shown --------------------------------------------------------------------------------------------

    async def index(self, request: Request) -> Response:
        """``GET /``."""
        page = self._page

        def read() -> dict[str, Any]:
            tree, space, curves = page.tree.fresh(), page.space.peek(), page.curves()
            branches = space.value.by_branch if space is not None and space.value is not None else ()
            tiers = [(tier, [(part.kind, part.amount) for part in tier.parts]) for tier in page.tiers()]
            return {
                "tiles": page.tiles(tree.value, space.value if space is not None else None),
                "tree": tree,
                "rows": page.lines(tree.value, 0, _ROWS) if tree.value is not None else [],
                "more": tree.value is not None and len(tree.value.rows) > _ROWS,
                "total": len(tree.value.rows) if tree.value is not None else 0,
                "space": space,
                "branches": sorted(branches, key=lambda use: (-use.own_bytes, -use.page_bytes, use.name)),
                "tiers": tiers,
                "curves": curves,
                "requests": page.engine.recent.requests()[:_REQUESTS] if page.engine is not None else [],
                "now": time.time(),
            }

        return await self._show(request, "index.html", await self._run(read))

    async def lineage(self, request: Request) -> Response:
        """``GET /ui/lineage``."""
        text = request.query_params.get("at", "0")
        start = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0

        def read() -> dict[str, Any]:
            tree = self._page.tree.fresh()
            if tree.value is None:
                assert tree.error is not None
                raise tree.error
            total = len(tree.value.rows)
            at = min(start, max(0, total - 1))
            rows = self._page.lines(tree.value, at, _ROWS_OF_LINEAGE)
            end = at + len(rows)
            return {
                "tree": tree,
                "rows": rows,
                "total": total,
                "at": at,
                "newer": max(0, at - _ROWS_OF_LINEAGE) if at else None,
                "older": end if end < total else None,
            }

        return await self._show(request, "lineage.html", await self._run(read))

    async def snapshot(self, request: Request) -> Response:
        """``GET /ui/snapshots/{rev}``."""
        return await self._detail(request, request.path_params["rev"], None)

    async def _detail(self, request: Request, rev: str, error: KvistError | None) -> Response:
        detail = await self._run(lambda: self._page.detail(rev))
        fields = {name: getattr(detail, name) for name in detail.__dataclass_fields__}
        fields["trouble"] = error or detail.trouble
        status = 200 if error is None else status_of(error)
        return await self._show(request, "snapshot.html", fields, status)

    # -- what is done ---------------------------------------------------------------------------------------------

    async def fork(self, request: Request) -> Response:
        """``POST /ui/fork``."""
        form = await self._form(request)
        cid, name, text = form.get("cid", ""), form.get("name", "").strip(), form.get("n", "1")

        def fork() -> str:
            if not (text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= _FORKS_MAX):
                raise InvalidInput(f"branches: expected a number in [1, {_FORKS_MAX}], got {text!r:.80}")
            made = self._page.fork(cid, int(text), name or None)
            return f"Forked: {', '.join(made[:8])}{' …' if len(made) > 8 else ''}"

        return await self._do(request, cid, fork)

    async def tag(self, request: Request) -> Response:
        """``POST /ui/tag``."""
        form = await self._form(request)
        cid, name = form.get("cid", ""), form.get("name", "").strip()

        def tag() -> str:
            self._page.tag(cid, name)
            return f"Tagged: {name}"

        return await self._do(request, cid, tag)

    async def checkout(self, request: Request) -> Response:
        """``POST /ui/checkout``."""
        form = await self._form(request)
        cid, engine = form.get("cid", ""), self._page.engine

        def check_out() -> str:
            if engine is None:
                raise InvalidInput("there is no engine here to check out into", hint="kvist serve --model DIR")
            tokens, seconds = engine.check_out(cid)
            return f"Checked out: {figures.count(tokens)} tokens are in the engine, after {figures.seconds(seconds)}"

        return await self._do(request, cid, check_out)

    async def _do(self, request: Request, cid: str, act: Callable[[], str]) -> Response:
        """Do it and redirect to the snapshot, which then says what was done; or show the snapshot with the error."""
        if not self._page.may_write:
            raise _ReadOnly("this page was opened to read", hint="kvist ui --allow-write")
        try:
            note = self._notes.keep(await self._run(act))
        except KvistError as error:
            return await self._detail(request, cid, error)
        return _redirect(f"/ui/snapshots/{quote(cid, safe='')}?note={note}")

    # -- the browser ----------------------------------------------------------------------------------------------

    async def login(self, request: Request) -> Response:
        """``GET /ui/login``."""
        return await self._show(request, "login.html", {"next": _inside(request.query_params.get("next"))})

    async def log_in(self, request: Request) -> Response:
        """``POST /ui/login``."""
        form = await self._form(request)
        there, token = _inside(form.get("next")), form.get("token", "").strip()
        access: Access = request.state.access
        try:
            word = access.log_in(token)
        except Unauthorized as error:
            return await self._show(request, "login.html", {"next": there, "trouble": error}, 401)
        answer = _redirect(there)
        is_tls = request.url.scheme == "https"
        answer.set_cookie(cookie_of(request.scope), word, httponly=True, samesite="strict", secure=is_tls, path="/")
        return answer

    async def log_out(self, request: Request) -> Response:
        """``POST /ui/logout``."""
        answer, cookie = _redirect("/ui/login"), cookie_of(request.scope)
        access: Access = request.state.access
        access.log_out(request.cookies.get(cookie, ""))
        answer.delete_cookie(cookie, path="/", httponly=True, samesite="strict")
        return answer

    async def theme(self, request: Request) -> Response:
        """``POST /ui/theme``."""
        form = await self._form(request)
        chosen = form.get("theme", "auto")
        answer = _redirect(_inside(form.get("next")))
        if chosen in _THEMES:
            answer.set_cookie(_THEME, chosen, max_age=_YEAR_S, httponly=True, samesite="strict", path="/")
        return answer

    async def static(self, request: Request) -> Response:
        """``GET /ui/static/{name}``."""
        found = self._files.get(request.path_params["name"])
        if found is None:
            raise NotFound(f"there is no file {request.path_params['name']!r:.80}")
        data, kind, etag = found
        headers = _HEADERS | {"Cache-Control": "no-cache", "ETag": etag}
        if request.headers.get("if-none-match") == etag:
            return Response(None, 304, headers)
        return Response(data, 200, headers, kind)

    async def favicon(self, request: Request) -> Response:
        """``GET /favicon.svg``, and where browsers look for one beside documents that name none."""
        data, kind, etag = self._files["favicon.svg"]
        return Response(data, 200, _HEADERS | {"Cache-Control": "max-age=86400", "ETag": etag}, kind)

    # -- in common ------------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await to_thread.run_sync(work, limiter=self._limiter)

    async def _form(self, request: Request) -> dict[str, str]:
        data = await read_bytes(request, _FORM_MAX)
        try:
            fields = parse_qsl(data.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=_FIELDS_MAX)
        except ValueError:
            raise BadRequest(f"expected a form of at most {_FIELDS_MAX} fields") from None
        return dict(fields)

    async def _show(self, request: Request, template: str, fields: Mapping[str, Any], status: int = 200) -> Response:
        page, grant = self._page, getattr(request.state, "grant", Grant())
        is_known = grant.scope >= Scope.READ
        theme = request.cookies.get(_THEME, "auto")
        common = {
            "theme": theme if theme in _THEMES else "auto",
            "here": _here(request),
            "is_logged_in": cookie_of(request.scope) in request.cookies,
            "has_metrics": grant.tenant is None,
            "version": kvist.__version__,
            "about": page.about if is_known else "",
            "place": page.name if is_known else "kvist",
            "store": page.repo.store.url if is_known else "",
            "origin": f"{request.url.scheme}://{request.url.netloc}",
            "has_engine": page.engine is not None,
            "can_write": page.may_write and grant.scope >= Scope.WRITE,
            "is_read_only": not page.may_write,
            "note": self._notes.find(request.query_params.get("note", "")),
            "trouble": None,
        }
        document = self._environment.get_template(template).render(common | dict(fields))
        return Response(document, status, _HEADERS, "text/html; charset=utf-8")

    def _telling(self, endpoint: Endpoint) -> Endpoint:
        """``endpoint``, with its errors as a page."""

        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except KvistError as error:
                return await self._show(request, "trouble.html", {"trouble": error}, status_of(error))

        return answer


class _ReadOnly(InvalidInput):
    """A form that was not offered."""

    kind = "read_only"


class _Notes:
    """What was done, to be said once more after the redirect: by a word that nobody guesses."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notes: OrderedDict[str, str] = OrderedDict()

    def keep(self, text: str) -> str:
        """The word for it."""
        word = secrets.token_urlsafe(9)
        with self._lock:
            self._notes[word] = text
            while len(self._notes) > _NOTES_MAX:
                self._notes.popitem(last=False)
        return word

    def find(self, word: str) -> str:
        """What is kept by it; ``""``: nothing."""
        return self._notes.get(word, "")


def _files() -> dict[str, tuple[bytes, str, str]]:
    """The page's own files: bytes, type and etag, by name."""
    found = {}
    for file in resources.files("kvist.server.ui").joinpath("static").iterdir():
        data = file.read_bytes()
        kind = _TYPES[PurePosixPath(file.name).suffix]
        found[file.name] = data, kind, f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    return found


def _redirect(there: str) -> RedirectResponse:
    return RedirectResponse(there, 303, _HEADERS)


def _here(request: Request) -> str:
    query = request.url.query
    return request.url.path + (f"?{query}" if query else "")


def _inside(there: str | None) -> str:
    """A path of this server, or its page: nobody is sent elsewhere by a link."""
    if not there or not there.startswith("/") or there[1:2] in ("/", "\\") or not there.isprintable():
        return "/"
    parts = urlsplit(there)
    return "/" if parts.scheme or parts.netloc else there
