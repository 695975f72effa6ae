"""`kvist convert`: a snapshot's tokens in pages of another layout, for another engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table
from kvist.cli.upkeep import listed
from kvist.ids import short
from kvist.pager import convert as converting
from kvist.pager.conversion import ConversionPlan, Converted


@click.command()
@click.argument("rev")
@click.option(
    "--to-layout",
    "file",
    type=click.File("rb"),
    metavar="FILE",
    help="The layout that is wanted, as the engine's GET /v1/processfork/layout answers; - reads it from stdin.",
)
@click.option("--like", metavar="REV", help="The layout that is wanted is that of this snapshot.")
@click.option("--as", "branch", metavar="BRANCH", help="Where it goes.  [default: converted/CID]")
@click.option("--dry-run", is_flag=True, help="Print what would be made, and make nothing.")
@common
def convert(
    run: Invocation, rev: str, file: IO[bytes] | None, like: str | None, branch: str | None, dry_run: bool
) -> None:
    """Make a snapshot whose pages fit another engine.

    It holds the keys and values of REV's sequences with other tokens a page, in another memory order or dealt out to
    another number of ranks: of one model, revision and dtype, with full attention. Another engine would have computed
    them a little differently, so what goes on from it is not bit-exact, and it says so. Its parent is REV.
    """
    if (file is None) == (like is None):
        raise click.UsageError("say one of --to-layout FILE and --like REV")
    with run.open() as repo:
        if like is not None:
            wanted = [manifest.layout for manifest in repo.manifests(like)]
        elif file is not None:
            wanted = converting.layouts_of(file.read(), "--to-layout")
        plan = converting.plan(repo, rev, wanted, branch=branch)
        if dry_run:
            _tell(run, plan, None)
            return
        with run.out.progress("pages", is_bytes=True) as progress:
            done = converting.apply(repo, plan, progress=progress)
    _tell(run, plan, done)


def _tell(run: Invocation, plan: ConversionPlan, done: Converted | None) -> None:
    def text() -> Iterator[Line | Table]:
        rows = [(name, str(before), str(after)) for name, (before, after) in plan.differences.items()]
        rows += [("pages", f"{len(plan.sources):,}", f"{len(plan.runs):,}")]
        yield Table(("", short(plan.source), "wanted"), rows)
        size = plan.layout.page_size_tokens
        yield from listed("sequence", [f"{seq.id}: {seq.cached_tokens(size):,} tokens" for seq in plan.sequences])
        if plan.left_out:
            yield f"{plan.left_out:,} pages are left out: no sequence names them"
        for name, texts in plan.lost.items():
            yield from (f"{name} does not keep: {text}" for text in texts)
        if done is None:
            yield f"would read {plan.read_bytes:,} bytes and make {plan.made_bytes:,}, on branch {plan.branch}"
        elif plan.mends:
            yield (Styled("mended", "green"), f" branch {plan.branch}: {done.new_bytes:,} bytes of its pages were gone")
        elif plan.existing is not None:
            yield ("nothing to convert: branch ", plan.branch, " is that already, ", Styled(short(done.cid), "yellow"))
        else:
            yield (Styled("converted", "green"), f" {plan.made_bytes:,} bytes, {done.new_bytes:,} of them new")
            yield (f"branch {plan.branch} names ", Styled(done.cid, "yellow"), ": not bit-exact")

    result: dict[str, object] = {"applied": done is not None}
    result |= {"cid": done.cid, "new_bytes": done.new_bytes} if done is not None else {"cid": None, "new_bytes": 0}
    run.out.result(plan.to_json() | result, ids=[done.cid] if done is not None else [], text=text())
