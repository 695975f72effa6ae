"""The page alone, without an engine: what `kvist ui` serves. Puts the room together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from kvist.server.routing import Table, application, health, version
from kvist.server.ui.page import Page
from kvist.server.ui.views import View

if TYPE_CHECKING:
    from kvist.repo import Repository
    from kvist.server.seeing import Seeing


def create_ui(repo: Repository, seeing: Seeing, *, trace: Path | None = None) -> Starlette:
    """The application over one repository, which the caller closes.

    Args:
        repo: what is shown.
        seeing: what the process shows of itself.
        trace: whose hit curves are drawn.
    """
    page = Page(repo, flow=seeing.flow, trace=trace, may_write=seeing.may_write)
    table: Table = [
        ("GET", "/health", health),
        ("GET", "/version", version),
        ("GET", "/metrics", seeing.metrics.endpoint),
        *View(page).routes(),
    ]
    app = application(table)
    app.state.page = page
    return app
