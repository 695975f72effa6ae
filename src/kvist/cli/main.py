"""The root command `kvist`: its table of commands, and the one place where errors become messages and exit codes.

Knows names of commands, not what they do: each is imported when it is called, so that `kvist --help` imports nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from kvist import __version__
from kvist.cli.invocation import Invocation, common_of_root
from kvist.cli.lazy import Lazy, LazyGroup
from kvist.cli.output import Mode
from kvist.errors import KvistError

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as shells report a process that SIGINT ended."""


EXTRAS: Final = {
    "numpy": "sim",
    "zstandard": "sim",
    "matplotlib": "sim",
    "jinja2": "sim",
    "prometheus_client": "server",
    "starlette": "server",
    "uvicorn": "server",
    "cryptography": "sign",
    "ray": "ray",
    "redis": "redis",
    "mooncake": "mooncake",
    "safetensors": "cartridge",
    "sqlalchemy": "cartridge",
    "psycopg": "postgres",
    "huggingface_hub": "cartridge",
}
"""Packages that an extra of ours brings, for the hint when one is missing; all others: the extra `all`."""

SECTIONS: Final[dict[str, dict[str, Lazy]]] = {
    "Repository": {
        "init": Lazy("kvist.cli.upkeep:init", "Make an empty repository."),
        "stats": Lazy("kvist.cli.stats:stats", "Count what the repository holds."),
        "fsck": Lazy("kvist.cli.fsck:fsck", "Check that every snapshot is there and whole."),
        "repair": Lazy("kvist.cli.fsck:repair", "Mend what fsck finds, as far as it can be mended."),
        "prune": Lazy("kvist.cli.prune:prune", "Thin the history of branches."),
        "gc": Lazy("kvist.cli.gc:gc", "Delete what no branch or tag reaches."),
    },
    "Snapshots": {
        "log": Lazy("kvist.cli.history:log", "List snapshots, newest first."),
        "show": Lazy("kvist.cli.history:show", "Describe one snapshot."),
        "diff": Lazy("kvist.cli.history:diff", "Tell what two snapshots share."),
        "fork": Lazy("kvist.cli.names:fork", "Make branches that continue a snapshot; copies nothing."),
        "branch": Lazy("kvist.cli.names:branch", "List, make, move or delete branches."),
        "tag": Lazy("kvist.cli.names:tag", "List, make or delete tags."),
        "convert": Lazy("kvist.cli.convert:convert", "Make a snapshot whose pages fit another engine."),
    },
    "Transfer": {
        "push": Lazy("kvist.cli.transfer:push", "Send branches and tags to another repository."),
        "pull": Lazy("kvist.cli.transfer:pull", "Fetch branches and tags from another repository."),
        "clone": Lazy("kvist.cli.transfer:clone", "Make a copy of another repository."),
    },
    "Access": {
        "token": Lazy("kvist.cli.token:token", "Say who may call a server."),
        "key": Lazy("kvist.cli.sign:key", "Make keys that sign snapshots."),
        "sign": Lazy("kvist.cli.sign:sign", "Sign a snapshot."),
        "verify": Lazy("kvist.cli.sign:verify", "Check one snapshot: its signature and its pages."),
        "quota": Lazy("kvist.cli.quota:quota", "Tell or set what a repository may hold."),
    },
    "Cartridges": {
        "cartridge": Lazy("kvist.cli.cartridge:cartridge", "Build, train, register and check KV prefixes."),
    },
    "Engine": {
        "serve": Lazy("kvist.cli.serve:serve", "Serve a model with an OpenAI-compatible API."),
        "ui": Lazy("kvist.cli.ui:ui", "Show a repository in the browser."),
        "demo": Lazy("kvist.cli.demo:demo", "See a cache snapshot, forked and checked out."),
    },
    "Simulator": {
        "sim": Lazy("kvist.cli.sim:sim", "Replay traces in virtual time, and make and describe them."),
        "plan": Lazy("kvist.cli.plan:plan", "Find the cheapest cluster that serves a trace within an SLA."),
        "mock": Lazy("kvist.cli.mock:mock", "Run an engine without a GPU, for tests of routers and clients."),
    },
    "Shell": {
        "completion": Lazy("kvist.cli.completion:completion", "Print the completion script for a shell."),
    },
}
"""Every command, in the order of `kvist --help`. One whose module is not installed is left out."""


class Root(LazyGroup):
    """Ends the process as the conventions say (docs/reference/cli.md)."""

    sections = SECTIONS

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run `kvist` and exit. No command catches an error of the library: they all end here."""
        words = list(sys.argv[1:] if args is None else args)
        run = Invocation()
        try:
            with run.out.warnings():
                # what a command gave `Context.exit`, else its return value, which is none
                status = super().main(words, "kvist", complete_var, standalone_mode=False, obj=run, **extra)
        except KvistError as error:
            status = error.exit_code
            run.out.error(error.kind, str(error), run.own_hint(error.hint), status)
        except ModuleNotFoundError as error:
            if (error.name or "kvist").partition(".")[0] == "kvist":
                raise  # our bug
            status = KvistError.exit_code
            run.out.error(
                KvistError.kind,
                f"this command needs the Python package {error.name}, which is not installed",
                f"pip install 'kvist[{EXTRAS.get(error.name or '', 'all')}]'",
                status,
            )
        except click.Abort:
            status = INTERRUPTED
            run.out.error("interrupted", "interrupted", None, status)
        except click.ClickException as error:
            status = error.exit_code
            if "--json" in words:  # it may not have been read yet when the words made no sense
                run.out.mode = Mode.JSON
            if isinstance(error, click.UsageError) and run.out.mode is not Mode.JSON:
                error.show()
            else:
                kind = "usage" if isinstance(error, click.UsageError) else KvistError.kind
                run.out.error(kind, error.format_message(), None, status)
        sys.exit(status if isinstance(status, int) else 0)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvist")
@common_of_root
def main(run: Invocation) -> None:
    """Git for KV caches: snapshot, fork and check out the cache of a live LLM engine.

    REV is a snapshot's cid, six or more of its first digits, a branch or a tag.
    """
