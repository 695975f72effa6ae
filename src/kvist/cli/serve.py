"""``kvist serve``: an engine and a repository behind the HTTP server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.listening import Listening, listening_options
from kvist.cli.logs import Logs, log_options

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from kvist.cartridge.config import CartridgeConfig
    from kvist.engines.hf import Engine
    from kvist.server.offer import Offer


def _named(text: str) -> dict[str, str]:
    """``ID=PATH``."""
    cartridge_id, found, path = text.partition("=")
    if not (found and cartridge_id and path):
        raise click.BadParameter(f"expected ID=PATH, got {text!r:.200}")
    return {"cartridge_id": cartridge_id, "path": path}


def _configured(cartridges: list[dict[str, str]], registry: str | None, config: str | None) -> CartridgeConfig | None:
    """The options as one configuration; ``None`` where none is given."""
    try:
        extra = json.loads(config or "{}")
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--cartridge-config") from None
    if not isinstance(extra, dict):
        raise click.BadParameter("expected a JSON object", param_hint="--cartridge-config")
    given = {"cartridges": cartridges, "registry": registry}
    for name, value in given.items():
        if value and name in extra:
            raise click.BadParameter(f"has {name}, which an option gives too", param_hint="--cartridge-config")
    extra |= {name: value for name, value in given.items() if value}
    if not extra:
        return None
    from kvist.cartridge.config import CartridgeConfig

    return CartridgeConfig.from_extra(extra)


@contextlib.contextmanager
def _offering(engine: Engine, config: CartridgeConfig | None) -> Iterator[Offer | None]:
    """The cartridges that a configuration names, open; ``None`` without one."""
    if config is None:
        yield None
        return
    from kvist.server.offer import open_offer

    offer = open_offer(engine, config)
    try:
        yield offer
    finally:
        if offer.library is not None:
            offer.library.close()


@click.command(short_help="Serve a model with an OpenAI-compatible API.")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Model directory.")
@listening_options(port=8000)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--dtype", default=None, help="Of weights and cache: f32, bf16 or f16.  [default: as the model's files]")
@click.option("--pages", default=1024, show_default=True, type=click.IntRange(1), help="Pages in the engine's pool.")
@click.option("--page-size", default=16, show_default=True, type=click.IntRange(1), help="Tokens a page.")
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads; part of what decides the bits.")
@click.option("--served-model-name", default=None, help="What clients call the model.  [default: its layout's name]")
@click.option(
    "--layout-model",
    default=None,
    metavar="NAME",
    help="Model name recorded in snapshots; pages are refused under another.  [default: the directory's name]",
)
@click.option("--max-model-len", default=None, type=click.IntRange(1), help="Tokens a sequence may have.")
@click.option(
    "--cartridge",
    "cartridges",
    multiple=True,
    metavar="ID=PATH",
    callback=lambda _, __, given: [_named(text) for text in given],
    help="A cartridge that requests may begin with; where there is only one, those that name none use it. Repeatable.",
)
@click.option("--registry", default=None, metavar="URL", help="Registry of cartridges that come and go while it runs.")
@click.option(
    "--cartridge-config",
    default=None,
    metavar="JSON",
    help="More settings, with the keys of the connector's kv_connector_extra_config (router, prefix, unknown, …).",
)
@click.option(
    "--require-signature",
    "trusted",
    default=None,
    metavar="TRUSTED",
    envvar="KVIST_TRUSTED_KEYS",
    type=click.Path(path_type=Path),
    help="Check out only what one of these public keys signed (kvist sign); else KVIST_TRUSTED_KEYS.",
)
@click.option("--allow-write", is_flag=True, help="Let the page fork, tag and check out.")
@log_options
@common
def serve(
    run: Invocation,
    model: Path,
    listening: Listening,
    device: str,
    dtype: str | None,
    pages: int,
    page_size: int,
    threads: int | None,
    served_model_name: str | None,
    layout_model: str | None,
    max_model_len: int | None,
    cartridges: list[dict[str, str]],
    registry: str | None,
    cartridge_config: str | None,
    trusted: Path | None,
    allow_write: bool,
    logs: Logs,
) -> None:
    """Serve a model with an OpenAI-compatible API, and snapshot, fork and check out its KV cache.

    The repository is made if there is none. Prints one line on stderr when it is ready; / is a page to look at, and
    /metrics is for Prometheus. SIGTERM or Ctrl-C ends it.
    """
    # Imported here: torch alone takes seconds, and `kvist --help` must not wait for it.
    from kvist.repo import Repository
    from kvist.repo.signing import Trust
    from kvist.server import Tokenizer, create_app, url_of
    from kvist.server import serve as serve_app
    from kvist.server.seeing import Seeing
    from kvist.server.tenants import open_tenant
    from kvist.store import open_store
    from kvist.store.recorded import RecordedStore

    access = listening.access
    open_repository = partial(Repository.open, trust=None if trusted is None else Trust.load(trusted), tiers=run.tiers)
    offered = _configured(cartridges, registry, cartridge_config)  # before the model, which takes minutes to load
    logs.start()
    seeing = Seeing(may_write=allow_write)
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeing.recording())
        listener = stack.enter_context(listening.bind())
        store = RecordedStore(open_store(run.store_url))
        repo = stack.enter_context(open_repository(store, create=True))
        from kvist.engines.hf import Engine, HfPager, OwnedEngine, Owner, SamplingParams

        engine = Engine.load(
            model,
            device=device,
            dtype=dtype,
            pages=pages,
            page_size_tokens=page_size,
            threads=threads,
            name=layout_model,
            max_model_len=max_model_len,
        )
        tokenizer = Tokenizer.load(model)
        with engine, _offering(engine, offered) as offer, contextlib.ExitStack() as leases:

            def app_of(tenant: str | None, repo: Repository) -> Starlette:
                salt = repo.config.block_salt
                is_shared = access.tokens is not None or salt
                made = create_app(
                    OwnedEngine(engine, Owner(tenant, salt)) if is_shared else engine,
                    repo,
                    pager=HfPager,
                    params=SamplingParams,
                    tokenizer=tokenizer,
                    name=served_model_name,
                    offer=offer,
                    seeing=seeing if tenant is None else seeing.of_tenant(),
                )
                leases.callback(made.state.served.sessions.close)
                return made

            def app_of_tenant(name: str) -> Starlette:
                return app_of(name, stack.enter_context(open_tenant(store, name, open_repository)))

            default = app_of(None, repo)
            seeing.watch(default.state.page, repo, engine)
            app = seeing.guarded(default, app_of_tenant, access)

            def ready() -> None:
                name = default.state.served.name
                click.echo(f"kvist serving {name} at {url_of(listener)} (store {repo.store.url})", err=True)

            serve_app(app, listener, log_level=logs.level, ready=ready, end_streams=engine.close)
