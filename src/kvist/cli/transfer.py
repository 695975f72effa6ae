"""`kvist push`, `pull` and `clone`: snapshots from one repository to another, with all that they reach."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final, TypeVar

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table
from kvist.errors import AlreadyExists, RepositoryNotFound
from kvist.ids import short
from kvist.repo import Repository, transfer
from kvist.repo.config import CONFIG
from kvist.repo.transfer import Act, TransferPlan, Transferred
from kvist.store import MemoryStore, open_store

REMOTE: Final = "KVIST_REMOTE"
"""Environment variable with the url that `push` and `pull` use when none is typed."""

_PLACE: Final = re.compile(r"[a-z][a-z0-9+.-]*://|(file|memory|oci):|/|\.\.?(/|$)", re.IGNORECASE)
_LISTED_MAX: Final = 40
_F = TypeVar("_F", bound=Callable[..., Any])


def _chosen(command: _F) -> _F:
    """Give a command the options of every transfer."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Print what would be moved, and move nothing."),
        click.option(
            "--heal",
            is_flag=True,
            help="Check all that the receiving side holds of it; move anew what is missing or damaged there.",
        ),
        click.option("--force", is_flag=True, help="Move branches also to what does not continue them. Not tags."),
        click.option("--all", "everything", is_flag=True, help="All branches and tags."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("words", nargs=-1, metavar="[TARGET] [REV]...")
@_chosen
@common
def push(run: Invocation, words: tuple[str, ...], everything: bool, force: bool, heal: bool, dry_run: bool) -> None:
    """Send branches and tags to another repository.

    TARGET is a url, or a path that begins with / or a dot; else KVIST_REMOTE. A repository is made there if there is
    none. REV is a branch or a tag, or REV:NAME for the branch NAME there. Only what is missing moves. Run it again to
    go on after an interruption.
    """
    place, revs = _sort(words)
    how = {"everything": everything, "force": force, "heal": heal}
    _require_revs(revs, everything)
    with run.open() as here, open_store(place) as store:
        try:
            there = Repository.open(store)
        except RepositoryNotFound:
            _make(run, here, store.url, revs, dry_run=dry_run, **how)
            return
        with there:
            _move(run, here, there, transfer.plan(here, there, revs, **how), dry_run=dry_run)


@click.command()
@click.argument("words", nargs=-1, metavar="[SOURCE] [REV]...")
@_chosen
@common
def pull(run: Invocation, words: tuple[str, ...], everything: bool, force: bool, heal: bool, dry_run: bool) -> None:
    """Fetch branches and tags from another repository.

    SOURCE is a url, or a path that begins with / or a dot; else KVIST_REMOTE. REV is a branch or a tag there, or
    REV:NAME for the branch NAME here. Only what is missing moves, and what is known to be damaged here. Run it again to
    go on after an interruption.
    """
    place, revs = _sort(words)
    _require_revs(revs, everything)
    with run.open() as here, Repository.open(place) as there:
        plan = transfer.plan(there, here, revs, everything=everything, force=force, heal=heal)
        _move(run, there, here, plan, dry_run=dry_run)


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option("--dry-run", is_flag=True, help="Print what would be moved, and move nothing.")
@common
def clone(run: Invocation, source: str, dry_run: bool) -> None:
    """Make a copy of another repository.

    It is made at --store, where there must be none, and names pages as SOURCE does. It holds all that a branch or tag
    reaches. To go on after an interruption: kvist pull SOURCE --all.
    """
    with Repository.open(source) as there:
        _make(run, there, run.store_url, (), dry_run=dry_run, everything=True)


def _sort(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The other repository's place, typed or from the environment, and the revs."""
    if words and _PLACE.match(words[0]):
        return words[0], words[1:]
    place = os.environ.get(REMOTE)
    if not place:
        what = f"{words[0]!r} is neither a url nor begins with / or a dot" if words else "none was given"
        raise click.UsageError(f"expected the url or path of the other repository, or {REMOTE}: {what}")
    return place, words


def _require_revs(revs: tuple[str, ...], everything: bool) -> None:
    if bool(revs) == everything:
        raise click.UsageError("say which branches and tags, or --all")


def _make(run: Invocation, source: Repository, url: str, revs: tuple[str, ...], *, dry_run: bool, **how: bool) -> None:
    """Plan for an empty repository, and make it only once there is a plan."""
    with open_store(url) as store:
        if store.head(CONFIG) is not None:
            raise AlreadyExists(
                f"{store.url} already holds a kvist repository", hint=f"kvist pull {source.store.url} --all"
            )
        with transfer.init_like(source, MemoryStore()) as empty:
            plan = replace(transfer.plan(source, empty, revs, **how), target=store.url)
        if dry_run:
            _tell(run, plan, None, is_new=True)
            return
        with transfer.init_like(source, store) as target:
            _move(run, source, target, plan, dry_run=False, is_new=True)


def _move(
    run: Invocation,
    source: Repository,
    target: Repository,
    plan: TransferPlan,
    *,
    dry_run: bool,
    is_new: bool = False,
) -> None:
    if dry_run:
        _tell(run, plan, None, is_new=is_new)
        return
    with run.out.progress("pages", is_bytes=True) as progress:
        done = transfer.apply(source, target, plan, progress=progress)
    _tell(run, plan, done, is_new=is_new)


def _tell(run: Invocation, plan: TransferPlan, done: Transferred | None, *, is_new: bool) -> None:
    def text() -> Iterator[Line | Table]:
        if is_new:
            yield ("made repository " if done is not None else "would make a repository ", f"at {plan.target}")
        if plan.is_empty:
            yield "nothing to move: it is all there"
            return
        moved = [move for move in plan.moves if move.act is not Act.KEEP]
        rows = [(str(move.act), f"{move.kind.noun} {move.name}", short(move.cid)) for move in moved[:_LISTED_MAX]]
        if rows:
            yield Table(("", "", ""), rows)
        if len(moved) > _LISTED_MAX:
            yield f"{len(moved) - _LISTED_MAX:,} refs more, which --json lists"
        if done is None:
            yield f"would move {plan.summary()}"
        else:
            yield (Styled("moved", "green"), f" {plan.summary()}")

    document = {"applied": done is not None, "made": is_new} | plan.to_json()
    run.out.result(
        document | (done.to_json() if done is not None else {}), ids=(move.cid for move in plan.moves), text=text()
    )
