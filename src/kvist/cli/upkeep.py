"""`kvist init`, and what the commands about a repository as a whole share: kinds of values, plans, how they ask."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table
from kvist.errors import InvalidInput
from kvist.ids import ALGORITHMS
from kvist.repo import Repository

FINDINGS: Final = 3
"""Exit code of a check that went through and found something wrong."""
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LISTED_MAX: Final = 20
"""Most lines of one kind in a plan for people; JSON has them all."""


def duration(text: str) -> float:
    """Seconds, of a time as people write it; a type of options."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text)
    if found is None:
        raise click.BadParameter(f"expected a number and one of s, m, h, d, such as 1h, 30m or 0s; got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def size(text: str) -> int:
    """Bytes, of a size as people write it; a type of options."""
    from kvist.repo.tier.url import parse_size

    try:
        return parse_size(text)
    except InvalidInput as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.option(
    "--page-digest",
    type=click.Choice(ALGORITHMS),
    default="blake3",
    show_default=True,
    help="What names pages; sha256 for readers of the original format.",
)
@click.option("--salted", is_flag=True, help="Key its digests with a random salt, as those of tenants are.")
@common
def init(run: Invocation, page_digest: str, salted: bool) -> None:
    """Make an empty repository."""
    salt = secrets.token_hex(32) if salted else ""
    with Repository.init(run.store_url, page_digest=page_digest, salt=salt) as repo:
        document = identity(repo)
    line = ("made repository ", Styled(document["id"], "yellow"), f" in {document['store']}")
    run.out.result(document, ids=[document["id"]], text=[line])


def identity(repo: Repository) -> dict[str, Any]:
    """Which repository it is, for documents."""
    return {"store": repo.store.url, "id": repo.id, "page_digest": repo.page_digest}


def require_answer(run: Invocation, is_agreed: bool, what: str) -> None:
    """Refuse to begin what would have to ask where nobody can be asked."""
    if not (is_agreed or run.out.can_ask):
        raise click.UsageError(f"nobody is here to ask whether to {what}: say --yes, or --dry-run to see what")


def agree(run: Invocation, question: str, nothing: str, plan: Iterable[Line | Table]) -> None:
    """Show a plan and ask; without a yes, say that ``nothing`` was done, and end."""
    run.out.note(*plan)
    if not run.out.confirm(question):
        raise click.ClickException(nothing)


def listed(act: str, things: Sequence[str]) -> Iterator[Line]:
    """A line for each of some things to be done, or for the first of many."""
    yield from (f"{act} {thing}" for thing in things[:_LISTED_MAX])
    if len(things) > _LISTED_MAX:
        yield f"{act}: {len(things) - _LISTED_MAX:,} more, which --json lists"
