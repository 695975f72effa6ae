"""`kvist fsck` and `repair`: what is wrong with a repository, and what can be done about it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table
from kvist.cli.upkeep import FINDINGS, agree, duration, listed, require_answer
from kvist.ids import short
from kvist.repo import Repository, mending
from kvist.repo import fsck as checking
from kvist.repo import repair as repairing
from kvist.repo.repair import Act, RepairPlan, Step
from kvist.repo.scan import Cursor

# -- fsck --------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--quick", is_flag=True, help="Look pages up only; do not read and hash them.")
@click.option(
    "--max-duration",
    type=duration,
    metavar="DURATION",
    help="Stop reading after so long, such as 10m; the next check with this option goes on there.",
)
@click.pass_context
@common
def fsck(run: Invocation, context: click.Context, quick: bool, max_duration: float | None) -> None:
    """Check that every snapshot is there and whole.

    Looks at everything that a branch or tag reaches, reads every copy of every page, and changes nothing. Exits with 3
    if anything is wrong.
    """
    if quick and max_duration is not None:
        raise click.UsageError("--quick reads no pages: it goes without --max-duration")
    with run.open() as repo, run.out.progress("reading pages", is_bytes=True) as progress:
        cursor = Cursor.load(cursor_path(repo)) if max_duration is not None else Cursor(cursor_path(repo))
        report = checking.check(repo, read_pages=not quick, cursor=cursor, max_duration=max_duration, progress=progress)

    def text() -> Iterator[Line | Table]:
        yield from _findings(report.findings)
        if report.findings:
            yield ""
        yield _summary(report)

    run.out.result(report.to_json(), ids=(one.subject for one in report.findings), text=text())
    context.exit(0 if report.is_clean else FINDINGS)


def cursor_path(repo: Repository) -> Path:
    """Where this machine remembers how far checks of this repository, at this place, have come, and what they found."""
    import platformdirs

    place = hashlib.sha256(repo.store.url.encode()).hexdigest()[:12]
    return platformdirs.user_cache_path("kvist") / "fsck" / f"{repo.id}-{place}.json"


def _findings(findings: Iterable[checking.Finding]) -> Iterator[Table]:
    titles = ("finding", "subject", "snapshots hurt", "detail", "mend")
    rows = [(str(one.code), one.subject, len(one.affects), one.detail, one.mend) for one in findings]
    if rows:
        yield Table(titles, rows)


def _summary(report: checking.FsckReport) -> Line:
    found = "1 finding" if len(report.findings) == 1 else f"{len(report.findings):,} findings"
    state = Styled("clean", "green") if report.is_clean else Styled(found, "red")
    known = f": {report.snapshots:,} snapshots with {report.pages:,} page halves checked"
    if not report.read_pages:
        return (state, known, ", pages looked up only")
    speed = f" ({report.bytes_read / report.seconds / 1e6:,.0f} MB/s)" if report.bytes_read and report.seconds else ""
    if report.complete:
        return (state, known, f", {report.bytes_done:,} bytes of pages read{speed}")
    part = report.bytes_done / report.bytes_all
    return (state, known, f" so far: {part:.0%} of {report.bytes_all:,} bytes read{speed}; run it again to go on")


# -- repair ------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--from", "source", metavar="URL", help="Another repository, to fetch from what is missing or damaged.")
@click.option("--rewind", is_flag=True, help="Let a branch that cannot be mended go back to its newest whole ancestor.")
@click.option("--quick", is_flag=True, help="Mend only what is known already; read no pages to find more.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@common
def repair(
    run: Invocation, context: click.Context, source: str | None, rewind: bool, quick: bool, dry_run: bool, yes: bool
) -> None:
    """Mend what fsck finds, as far as it can be mended.

    Marks damaged pages, so that the next put heals them; saves pages out of broken segments; deletes what is unreadable
    and protects nothing. Never deletes the only copy of anything. Exits with 3 if something is left.
    """
    require_answer(run, dry_run or yes, "repair")
    with contextlib.ExitStack() as stack:
        repo = stack.enter_context(run.open())
        other = stack.enter_context(Repository.open(source)) if source is not None else None
        with run.out.progress("reading pages", is_bytes=True) as progress:
            plan = repairing.plan(repo, source=other, rewind=rewind, read_pages=not quick, progress=progress)
        if dry_run:
            run.out.result({"applied": False} | plan.to_json(), ids=_subjects(plan.steps), text=_describe(plan))
            context.exit(FINDINGS if plan.findings else 0)
        if not (yes or plan.is_empty):
            agree(run, "Repair?", "nothing was changed", _describe(plan))
        with run.out.progress("writing pages", is_bytes=True) as progress:
            done = mending.apply(repo, plan, source=other, progress=progress)
        run.out.result({"applied": True} | done.to_json(), ids=_subjects(done.done), text=_tell(done))
        context.exit(FINDINGS if done.failed or done.left else 0)


def _subjects(steps: Iterable[Step]) -> Iterator[str]:
    return (step.subject for step in steps)


def _describe(plan: RepairPlan) -> Iterator[Line | Table]:
    if plan.is_empty:
        yield "nothing to repair" if not plan.findings else "nothing that can be repaired"
    for act in Act:
        yield from listed(act.value.replace("_", " "), [_line(step) for step in plan.steps if step.act is act])
    if plan.left:
        yield ""
        yield f"{len(plan.left):,} of {len(plan.findings):,} findings stay:"
        yield from _findings(plan.left)
    if plan.candidates:
        yield ""
        yield "what a ref that nobody can follow may have named: kvist branch --mend (or --move) NAME CID"
        yield from listed("perhaps", plan.candidates)


def _line(step: Step) -> str:
    if step.act is Act.REWIND:
        return f"{step.subject} to {short(step.where)}: {step.why}"
    return f"{step.subject}{f' in {step.where}' if step.where else ''}: {step.why}"


def _tell(done: mending.Repaired) -> Iterator[Line | Table]:
    yield f"{len(done.done):,} steps done" if done.done else "nothing to repair"
    for step, reason in done.failed:
        yield (Styled("failed: ", "red"), f"{step.act.value.replace('_', ' ')} {step.subject}: {reason}")
    if done.left:
        yield ""
        yield from _findings(done.left)
