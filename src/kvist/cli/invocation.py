"""One run of `kvist`: the options that every command takes, before or after its name, and what they came to.

Knows where the repository is and where output goes. A command file needs `common` and `Invocation` from here:

    @click.command()
    @click.argument("rev")
    @common
    def show(run: Invocation, rev: str) -> None: ...
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from kvist.cli.output import Mode, Output

if TYPE_CHECKING:
    from kvist.repo import Repository

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Invocation:
    """What the common options came to.

    Attributes:
        store: url of the store, or ``None``: `default_store`.
        is_store_typed: whether it stood on the command line, and not in the environment.
        tiers: urls of page tiers, the first asked first.
        out: the sink.
    """

    def __init__(self) -> None:
        self.store: str | None = None
        self.is_store_typed = False
        self.tiers: tuple[str, ...] = ()
        self.out = Output()

    @property
    def store_url(self) -> str:
        """Url of the store to use."""
        return self.store if self.store is not None else default_store()

    def open(self) -> Repository:
        """Open the repository; the caller closes it.

        Raises:
            RepositoryNotFound: there is none.
        """
        from kvist.repo import Repository

        return Repository.open(self.store_url, tiers=self.tiers)

    def own_hint(self, hint: str | None) -> str | None:
        """A hint whose commands name the store that the user had to name, so that they can be typed as they are."""
        if hint is None or not self.is_store_typed or "--store" in hint:
            return hint
        named = f"kvist --store {shlex.quote(self.store_url)} "
        return re.sub(r"\bkvist (?=[a-z])", lambda _: named, hint)


def default_store() -> str:
    """Url of the store in the user's data directory."""
    import platformdirs

    return (platformdirs.user_data_path("kvist") / "store").as_uri()


def common(command: Callable[Concatenate[Invocation, _P], _R]) -> Callable[_P, _R]:
    """Give a command the common options; its first argument is the `Invocation`."""
    return _with_options(click.pass_obj(command), reads_environment=False)


def common_of_root(group: Callable[Concatenate[Invocation, _P], _R]) -> Callable[_P, _R]:
    """The same for the root, which alone reads the environment: what is typed, wherever, goes before it."""
    return _with_options(click.pass_obj(group), reads_environment=True)


def _with_options(function: Callable[_P, _R], *, reads_environment: bool) -> Callable[_P, _R]:
    option = functools.partial(click.option, expose_value=False, callback=_take)
    function = option("--no-progress", is_flag=True, help="Draw no progress bars.")(function)
    function = option("-q", "--quiet", is_flag=True, help="Print ids only, one a line.")(function)
    function = option("--json", is_flag=True, help="Print one JSON document.")(function)
    where = "Where the repository is: a path or file: url; else KVIST_STORE, else the user's data directory."
    near = "A page tier to read through, nearest first: file:///path?max_bytes=50GB, redis://host; else KVIST_TIERS."
    tiers_from, store_from = ("KVIST_TIERS", "KVIST_STORE") if reads_environment else (None, None)
    function = option("--tier", "tiers", metavar="URL", multiple=True, envvar=tiers_from, help=near)(function)
    return option("--store", metavar="URL", envvar=store_from, help=where)(function)


def _take(context: click.Context, param: click.Parameter, value: Any) -> None:
    if not value:
        return
    run = context.ensure_object(Invocation)
    match param.name:
        case "store":
            run.store = value
            run.is_store_typed = context.get_parameter_source("store") is ParameterSource.COMMANDLINE
        case "tiers":
            run.tiers = value
        case "no_progress":
            run.out.shows_progress = False
        case name:
            mode = Mode.JSON if name == "json" else Mode.QUIET
            if run.out.mode not in (Mode.HUMAN, mode):
                raise click.UsageError("choose one of --json and --quiet", context)
            run.out.mode = mode
