"""`FaultyProxy`: a real HTTP proxy between a client and a server, that loses, cuts and refuses what it is told to."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit


class Fault(Enum):
    """What happens to one request."""

    REFUSE = "the connection is closed, and the server never sees the request"
    LOSE_ANSWER = "the server does it, and the connection is closed before the answer"
    FAIL_AFTER = "the server does it, and the client is told 500"
    CUT = "half of the answer's body comes, then the connection is closed"
    UNAVAILABLE = "503"
    FORBIDDEN = "403"
    FULL = "507"
    STALL = "nothing comes until the proxy is closed"
    STALL_HALFWAY = "half of the answer's body comes, then nothing until the proxy is closed"


_Answer = tuple[int, list[tuple[str, str]], bytes]
_HALVES = (Fault.CUT, Fault.STALL_HALFWAY)
_STATUS = {Fault.UNAVAILABLE: 503, Fault.FORBIDDEN: 403, Fault.FULL: 507, Fault.FAIL_AFTER: 500}


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as the rule for faults sees it.

    Attributes:
        method: such as ``PUT``.
        target: path and query.
        number: how many came before.
    """

    method: str
    target: str
    number: int


class FaultyProxy:
    """Passes HTTP on to ``upstream``; a context manager.

    Attributes:
        rule: says of a request what goes wrong; replace it at any time.
        seen: the requests so far.
    """

    def __init__(self, upstream: str) -> None:
        """Listen on a free port of this machine for what goes to ``upstream``, ``http://host:port``."""
        self.rule: Callable[[Request], Fault | None] = lambda request: None
        self.seen: list[Request] = []
        self._upstream = urlsplit(upstream)
        self._lock, self._is_closed = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def endpoint(self) -> str:
        """Where clients connect: ``http://127.0.0.1:port``."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def fail_first(self, count: int, fault: Fault, method: str | None = None, holding: str = "") -> None:
        """Let ``fault`` happen to the next ``count`` requests of ``method`` whose target holds ``holding``."""
        left = [count]

        def rule(request: Request) -> Fault | None:
            if method not in (None, request.method) or holding not in request.target or not left[0]:
                return None
            left[0] -= 1
            return fault

        self.rule = rule

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _judge(self, method: str, target: str) -> Fault | None:
        with self._lock:
            request = Request(method, target, len(self.seen))
            self.seen.append(request)
            return self.rule(request)

    def _ask(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._upstream.netloc)
        try:
            connection.request(method, target, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                self.close_connection = True
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._judge(self.command, self.path)
                if fault is Fault.REFUSE:
                    return
                if fault is Fault.STALL:
                    proxy._is_closed.wait()
                    return
                status, data = 200, b""
                headers: list[tuple[str, str]] = []
                if fault in (None, Fault.LOSE_ANSWER, Fault.CUT, Fault.STALL_HALFWAY, Fault.FAIL_AFTER):
                    status, headers, data = proxy._ask(self.command, self.path, dict(self.headers), body)
                if fault is Fault.LOSE_ANSWER:
                    return
                if fault in _STATUS:
                    status, headers, data = _STATUS[fault], [], b"<Error><Code>Injected</Code></Error>"
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                        self.send_header(name, value)
                size = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
                self.send_header("Content-Length", size)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fault in _HALVES else data)
                if fault is Fault.STALL_HALFWAY:
                    self.wfile.flush()
                    proxy._is_closed.wait()

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                return

        return Handler
