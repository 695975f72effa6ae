"""Groups whose commands are imported when they are called, so that ``--help`` imports nothing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import ClassVar, NamedTuple

import click


class Lazy(NamedTuple):
    """A command that is imported when it is called.

    Attributes:
        target: ``"module:attribute"``.
        help: its line in the group's help; how the command's own short help begins.
    """

    target: str
    help: str

    @property
    def module(self) -> str:
        """The module's name."""
        return self.target.partition(":")[0]

    @property
    def is_there(self) -> bool:
        """Whether the module is installed."""
        return importlib.util.find_spec(self.module) is not None

    def load(self) -> click.Command:
        """Import the command."""
        command: click.Command = getattr(importlib.import_module(self.module), self.target.partition(":")[2])
        return command


class LazyGroup(click.Group):
    """Finds its commands by `sections`.

    Attributes:
        sections: title to name to command, in the order of the help. One whose module is not installed is left out.
    """

    sections: ClassVar[dict[str, dict[str, Lazy]]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands that are there."""
        return [name for section in self.sections.values() for name, lazy in section.items() if lazy.is_there]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; ``None`` if there is none of that name."""
        for section in self.sections.values():
            if cmd_name in section and section[cmd_name].is_there:
                return section[cmd_name].load()
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        width = max(len(name) for name in self.list_commands(ctx))
        for title, section in self.sections.items():
            rows = [(name.ljust(width), lazy.help) for name, lazy in section.items() if lazy.is_there]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
