"""`kvist init`, `stats`, `fsck` and `gc`: commands about a repository as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table
from kvist.ids import ALGORITHMS, short
from kvist.repo import Repository, compare
from kvist.repo import fsck as checking
from kvist.repo import gc as collecting

FINDINGS: Final = 3
"""Exit code of a check that went through and found something wrong."""
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LISTED_MAX: Final = 20
"""Most lines of one kind in a plan for people; JSON has them all."""


@click.command()
@click.option(
    "--page-digest",
    type=click.Choice(ALGORITHMS),
    default="blake3",
    show_default=True,
    help="What names pages; sha256 for readers of the original format.",
)
@common
def init(run: Invocation, page_digest: str) -> None:
    """Make an empty repository."""
    with Repository.init(run.store_url, page_digest=page_digest) as repo:
        document = _identity(repo)
    line = ("made repository ", Styled(document["id"], "yellow"), f" in {document['store']}")
    run.out.result(document, ids=[document["id"]], text=[line])


@click.command()
@common
def stats(run: Invocation) -> None:
    """Count what the repository holds."""
    with run.open() as repo:
        identity = _identity(repo)
        found = compare.stats(repo)
    numbers = [(field.name.replace("_", " "), f"{getattr(found, field.name):,}") for field in fields(found)]
    width = max(len(number) for _, number in numbers)
    rows = [(name.replace("_", " "), value) for name, value in identity.items()]
    rows += [(name, number.rjust(width)) for name, number in [*numbers, ("dedup", f"{found.dedup:.2f}x")]]
    run.out.result(identity | found.to_json(), ids=[identity["id"]], text=[Table(("", ""), rows)])


def _identity(repo: Repository) -> dict[str, Any]:
    return {"store": repo.store.url, "id": repo.id, "page_digest": repo.page_digest}


# -- fsck --------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--quick", is_flag=True, help="Look pages up only; do not read and hash them.")
@click.pass_context
@common
def fsck(run: Invocation, context: click.Context, quick: bool) -> None:
    """Check that every snapshot is there and whole.

    Reads everything that a branch or tag reaches and changes nothing. Exits with 3 if anything is wrong.
    """
    with run.open() as repo, run.out.progress("reading pages") as progress:
        report = checking.check(repo, read_pages=not quick, progress=progress)

    def text() -> Iterator[Line | Table]:
        if report.findings:
            titles = ("finding", "subject", "snapshots hurt", "detail", "mend")
            rows = [(str(one.code), one.subject, len(one.affects), one.detail, one.mend) for one in report.findings]
            yield Table(titles, rows)
            yield ""
        how = "looked up" if quick else "read"
        found = "1 finding" if len(report.findings) == 1 else f"{len(report.findings):,} findings"
        state = Styled("clean", "green") if report.is_clean else Styled(found, "red")
        yield (state, f": {report.snapshots:,} snapshots checked, {report.pages:,} page halves {how}")

    run.out.result(report.to_json(), ids=(one.subject for one in report.findings), text=text())
    context.exit(0 if report.is_clean else FINDINGS)


# -- gc ----------------------------------------------------------------------------------------------------------


def _seconds(context: click.Context, param: click.Parameter, value: str) -> float:
    """Read a time as people write it."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", value)
    if found is None:
        raise click.BadParameter(
            f"expected a number and one of s, m, h, d, such as 1h, 30m or 0s; got {value!r}", context, param
        )
    return float(found[1]) * _UNITS[found[2]]


@click.command()
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--min-age",
    callback=_seconds,
    default="1h",
    show_default=True,
    metavar="DURATION",
    help="Keep whatever was written less long ago: 1h, 30m, 0s.",
)
@click.option("--break-lock", is_flag=True, help="Go on though another gc, surely dead, holds the lock.")
@common
def gc(run: Invocation, dry_run: bool, yes: bool, min_age: float, break_lock: bool) -> None:
    """Delete what no branch or tag reaches.

    Snapshots first, then manifests, then segments without a page that is needed; segments with few are written anew.
    Refuses while fsck finds something missing. Others may write meanwhile, if no capture takes longer than the
    minimum age.
    """
    if not (dry_run or yes or run.out.can_ask):
        raise click.UsageError("nobody is here to ask whether to delete: say --yes, or --dry-run to see what")
    with run.open() as repo:
        plan = collecting.plan(repo, min_age=min_age)
        if dry_run:
            _tell(run, plan, applied=False)
            return
        if not (yes or plan.is_empty):
            run.out.note(*_describe(plan))
            if not run.out.confirm("Delete?"):
                raise click.ClickException("nothing was deleted")
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
        yield from (f"{act} {thing}" for thing in things[:_LISTED_MAX])
        if len(things) > _LISTED_MAX:
            yield f"{act}: {len(things) - _LISTED_MAX:,} more, which --json lists"
    yield plan.summary()
