"""``kvist ui``: a repository in the browser, without an engine."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.listening import Listening, listening_options
from kvist.cli.logs import Logs, log_options

if TYPE_CHECKING:
    from starlette.applications import Starlette


@click.command(short_help="Show a repository in the browser.")
@listening_options(port=8080, who="Who may look")
@click.option("--allow-write", is_flag=True, help="Let the page fork and tag.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A trace (kvist sim), whose hit curves are drawn.",
)
@log_options
@common
def ui(
    run: Invocation,
    listening: Listening,
    allow_write: bool,
    trace: Path | None,
    logs: Logs,
) -> None:
    """Show a repository in the browser: lineage, space, tiers, hit curves; and metrics at /metrics.

    Needs no engine, and changes nothing unless --allow-write is given. Prints one line on stderr when it is ready.
    SIGTERM or Ctrl-C ends it.
    """
    from kvist.repo import Repository
    from kvist.server import serve as serve_app
    from kvist.server import url_of
    from kvist.server.seeing import Seeing
    from kvist.server.tenants import open_tenant
    from kvist.server.ui.app import create_ui
    from kvist.store import open_store
    from kvist.store.recorded import RecordedStore
    from kvist.store.wrap import ReadOnlyStore

    access = listening.access
    logs.start()
    open_repository = partial(Repository.open, tiers=run.tiers)
    seeing = Seeing(may_write=allow_write)
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeing.recording())
        listener = stack.enter_context(listening.bind())
        below = RecordedStore(open_store(run.store_url))
        store = below if allow_write else ReadOnlyStore(below)
        repo = stack.enter_context(open_repository(store))
        default = create_ui(repo, seeing, trace=trace)
        seeing.watch(default.state.page, repo)

        def app_of_tenant(name: str) -> Starlette:
            return create_ui(stack.enter_context(open_tenant(store, name, open_repository)), seeing.of_tenant())

        app = seeing.guarded(default, app_of_tenant, access)

        def ready() -> None:
            click.echo(f"kvist ui at {url_of(listener)} (store {repo.store.url})", err=True)

        serve_app(app, listener, log_level=logs.level, ready=ready, end_streams=lambda: None)
