"""`kvist gc`: deletes what nothing needs."""

from __future__ import annotations

from collections.abc import Iterator

import click

from kvist.cli.fsck import cursor_path
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line
from kvist.cli.upkeep import agree, duration, listed, require_answer
from kvist.ids import short
from kvist.repo import gc as collecting
from kvist.repo.scan import Cursor, mark_known


@click.command()
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--min-age",
    type=duration,
    default="1h",
    show_default=True,
    metavar="DURATION",
    help="Keep whatever was written less long ago: 1h, 30m, 0s.",
)
@click.option("--break-lock", is_flag=True, help="Go on though another gc, surely dead, holds the lock.")
@common
def gc(run: Invocation, dry_run: bool, yes: bool, min_age: float, break_lock: bool) -> None:
    """Delete what no branch or tag reaches.

    And no lease, by which running servers and transfers hold what they use; and what was pruned. Snapshots first, then
    manifests, then segments without a page that is needed; segments with few are written anew. Refuses while something
    that a branch or tag reaches is missing, or known as damaged: by a read, by repair, or by the last fsck on this
    machine. Others may write meanwhile, if no capture takes longer than the minimum age.
    """
    require_answer(run, dry_run or yes, "delete")
    with run.open() as repo:
        mark_known(repo, Cursor.load(cursor_path(repo)))
        plan = collecting.plan(repo, min_age=min_age)
        if dry_run:
            _tell(run, plan, applied=False)
            return
        if not (yes or plan.is_empty):
            agree(run, "Delete?", "nothing was deleted", _describe(plan))
        with run.out.progress("copying pages") as progress:
            # also for an empty plan: it clears what crashed writers and a dead gc left
            done = collecting.apply(repo, plan, break_lock=break_lock, progress=progress)
        _tell(run, done, applied=True)


def _tell(run: Invocation, plan: collecting.GcPlan, *, applied: bool) -> None:
    def text() -> Iterator[Line]:
        if not applied:
            yield from _describe(plan)
        elif plan.is_empty:
            yield "nothing to delete"
        else:
            yield f"done: {plan.summary()}"

    ids = (*plan.snapshots, *plan.manifests, *plan.segments, *plan.repack)
    run.out.result({"applied": applied} | plan.to_json(), ids=ids, text=text())


def _describe(plan: collecting.GcPlan) -> Iterator[Line]:
    if plan.is_empty:
        yield "nothing to delete"
        return
    for act, things in (
        ("delete snapshot", [short(cid) for cid in plan.snapshots]),
        ("delete manifest", [short(cid) for cid in plan.manifests]),
        ("delete", plan.segments),
        ("rewrite", plan.repack),
    ):
        yield from listed(act, things)
    yield plan.summary()
