"""``kvist token``: who may call a server. Edits one file; knows no repository."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Table

_SCOPES: Final = ("read", "write", "admin")
_UNITS: Final = {"h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}

_file = click.option(
    "--tokens",
    "path",
    required=True,
    envvar="KVIST_TOKENS",
    type=click.Path(path_type=Path),
    help="The tokens file; else KVIST_TOKENS.",
)


def _duration(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """Seconds since the epoch, so far from now."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})([hdwy])", text)
    if found is None:
        raise click.BadParameter(f"expected a number and h, d, w or y, got {text!r:.80}")
    return int(time.time()) + int(found[1]) * _UNITS[found[2]]


@click.group(short_help="Say who may call a server.")
def token() -> None:
    """Say who may call a server, how far, and for which tenant.

    The file holds digests of tokens: a token is told once, when it is made. A server that runs sees every change.
    """


@token.command(short_help="Make a token; it is printed once.")
@click.argument("id")
@click.option("--scope", type=click.Choice(_SCOPES), default="write", show_default=True, help="How far it reaches.")
@click.option("--tenant", metavar="NAME", help="Let it reach this tenant's repository only.")
@click.option("--expires", metavar="TIME", callback=_duration, help="Let it end so long from now: 12h, 90d, 8w, 1y.")
@click.option("--note", default="", help="For people.")
@_file
@common
def add(run: Invocation, id: str, scope: str, tenant: str | None, expires: int | None, note: str, path: Path) -> None:
    """Make a token called ID; it is printed once, and cannot be found out again.

    \b
    read   looks: models, history, sequences
    write  also computes, snapshots, forks, checks out
    admin  also registers cartridges
    """
    from kvist.server.tokens import Scope, add_token

    text = add_token(path, id, Scope.parse(scope), tenant=tenant, expires=expires, note=note)
    document = {"id": id, "token": text, "scope": scope, "tenant": tenant, "expires": expires, "file": str(path)}
    run.out.note("this is told once; keep it where you keep passwords")
    run.out.result(document, ids=[text], text=[text])


@token.command("list", short_help="List the tokens, not their text.")
@_file
@common
def list_(run: Invocation, path: Path) -> None:
    """List the tokens, not their text, which the file does not hold."""
    from kvist.server.tokens import read_tokens

    found = read_tokens(path)
    listed: list[dict[str, Any]] = [
        {"id": one.id, "scope": one.scope, "tenant": one.tenant, "expires": one.expires, "note": one.note}
        for one in found
    ]

    def text() -> Iterator[Line | Table]:
        rows = [(one.id, one.scope, one.tenant or "", _when(one.expires), one.note) for one in found]
        yield Table(("token", "scope", "tenant", "expires", "note"), rows)

    if not found:
        run.out.note(f"no tokens in {path}")
    run.out.result({"file": str(path), "tokens": listed}, ids=[one.id for one in found], text=text() if found else [])


@token.command(short_help="Let a token count no more.")
@click.argument("id")
@_file
@common
def remove(run: Invocation, id: str, path: Path) -> None:
    """Let the token called ID count no more, from now on and in servers that run."""
    from kvist.server.tokens import remove_token

    remove_token(path, id)
    run.out.result({"removed": id, "file": str(path)}, ids=[id], text=[f"removed token {id} from {path}"])


def _when(expires: int | None) -> str:
    if expires is None:
        return "never"
    told = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%d %H:%M")
    return f"{told} (expired)" if expires <= time.time() else told
