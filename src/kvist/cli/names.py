"""`kvist fork`, `branch` and `tag`: commands that name snapshots. None reads or copies a page."""

from __future__ import annotations

from collections.abc import Iterable

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Styled, Table
from kvist.errors import NotFound
from kvist.ids import short
from kvist.repo import Ref, RefKind, Repository


@click.command()
@click.argument("rev")
@click.option("-n", "--count", "count", type=int, required=True, metavar="N", help="How many branches to make.")
@click.option("--name", help="Call them NAME/0, NAME/1, and so on.")
@common
def fork(run: Invocation, rev: str, count: int, name: str | None) -> None:
    """Make branches that continue a snapshot; copies nothing.

    Each of the N branches is at a new snapshot of its own, whose parent is REV and whose pages are those of REV.
    """
    with run.open() as repo:
        source = repo.resolve(rev)
        forks = repo.fork(source, count, name=name)
    document = {"source": source, "forks": [{"branch": made.name, "cid": made.cid} for made in forks]}
    rows = [(made.name or "", short(made.cid)) for made in forks]
    run.out.result(document, ids=(made.cid for made in forks), text=[Table(("branch", "snapshot"), rows)])


@click.command()
@click.argument("name", required=False)
@click.argument("rev", required=False)
@click.option("--move", is_flag=True, help="Point the branch NAME, if it exists, at REV.")
@click.option("--delete", metavar="NAME", help="Delete the branch NAME; its snapshots stay until a gc.")
@click.option("--mend", is_flag=True, help="Replace the unreadable record of NAME by one that names REV.")
@common
def branch(run: Invocation, name: str | None, rev: str | None, move: bool, delete: str | None, mend: bool) -> None:
    """List, make, move or delete branches.

    Without arguments, lists them; with NAME, tells what it names; with NAME and REV, makes it.
    """
    _require_sense(name, rev, delete, {"--move": move, "--mend": mend})
    if name is not None and rev is not None and not mend:
        with run.open() as repo:
            _tell(run, repo.branch(name, rev, move=move), "names")
        return
    _look_or_mend(run, RefKind.BRANCH, name, rev, delete)


@click.command()
@click.argument("name", required=False)
@click.argument("rev", required=False)
@click.option("--delete", metavar="NAME", help="Delete the tag NAME, for ever: nothing can be tagged so again.")
@click.option("--mend", is_flag=True, help="Replace the unreadable record of NAME by one that names REV.")
@common
def tag(run: Invocation, name: str | None, rev: str | None, delete: str | None, mend: bool) -> None:
    """List, make or delete tags.

    Without arguments, lists them; with NAME, tells what it names; with NAME and REV, makes it. A tag never moves.
    """
    _require_sense(name, rev, delete, {"--mend": mend})
    if name is not None and rev is not None and not mend:
        with run.open() as repo:
            _tell(run, repo.tag(name, rev), "names")
        return
    _look_or_mend(run, RefKind.TAG, name, rev, delete)


def _require_sense(name: str | None, rev: str | None, delete: str | None, acts: dict[str, bool]) -> None:
    chosen = [option for option, is_chosen in acts.items() if is_chosen]
    if delete is not None and (chosen or name is not None):
        raise click.UsageError("--delete NAME goes alone")
    if len(chosen) > 1:
        raise click.UsageError(f"choose one of {' and '.join(chosen)}")
    if chosen and rev is None:
        raise click.UsageError(f"{chosen[0]} wants NAME and REV")


def _look_or_mend(run: Invocation, kind: RefKind, name: str | None, rev: str | None, delete: str | None) -> None:
    with run.open() as repo:
        if delete is not None:
            _tell(run, repo.delete_ref(kind, delete), "is deleted; it named")
        elif name is None:
            _list(run, kind, repo.refs.all(kind))
        elif rev is None:
            _tell(run, _find(repo, kind, name), "names")
        else:
            _tell(run, repo.mend_ref(kind, name, rev), "is mended; it names")


def _find(repo: Repository, kind: RefKind, name: str) -> Ref:
    found = repo.refs.read(kind, name)
    if found is None:
        raise NotFound(f"there is no {kind.noun} {name}", hint=f"to make it: kvist {kind.noun} {name} REV")
    return found


def _list(run: Invocation, kind: RefKind, refs: Iterable[Ref]) -> None:
    found = list(refs)
    rows = [(ref.name, short(ref.cid or "")) for ref in found]
    run.out.result(
        {"refs": [_to_json(ref) for ref in found]},
        ids=(ref.name for ref in found),
        text=[Table((kind.noun, "snapshot"), rows)] if rows else [],
    )


def _tell(run: Invocation, ref: Ref, what: str) -> None:
    line = (f"{ref.kind.noun} {ref.name} {what} ", Styled(ref.cid or "", "yellow"))
    run.out.result(_to_json(ref), ids=[ref.name], text=[line])


def _to_json(ref: Ref) -> dict[str, str | None]:
    return {"kind": ref.kind.noun, "name": ref.name, "cid": ref.cid}
