"""``kvist quota``: what a repository may hold."""

from __future__ import annotations

from typing import Any

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Table
from kvist.cli.upkeep import size


@click.command(short_help="Tell or set what a repository may hold.")
@click.option("--bytes", "max_bytes", metavar="SIZE", type=size, help="Let it hold so much: 5000, 50GB, 512MiB.")
@click.option("--snapshots", "max_snapshots", type=click.IntRange(min=0), help="Let it hold so many snapshots.")
@click.option("--none", "is_lifted", is_flag=True, help="Lift both limits.")
@common
def quota(run: Invocation, max_bytes: int | None, max_snapshots: int | None, is_lifted: bool) -> None:
    """Tell or set what a repository may hold, and what it holds.

    Whoever opens it from then on is bound by it. A tenant's repository is the store's part below tenants/NAME. What is
    there stays; at the limit, deletes, gc, and the healing of damaged pages go on.
    """
    from dataclasses import replace

    from kvist.store.quota import Quota, measure

    given = {"max_bytes": max_bytes, "max_snapshots": max_snapshots}
    changes = {name: value for name, value in given.items() if value is not None}
    if is_lifted and changes:
        raise click.UsageError("choose --none or limits")
    with run.open() as repo:
        limits = repo.config.quota
        if is_lifted or changes:
            limits = Quota() if is_lifted else replace(limits, **changes)
            repo.set_quota(limits)
        use = measure(repo.store)
        document: dict[str, Any] = {
            "store": repo.store.url,
            "bytes": {"used": use.bytes, "limit": limits.max_bytes},
            "snapshots": {"used": use.snapshots, "limit": limits.max_snapshots},
        }
    rows = [
        ("bytes", f"{use.bytes:,}", _told(limits.max_bytes)),
        ("snapshots", f"{use.snapshots:,}", _told(limits.max_snapshots)),
    ]
    run.out.result(document, ids=[repo.id], text=[Table(("", "used", "limit"), rows)])


def _told(limit: int | None) -> str:
    return "none" if limit is None else f"{limit:,}"
