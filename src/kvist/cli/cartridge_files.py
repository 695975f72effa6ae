"""`kvist cartridge show`, `verify`, `commit` and `export`: cartridges as files, and as snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvist.cli.cartridge_options import with_labels
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table

if TYPE_CHECKING:
    from kvist.cartridge.manifest import CartridgeManifest

_F = TypeVar("_F", bound=Callable[..., Any])


def _revision(command: _F) -> _F:
    return click.option("--revision", metavar="REV", help="Commit, branch or tag, of a repository on the hub.")(command)


def _model(what: str) -> Callable[[_F], _F]:
    kind = click.Path(path_type=Path, exists=True, file_okay=False)
    return click.option("--model", type=kind, metavar="DIR", help=what)


@click.command()
@click.argument("cartridge")
@_revision
@common
def show(run: Invocation, cartridge: str, revision: str | None) -> None:
    """Describe CARTRIDGE, a directory or a repository on the hub.

    What its manifest says; the files are not read. `kvist cartridge verify` reads them.
    """
    from kvist.cartridge.hub import resolve
    from kvist.cartridge.manifest_file import read_manifest

    directory = resolve(cartridge, revision=revision)
    manifest = read_manifest(directory)
    document = {"directory": str(directory), "identity": manifest.identity} | manifest.to_dict()
    run.out.result(document, ids=[manifest.cartridge_id], text=_describe(manifest, directory))


def _describe(manifest: CartridgeManifest, directory: Path) -> Iterator[Line | Table]:
    frozen = f", the first {manifest.num_frozen_tokens:,} frozen" if manifest.num_frozen_tokens else ""
    rope = ", ".join(f"{name} {value}" for name, value in manifest.rope.items())
    facts = [
        ("cartridge", manifest.cartridge_id),
        ("identity", manifest.identity),
        ("directory", str(directory)),
        ("tokens", f"{manifest.num_tokens_raw:,}{frozen}, from position {manifest.first_position:,}"),
        ("made", f"{manifest.created_at}, {manifest.origin}"),
        ("model", manifest.model_id),
        ("revision", manifest.model_revision or "unknown"),
        ("layers", f"{manifest.num_layers} x {manifest.num_kv_heads} KV heads x {manifest.head_dim}, {manifest.dtype}"),
        ("positions", rope or "unknown"),
        ("document", manifest.source_document or "unknown"),
        ("token ids", "known: it is the prefill of exactly these" if manifest.has_token_ids else "not held"),
        ("license", manifest.license or "unknown"),
    ]
    facts += [(f"label {key}", value) for key, value in sorted(manifest.labels.items())]
    yield Table(("", ""), facts)
    yield ""
    yield Table(("file", "bytes", "sha256"), [(entry.name, entry.size, entry.sha256) for entry in manifest.files])


@click.command()
@click.argument("cartridge")
@_revision
@_model("Also check that it is for this model.")
@common
def verify(run: Invocation, cartridge: str, revision: str | None, model: Path | None) -> None:
    """Check every byte of CARTRIDGE, a directory or a repository on the hub.

    The digests of its files and of its content, what they hold against what the manifest says, and that all of it is
    numbers.
    """
    from kvist.cartridge.cartridge import Cartridge
    from kvist.cartridge.model import ModelIdentity, revision_like

    with Cartridge.from_pretrained(cartridge, revision=revision) as opened:
        manifest = opened.manifest
        if model is not None:
            pinned = revision_like(model, manifest.model_revision)
            manifest.require(ModelIdentity.of_directory(model, dtype=manifest.dtype, revision=pinned))
    document = {
        "cartridge_id": manifest.cartridge_id,
        "identity": manifest.identity,
        "tokens": manifest.num_tokens_raw,
        "files": len(manifest.files),
        "bytes": manifest.file_size_bytes,
        "model": None if model is None else str(model),
    }
    whole = f": {manifest.num_tokens_raw:,} tokens, {manifest.file_size_bytes:,} bytes read"
    fits = "" if model is None else f"; fits {model}"
    line = (Styled(manifest.cartridge_id, "yellow"), " is ", Styled("whole", "green"), whole, fits)
    run.out.result(document, ids=[manifest.cartridge_id], text=[line])


@click.command()
@click.argument("cartridge")
@click.option("--name", help="Of the branch, below cartridge/.  [default: the cartridge's id]")
@click.option(
    "--page-size",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Tokens a page; that of an engine, to share pages with its snapshots.",
)
@_revision
@common
def commit(run: Invocation, cartridge: str, name: str | None, page_size: int, revision: str | None) -> None:
    """Store CARTRIDGE, a directory or a repository on the hub, as a snapshot.

    It becomes the tip of the branch cartridge/NAME. Pages that the repository has already are not stored again.
    """
    from kvist.cartridge.cartridge import Cartridge
    from kvist.cartridge.snapshots import BRANCHES, to_repository

    with run.open() as repo, Cartridge.from_pretrained(cartridge, revision=revision) as opened:
        chosen = name or opened.manifest.cartridge_id
        snapshot = to_repository(opened, repo, name=chosen, page_size_tokens=page_size)
    document = {"cid": snapshot.cid, "branch": BRANCHES + chosen, "tokens": snapshot.tokens}
    line = (f"branch {BRANCHES}{chosen} names ", Styled(snapshot.cid, "yellow"))
    run.out.result(document | {"identity": opened.identity}, ids=[snapshot.cid], text=[line])


@click.command()
@click.argument("rev")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where to; must not exist."
)
@click.option("--sequence", metavar="NAME", help="Which one, of a snapshot with several.")
@click.option("--tokens", type=click.IntRange(1), help="Only so many of its first tokens.")
@click.option("--id", "cartridge_id", metavar="ID", help="What to call it.  [default: what it is called there]")
@with_labels("May be repeated.")
@_model("Whose cache it is: says how positions are encoded, and with which tokenizer.")
@common
def export(
    run: Invocation,
    rev: str,
    output: Path,
    sequence: str | None,
    tokens: int | None,
    cartridge_id: str | None,
    labels: dict[str, str],
    model: Path | None,
) -> None:
    """Write a snapshot as a cartridge's files.

    REV is one that `kvist cartridge commit` made, or one of an engine's cache: then a sequence of it becomes the
    cartridge, all ranks of it together.
    """
    from kvist.cartridge.snapshots import from_repository, model_of

    with run.open() as repo:
        made = from_repository(
            repo,
            rev,
            sequence=sequence,
            tokens=tokens,
            model=None if model is None else model_of(repo, rev, model),
            directory=output,
            cartridge_id=cartridge_id,
            labels=labels or None,
        )
    document = {
        "cartridge_id": made.manifest.cartridge_id,
        "identity": made.identity,
        "directory": str(output),
        "tokens": made.num_tokens,
        "bytes": made.manifest.file_size_bytes,
        "has_token_ids": made.manifest.has_token_ids,
    }
    line = (
        Styled(made.manifest.cartridge_id, "yellow"),
        f" is in {output}: {made.num_tokens:,} tokens, {made.manifest.file_size_bytes:,} bytes",
    )
    run.out.result(document, ids=[made.manifest.cartridge_id], text=[line])
