"""`kvist cartridge add`, `remove` and `list`: the registry, from which running servers take cartridges up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvist.cli.cartridge_options import with_labels
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Table
from kvist.cli.text import printable
from kvist.errors import AlreadyExists, UnknownCartridge

if TYPE_CHECKING:
    from kvist.cartridge.manifest import CartridgeManifest
    from kvist.cartridge.registry import Registration, Registry

_F = TypeVar("_F", bound=Callable[..., Any])


def with_registry(command: _F) -> _F:
    """Give a command the option ``--registry``."""
    return click.option(
        "--registry",
        metavar="URL",
        envvar="KVIST_REGISTRY",
        help="A path or a postgresql: url; else KVIST_REGISTRY, else in the user's data directory.",
    )(command)


@click.command()
@click.argument("cartridge", required=False)
@click.option("--revision", metavar="REV", help="Commit, branch or tag, of a repository on the hub.")
@click.option("--rev", metavar="REV", help="Instead of CARTRIDGE: a snapshot of the repository, as `commit` makes it.")
@click.option("--id", "cartridge_id", metavar="ID", help="By which requests name it; else as the manifest does.")
@with_labels("Give it a label, beside those of its manifest; may be repeated.")
@click.option("--replace", is_flag=True, help="Even if other content is registered by that id.")
@click.option("--no-verify", is_flag=True, help="Check headers only; of files that nobody else can write.")
@with_registry
@common
def add(
    run: Invocation,
    cartridge: str | None,
    revision: str | None,
    rev: str | None,
    cartridge_id: str | None,
    labels: dict[str, str],
    replace: bool,
    no_verify: bool,
    registry: str | None,
) -> None:
    """Register CARTRIDGE, a directory or a repository on the hub; running servers take it up.

    Its files stay where they are. Each byte is checked: a cartridge that holds something else than its manifest says
    could pass for another. What is registered already gets the new location and labels.
    """
    from kvist.cartridge.cartridge import Cartridge

    if (cartridge is None) == (rev is None):
        raise click.UsageError("name either CARTRIDGE or --rev REV")
    if revision is not None and rev is not None:
        raise click.UsageError("--revision goes with a repository on the hub, not with --rev")
    location, directory = _of_repository(run, rev) if rev is not None else _of_files(cartridge or "", revision)
    with Cartridge.from_pretrained(directory, verify=not no_verify) as opened:
        manifest = opened.manifest
    named = dataclasses.replace(
        manifest,
        cartridge_id=manifest.cartridge_id if cartridge_id is None else cartridge_id,
        labels={**manifest.labels, **labels},
    )
    with open_registry(registry) as database:
        _require_same_content(database, named, replace)
        made = database.register(named, location)
        where = database.name
    document = {"registry": where} | _to_json(made)
    run.out.result(document, ids=[made.cartridge_id], text=[f"{printable(made.cartridge_id)} is registered in {where}"])


def _require_same_content(database: Registry, manifest: CartridgeManifest, replace: bool) -> None:
    known = database.lookup(manifest.cartridge_id)
    if known is not None and known.manifest.identity != manifest.identity and not replace:
        raise AlreadyExists(
            f"cartridge {manifest.cartridge_id} is registered with the content {known.manifest.identity}, got "
            f"{manifest.identity}",
            hint="choose another --id, or --replace it: requests of running servers get the new one from then on",
        )


def _of_files(cartridge: str, revision: str | None) -> tuple[str, Path]:
    from kvist.cartridge.hub import resolve

    is_here = Path(cartridge).is_dir()
    if is_here and revision is not None:
        raise click.UsageError(f"--revision goes with a repository on the hub, and {cartridge} is a directory")
    directory = resolve(cartridge, revision=revision)
    if is_here:
        return str(directory.absolute()), directory
    return json.dumps({"hub": cartridge, "revision": directory.name}), directory  # the commit: a branch may move


def _of_repository(run: Invocation, rev: str) -> tuple[str, Path]:
    from kvist.cartridge.library import default_cache_dir, open_source

    with run.open() as repo:
        cid = repo.resolve(rev)  # a branch may move
    store = run.store_url if ":" in run.store_url else str(Path(run.store_url).absolute())
    source = {"store": store, "rev": cid}
    directory, _ = open_source(source, cache_dir=default_cache_dir(), model=None)
    return json.dumps(source), directory


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@with_registry
@common
def remove(run: Invocation, ids: tuple[str, ...], registry: str | None) -> None:
    """Take cartridges out of the registry. Their files stay, and so do requests that use them.

    If one of them is not there, none is taken out.
    """
    with open_registry(registry) as database:
        where, known = database.name, set(database.ids())
        for cartridge_id in ids:
            if cartridge_id not in known:
                raise UnknownCartridge(
                    f"no cartridge {cartridge_id!r:.120} is registered in {where}",
                    hint="to see them: kvist cartridge list",
                )
        gone = [cartridge_id for cartridge_id in dict.fromkeys(ids) if database.unregister(cartridge_id)]
    lines = [f"{printable(cartridge_id)} is taken out of {where}" for cartridge_id in gone]
    run.out.result({"registry": where, "removed": gone}, ids=gone, text=lines)


@click.command("list")
@with_labels("Only those that carry it; of several, all.")
@click.option("--model", metavar="ID", help="Only those made for the model of this id.")
@with_registry
@common
def list_(run: Invocation, labels: dict[str, str], model: str | None, registry: str | None) -> None:
    """List what is registered, in the order of registration: of those with a label, a router takes the first."""
    with open_registry(registry) as database:
        where = database.name
        readable = database.list_all()
        unreadable = sorted(set(database.ids()) - {one.cartridge_id for one in readable})
    found = [
        one
        for one in readable
        if labels.items() <= one.manifest.labels.items() and model in (None, one.manifest.model_id)
    ]
    rows = [
        (
            printable(one.cartridge_id),
            printable(one.manifest.model_id),
            one.manifest.num_tokens_raw,
            one.size,
            printable(", ".join(f"{key}={value}" for key, value in sorted(one.manifest.labels.items()))),
            printable(one.location) + ("" if _is_there(one.location) else " (missing)"),
        )
        for one in found
    ]
    run.out.result(
        {"registry": where, "cartridges": [_to_json(one) for one in found], "unreadable": unreadable},
        ids=(one.cartridge_id for one in found),
        text=[Table(("cartridge", "model", "tokens", "bytes", "labels", "location"), rows)] if rows else [],
    )


def open_registry(registry: str | None) -> Registry:
    """Open the registry that the option named, or the default one; the caller closes it."""
    from kvist.cartridge.registry import Registry

    if registry is not None:
        return Registry(registry)
    import platformdirs

    return Registry(platformdirs.user_data_path("kvist") / "cartridges.db")


def _is_there(location: str) -> bool:
    return location.startswith("{") or Path(location).is_dir()


def _to_json(one: Registration) -> dict[str, Any]:
    return {
        "id": one.cartridge_id,
        "identity": one.manifest.identity,
        "location": one.location,
        "missing": not _is_there(one.location),
        "model_id": one.manifest.model_id,
        "model_revision": one.manifest.model_revision,
        "tokens": one.manifest.num_tokens_raw,
        "bytes": one.size,
        "labels": dict(one.manifest.labels),
        "registered": one.registered_at.isoformat(),
    }
