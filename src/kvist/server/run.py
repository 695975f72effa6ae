"""Running the application: a socket, uvicorn, and an end at SIGTERM or SIGINT. Must not know routes or engines."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

import anyio
import uvicorn
from anyio import to_thread
from starlette.types import ASGIApp

from kvist.errors import InvalidInput
from kvist.server.access import require_guarded

GRACE_S: Final = 5.0
"""Seconds that requests in progress get at the end."""
_LAST_S: Final = 10
"""Seconds after which uvicorn cuts whatever still is open."""


def bind(host: str, port: int, *, guarded: bool = False) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Args:
        host, port: the address.
        guarded: whether what will be served there asks for tokens; without, only this machine may reach it.

    Raises:
        InvalidInput: the address cannot be had.
        Unguarded: it would be open to everybody.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        require_guarded(host, str(address[0]), guarded=guarded)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise InvalidInput(f"cannot listen at {host} port {port}: {error}", hint="--port 0 takes a free one") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """``http://host:port`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn that says when it is ready, ends open streams in order, and returns after a signal, not dying of it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        log_level: str = "warning",
        ready: Callable[[], None] | None = None,
        end_streams: Callable[[], None] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """
        Args:
            app: what to serve.
            log_level: uvicorn's.
            ready: called when connections are accepted.
            end_streams: called in a thread ``grace_s`` after the end was asked for; makes open streams end soon.
            grace_s: seconds that requests in progress get.
        """
        # lifespan: the engine is started and closed by whoever made it.
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,  # the process's own: one form for all lines
            log_level=log_level,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace_s) + _LAST_S,
        )
        super().__init__(config)
        self._ready, self._end_streams, self._grace_s = ready, end_streams, grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call ``ready``."""
        await super().startup(sockets)
        if self._ready is not None and not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, let requests finish, and end those that take too long."""

        async def end_streams() -> None:
            await anyio.sleep(self._grace_s)
            if self._end_streams is not None:
                await to_thread.run_sync(self._end_streams)

        async with anyio.create_task_group() as group:
            group.start_soon(end_streams)
            await super().shutdown(sockets)
            group.cancel_scope.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at a signal; uvicorn would raise it once more afterwards, and the exit status would be the signal's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    app: ASGIApp,
    listener: socket.socket,
    *,
    log_level: str,
    ready: Callable[[], None],
    end_streams: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for open streams. See `Server`."""
    Server(app, log_level=log_level, ready=ready, end_streams=end_streams).run(sockets=[listener])
