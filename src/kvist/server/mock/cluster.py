"""Several mock engines in one process, each with ports of its own: engines, streams of events and servers together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from socket import socket
from typing import Any, Self

import anyio
from starlette.types import ASGIApp, Receive, Scope, Send

from kvist.engines.mock import MockEngine
from kvist.errors import InvalidInput
from kvist.router.publish import Publisher
from kvist.server.access import Access, Guard
from kvist.server.mock.app import Served, create_app
from kvist.server.mock.errors import vllm_envelope
from kvist.server.mock.metrics import Metrics
from kvist.server.mock.speech import Voice
from kvist.server.routes import Rule, find_rule
from kvist.server.run import GRACE_S, Server, bind, url_of
from kvist.sim.config import EngineConfig

_LAST_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where engines listen: the first has these ports, each next one the next; 0: every engine has a free one.

    Attributes:
        host: address of all.
        http: of the API.
        events: of the stream of events.
        replay: where subscribers ask for what they missed.
    """

    host: str = "127.0.0.1"
    http: int = 0
    events: int = 0
    replay: int = 0

    def of(self, kind: str, worker: int) -> int:
        """The port of an engine."""
        first: int = getattr(self, kind)
        return first + worker if first else 0


@dataclass(frozen=True, slots=True)
class Worker:
    """One engine, with what tells of it.

    Attributes:
        served: engine, voice and metrics.
        listener: socket of the API.
        publisher: of its events.
        app: its API.
    """

    served: Served
    listener: socket
    publisher: Publisher
    app: ASGIApp

    def about(self) -> dict[str, Any]:
        """Where it can be reached."""
        return {
            "url": url_of(self.listener),
            "kv_events_endpoint": self.publisher.endpoint,
            "kv_replay_endpoint": self.publisher.replay_endpoint,
        }


class Cluster:
    """Engines that listen. Use it as a context manager; `serve` runs them.

    Attributes:
        workers: in order of their ports.
    """

    def __init__(
        self,
        config: EngineConfig,
        voice: Voice,
        *,
        workers: int = 1,
        ports: Ports | None = None,
        access: Access | None = None,
    ) -> None:
        """Bind all sockets.

        Args:
            config: of each engine.
            voice: of all.
            workers: how many.
            ports: where they listen; default: anywhere on this machine alone.
            access: who may call the APIs, tenants excepted; default: whoever is on this machine. Streams of events ask
                nobody.

        Raises:
            InvalidInput: a configuration that cannot be, ports that cannot be had.
            Conflict: a port of the events that is in use.
        """
        ports = ports or Ports()
        _require_ports(ports, workers)
        self.workers: list[Worker] = []
        self._access = access or Access()
        self._server: Server | None = None
        with ExitStack() as stack:
            for number in range(workers):
                self.workers.append(self._worker(config, voice, ports, number, stack))
            self._stack = stack.pop_all()

    def serve(
        self, *, log_level: str = "warning", ready: Callable[[], None] | None = None, grace_s: float = GRACE_S
    ) -> None:
        """Serve until SIGTERM or SIGINT, or `stop`; requests under way get ``grace_s`` seconds to end.

        Args:
            log_level: uvicorn's.
            ready: called when connections are accepted.
            grace_s: after the end was asked for.
        """
        asyncio.run(self._serve(log_level, ready, grace_s))

    def stop(self) -> None:
        """End `serve`. May be called in any thread."""
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Free all ports."""
        self._stack.close()

    async def _serve(self, log_level: str, ready: Callable[[], None] | None, grace_s: float) -> None:
        loop = asyncio.get_running_loop()
        apps = {worker.listener.getsockname()[1]: worker.app for worker in self.workers}

        async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
            """Each connection to the worker whose port it came to."""
            await apps[scope["server"][1]](scope, receive, send)

        def end_streams() -> None:  # in a thread
            for worker in self.workers:
                loop.call_soon_threadsafe(worker.served.engine.close)

        self._server = Server(dispatch, log_level=log_level, ready=ready, end_streams=end_streams, grace_s=grace_s)
        async with anyio.create_task_group() as group:
            for worker in self.workers:
                group.start_soon(worker.served.engine.run)
            await self._server.serve(sockets=[worker.listener for worker in self.workers])
            group.cancel_scope.cancel()

    def _worker(self, config: EngineConfig, voice: Voice, ports: Ports, number: int, stack: ExitStack) -> Worker:
        listener = stack.enter_context(
            bind(ports.host, ports.of("http", number), guarded=self._access.tokens is not None)
        )
        host = listener.getsockname()[0]  # an address: ZeroMQ takes no names
        where = [f"tcp://{host}:{ports.of(kind, number) or '*'}" for kind in ("events", "replay")]
        publisher = stack.enter_context(Publisher(*where, block_size=config.block_size))
        metrics = Metrics(voice.name)
        engine = MockEngine(config, publish=publisher.publish, observer=metrics)
        metrics.bind(engine)
        served = Served(engine=engine, voice=voice, metrics=metrics)
        app = Guard(create_app(served), self._access, form=vllm_envelope, rules=rule_of)
        return Worker(served, listener, publisher, app)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rule_of(method: str, path: str) -> Rule | None:
    """The rule of a route: nothing is for tenants, for whom these engines have no caches apart."""
    found = find_rule(method, path)
    return None if found is None else replace(found, for_tenants=False)


def _require_ports(ports: Ports, workers: int) -> None:
    if workers < 1:
        raise InvalidInput(f"workers must be at least 1, got {workers}")
    taken: dict[int, str] = {}
    for kind in ("http", "events", "replay"):
        first = ports.of(kind, 0)
        for port in range(first, first + workers) if first else ():
            if not 0 < port <= _LAST_PORT:
                raise InvalidInput(f"{kind} ports must lie in 1 to {_LAST_PORT}; got {first} to {first + workers - 1}")
            if port in taken:
                raise InvalidInput(f"{kind} ports {first} to {first + workers - 1} overlap those of {taken[port]}")
            taken[port] = kind
