"""`kvist prune`: thins history by rules of retention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line
from kvist.cli.upkeep import agree, duration, listed, require_answer, size
from kvist.ids import short
from kvist.repo import prune as pruning

_COUNT: Final = click.IntRange(min=0)


@click.command()
@click.option("--branch", "branches", multiple=True, metavar="GLOB", help="Only these branches. Repeatable.")
@click.option("--keep-last", "last", type=_COUNT, default=0, metavar="N", help="Keep the newest N.")
@click.option("--keep-daily", "daily", type=_COUNT, default=0, metavar="N", help="Keep the newest of each of N days.")
@click.option("--keep-weekly", "weekly", type=_COUNT, default=0, metavar="N", help="Keep the newest of N weeks.")
@click.option("--keep-monthly", "monthly", type=_COUNT, default=0, metavar="N", help="Keep the newest of N months.")
@click.option("--keep-within", "within", type=duration, metavar="DURATION", help="Keep what is younger, such as 7d.")
@click.option(
    "--keep-label",
    "labels",
    multiple=True,
    metavar="GLOB",
    help="Keep those whose name or first line of the message matches. Repeatable.",
)
@click.option(
    "--max-bytes",
    type=size,
    metavar="SIZE",
    help="Prune from the oldest on until so many bytes of pages are left, such as 50GB; labels stay.",
)
@click.option(
    "--delete-stale",
    "stale",
    type=duration,
    metavar="DURATION",
    help="First delete the branches whose tip is older, such as 30d, and that have not moved since; wants --branch.",
)
@click.option("--dry-run", is_flag=True, help="Print what would go, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
def prune(
    run: Invocation,
    branches: tuple[str, ...],
    last: int,
    daily: int,
    weekly: int,
    monthly: int,
    within: float | None,
    labels: tuple[str, ...],
    max_bytes: int | None,
    stale: float | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Thin the history of branches.

    Of each branch is kept what any of the rules keeps. Tips, tagged snapshots, what another branch reaches and what a
    running server uses always are. A pruned snapshot keeps its place in the log; the next gc takes its pages.
    """
    require_answer(run, dry_run or yes, "prune")
    if stale is not None and not branches:
        raise click.UsageError("--delete-stale deletes branches: say which, such as --branch 'fork/*'")
    wanted = pruning.Rules(
        branches=branches or ("*",),
        last=last,
        daily=daily,
        weekly=weekly,
        monthly=monthly,
        within=within,
        labels=labels,
        max_bytes=max_bytes,
        stale=stale,
    )
    with run.open() as repo:
        plan = pruning.plan(repo, wanted)
        if dry_run:
            _tell(run, plan, applied=False)
            return
        if not (yes or plan.is_empty):
            agree(run, "Prune?", "nothing was pruned", _describe(plan))
        _tell(run, pruning.apply(repo, plan), applied=True)


def _tell(run: Invocation, plan: pruning.PrunePlan, *, applied: bool) -> None:
    def text() -> Iterator[Line]:
        if not applied:
            yield from _describe(plan)
        else:
            yield f"done: {plan.summary()}"

    ids = (*(name for name, _ in plan.branches), *plan.snapshots)
    run.out.result({"applied": applied} | plan.to_json(), ids=ids, text=text())


def _describe(plan: pruning.PrunePlan) -> Iterator[Line]:
    yield from listed("delete branch", [f"{name} at {short(cid)}" for name, cid in plan.branches])
    yield from listed("prune", [short(cid) for cid in plan.snapshots])
    yield plan.summary()
