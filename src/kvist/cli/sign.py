"""``kvist key``, ``sign`` and ``verify``: who vouches for a snapshot, and whether it is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled
from kvist.ids import short

_PATH = click.Path(path_type=Path, dir_okay=False)


@click.group(short_help="Make keys that sign snapshots.")
def key() -> None:
    """Make keys that sign snapshots."""


@key.command(short_help="Make a key.")
@click.argument("file", type=_PATH)
@click.option("--name", default="", help="Who it is, for people.")
@common
def new(run: Invocation, file: Path, name: str) -> None:
    """Make an Ed25519 key: the private one in FILE, for its owner alone, the public one, a line, in FILE.pub.

    If KVIST_KEY_PASSPHRASE is set, the private key is encrypted with it. A file of public keys, one a line, says whom
    to trust.
    """
    from kvist.errors import AlreadyExists
    from kvist.repo.signing import PrivateKey, PublicKey

    if "\n" in name or not name.isprintable():
        raise click.BadParameter("expected one line of text", param_hint="--name")
    public_file = file.with_name(file.name + ".pub")
    if public_file.exists():
        raise AlreadyExists(f"{public_file} exists; a key is never replaced")
    made = PrivateKey.new(name)
    line = PublicKey.parse(made.public.encode()).encode()
    made.save(file)
    public_file.write_text(line + "\n")
    document = {"id": made.public.id, "private": str(file), "public": str(public_file), "line": line}
    run.out.result(
        document, ids=[made.public.id], text=[("made key ", Styled(made.public.id[:16], "yellow"), f" in {file}"), line]
    )


@click.command(short_help="Sign a snapshot.")
@click.argument("rev")
@click.option("--key", "file", type=_PATH, required=True, help="The private key.")
@common
def sign(run: Invocation, rev: str, file: Path) -> None:
    """Sign a snapshot: vouch for every byte that a checkout of it brings into an engine.

    A passphrase is read from KVIST_KEY_PASSPHRASE. Signing twice changes nothing.
    """
    from kvist.repo import signing

    private = signing.PrivateKey.load(file)
    with run.open() as repo:
        cid = repo.resolve(rev)
        signing.sign(repo.store, cid, private)
    document = {"cid": cid, "key": private.public.id}
    line = ("signed ", Styled(short(cid), "yellow"), f" with key {private.public.id[:16]}")
    run.out.result(document, ids=[cid], text=[line])


@click.command(short_help="Check one snapshot: its signature and its pages.")
@click.argument("rev")
@click.option(
    "--trusted",
    type=_PATH,
    envvar="KVIST_TRUSTED_KEYS",
    help="Public keys, one of which must have signed it; else KVIST_TRUSTED_KEYS.",
)
@click.option("--quick", is_flag=True, help="Do not read its pages.")
@common
def verify(run: Invocation, rev: str, trusted: Path | None, quick: bool) -> None:
    """Check one snapshot: its signature, where keys are given, and every page that it names.

    Exits with 13 if no trusted key signed it, with 20 if a page is missing or damaged.
    """
    from kvist.repo.signing import Trust, signers

    trust = None if trusted is None else Trust.load(trusted)
    with run.open() as repo, run.out.progress("reading pages") as progress:
        cid = repo.resolve(rev)
        signed = None if trust is None else trust.require(repo.store, cid)
        pages = list(dict.fromkeys(name for manifest in repo.manifests(cid) for name in manifest.digests))
        bad = [] if quick else repo.pages.verify(pages, progress)
        if bad:
            raise repo.pages.absent(bad[0])
        claimed = signers(repo.store, cid)
    document: dict[str, Any] = {
        "cid": cid,
        "signed_by": None if signed is None else {"key": signed.id, "name": signed.name},
        "signatures": claimed,
        "page_halves": None if quick else len(pages),
    }

    def text() -> Iterator[Line]:
        yield ("snapshot ", Styled(short(cid), "yellow"))
        if signed is not None:
            yield f"signed by {signed.name or 'a trusted key'} ({signed.id[:16]})"
        else:
            yield f"{len(claimed)} signatures, not checked: --trusted says whose count"
        yield "pages were not read" if quick else f"all {len(pages):,} page halves are whole"

    run.out.result(document, ids=[cid], text=text())
