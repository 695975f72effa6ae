"""`kvist cartridge push`: a cartridge to a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from kvist.cli.cartridge_registry import open_registry, with_registry
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Styled
from kvist.errors import UnknownCartridge


@click.command()
@click.argument("cartridge")
@click.argument("target", metavar="hf:OWNER/NAME")
@click.option("--revision", metavar="BRANCH", help="To which branch.  [default: the main one]")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--pull-request", is_flag=True, help="Open a pull request instead.")
@with_registry
@common
def push(
    run: Invocation,
    cartridge: str,
    target: str,
    revision: str | None,
    message: str | None,
    private: bool,
    pull_request: bool,
    registry: str | None,
) -> None:
    """Upload a cartridge to the Hugging Face hub, in one commit.

    CARTRIDGE is a directory, or the id of one that is registered. Each byte is checked before it goes. The repository
    is made if it is not there. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from kvist.cartridge.cartridge import Cartridge

    scheme, _, repo_id = target.partition(":")
    if scheme != "hf" or not repo_id:
        raise click.UsageError(f"expected hf:OWNER/NAME, got {target!r}")
    with Cartridge.from_pretrained(_find(cartridge, registry)) as opened:
        url = opened.push_to_hub(
            repo_id, revision=revision, commit_message=message, private=private or None, create_pr=pull_request
        )
        manifest = opened.manifest
    document = {
        "cartridge_id": manifest.cartridge_id,
        "identity": manifest.identity,
        "repository": repo_id,
        "url": url,
        "bytes": manifest.file_size_bytes,
    }
    line = (Styled(manifest.cartridge_id, "yellow"), f" is at {url}: {manifest.file_size_bytes:,} bytes")
    run.out.result(document, ids=[url], text=[line])


def _find(cartridge: str, registry: str | None) -> Path:
    """The directory of a cartridge, made if need be."""
    from kvist.cartridge.library import default_cache_dir, open_source, source_of

    if Path(cartridge).is_dir():
        return Path(cartridge)
    with open_registry(registry) as database:
        found, where = database.lookup(cartridge), database.name
    if found is None:
        raise UnknownCartridge(
            f"{cartridge!r:.120} is neither a directory nor registered in {where}",
            hint="to see what is: kvist cartridge list",
        )
    source = source_of(found.location)
    return open_source(source, cache_dir=default_cache_dir(), model=found.manifest.model)[0]
