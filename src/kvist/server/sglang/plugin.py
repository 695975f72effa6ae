"""How SGLang takes kvist in: the entry point of its plugins, and the API process's routes and middleware.

Knows how SGLang's API server is put together (0.5.23). Puts `kvist.server.live` together.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from kvist.engines.sglang import plugin
from kvist.engines.sglang.settings import from_environment
from kvist.errors import KvistError
from kvist.server.live.api import routes
from kvist.server.live.gate import Door, Gate, Listening
from kvist.server.live.metrics import metered
from kvist.server.live.resume import Resume
from kvist.server.live.snapshots import Snapshots
from kvist.server.sglang.client import SglangEngine
from kvist.server.sglang.dialect import SGLANG
from kvist.server.sglang.naming import Naming
from kvist.server.tokens import FILE as TOKENS

log = logging.getLogger("kvist.server")

PREFIX: Final = "/v1/processfork"


def register() -> None:
    """Entry point ``sglang.srt.plugins: kvist``. Loaded in every process of SGLang.

    Raises:
        SystemExit: the settings cannot be read: SGLang would log any other error, and start without kvist.
    """
    try:
        plugin.register(serve)
    except KvistError as error:
        raise SystemExit(f"kvist: {error}") from error


def listening(args: Any) -> Listening:
    """Where a server of these arguments listens. A key for admins does not count: alone, it keeps nobody from ours."""
    return Listening(args.host, False, bool(args.api_key))


def serve(app: Any, manager: Any) -> None:
    """Add routes and middleware to SGLang's FastAPI application, before it listens.

    What is added now comes to lie inside all middleware that SGLang adds later, authentication among it.

    Raises:
        KvistError: the settings, or the tokens file in them, cannot be used; the server does not start.
    """
    settings = from_environment()
    assert settings is not None
    door, snapshots, args = Door(SGLANG), Snapshots(), manager.server_args
    door.configure(settings.tokens or os.environ.get(TOKENS), listening(args))
    if door.refusal is not None:
        log.warning("%s", door.refusal)
    snapshots.attach(SglangEngine(manager, settings))
    app.mount(PREFIX, metered(routes(snapshots), prefix=PREFIX))
    app.add_middleware(Naming)
    app.add_middleware(Resume, snapshots=snapshots, door=door)
    app.add_middleware(Gate, door=door, salt_of=snapshots.salt_of)
