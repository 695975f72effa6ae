"""The Starlette application: routes, and one place where errors become answers. Puts the room together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvist.server.offer import Offer
from kvist.server.openai import OpenAI, Requests
from kvist.server.openapi import add_description
from kvist.server.plan import Served
from kvist.server.routing import Table, application, health, version
from kvist.server.schema import BODY_MAX
from kvist.server.seeing import Seeing
from kvist.server.sessions import Sessions
from kvist.server.snapshots import Snapshots
from kvist.server.ui import View
from kvist.server.wire import guarded, json_response

if TYPE_CHECKING:
    from kvist.engines.hf import AnyEngine, SamplingParams
    from kvist.pager.base import CachePager
    from kvist.repo import Repository
    from kvist.server.tokenizer import Tokenizer


def create_app(
    engine: AnyEngine,
    repo: Repository,
    *,
    pager: Callable[[AnyEngine], CachePager],
    params: Callable[..., SamplingParams],
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
    offer: Offer | None = None,
    seeing: Seeing | None = None,
    body_max: int = BODY_MAX,
) -> Starlette:
    """The application over a started engine. The caller owns engine and repository, and closes them.

    Args:
        engine: what generates.
        repo: where snapshots go.
        pager: makes a pager of the engine.
        params: the engine's class of sampling parameters.
        tokenizer: ``None``: only token ids can be sent.
        name: what clients call the model; default the layout's model name.
        offer: the cartridges that requests may use, and how they choose; default those that the engine was given.
        seeing: what the process shows of itself; default: what only this application knows.
        body_max: largest request body, in bytes.
    """
    seeing = seeing or Seeing()
    sessions = Sessions(engine, repo, lambda: pager(engine))
    called = name or engine.layout.model or "model"
    page = seeing.page(sessions, called)
    assert page.engine is not None
    served = Served(
        name=called,
        engine=engine,
        sessions=sessions,
        recent=page.engine.recent,
        offer=offer or Offer(engine),
        params=params,
        tokenizer=tokenizer,
        body_max=body_max,
    )
    requests = Requests()
    openai, snapshots = OpenAI(served, requests), Snapshots(served.sessions, requests, body_max)
    table: Table = [
        ("GET", "/health", health),
        ("GET", "/version", version),
        ("GET", "/metrics", seeing.metrics.endpoint),
        *View(page).routes(),
        ("GET", "/v1/models", openai.models),
        ("GET", "/v1/models/{model:path}", openai.model),
        ("POST", "/v1/completions", openai.completions),
        ("POST", "/v1/chat/completions", openai.chat),
        ("POST", "/v1/processfork/snapshot", snapshots.snapshot),
        ("POST", "/v1/processfork/fork", snapshots.history.fork),
        ("POST", "/v1/processfork/checkout", snapshots.checkout),
        ("GET", "/v1/processfork/snapshots", snapshots.history.log),
        ("GET", "/v1/processfork/snapshots/{rev:path}", snapshots.history.show),
        ("GET", "/v1/processfork/lineage", snapshots.history.lineage),
        ("GET", "/v1/processfork/layout", snapshots.layout),
        ("GET", "/v1/processfork/stats", snapshots.stats),
        ("GET", "/v1/processfork/sequences", snapshots.sequences),
        ("DELETE", "/v1/processfork/sequences/{id:path}", snapshots.drop),
    ]
    app = application(table, more=_cartridge_routes(engine, served.offer, body_max))
    app.state.served, app.state.page = served, page
    add_description(app)
    return app


def _cartridge_routes(engine: AnyEngine, offer: Offer, body_max: int) -> list[Route]:
    library = offer.library
    if library is None:
        return []
    from kvist.server.cartridges import cartridge_routes  # needs a database's client, and other servers do not

    async def stats(_: Request) -> Response:
        return json_response({"ranks": [dataclasses.asdict(engine.cartridges.metrics())]})

    routes = cartridge_routes(lambda: library, body_max=body_max)
    return [Route("/v1/kvist/stats", guarded(stats), methods=["GET"]), *routes]
