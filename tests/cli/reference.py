"""The part of docs/reference/cli.md that is generated: `python tests/cli/reference.py` writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from kvist.cli.main import SECTIONS, main

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
START, END = "<!-- generated from --help by tests/cli/reference.py: start -->", "<!-- generated: end -->"


def generate() -> str:
    """The reference of every command."""
    return "\n".join([START, "", *_sections(), END])


def commands() -> Iterator[tuple[str, str, click.Command]]:
    """Section, name and command, in the order of `kvist --help`; those of a group after it."""
    context = click.Context(main, **main.context_settings)
    for title, section in SECTIONS.items():
        for name in section:
            command = main.get_command(context, name)
            if command is not None:
                yield from ((title, *one) for one in _with_those_below(name, command))


def _with_those_below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, **command.context_settings)
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from _with_those_below(f"{name} {below}", found)


def _sections() -> Iterator[str]:
    yield from _help("kvist", main)
    title = ""
    for section, name, command in commands():
        if section != title:
            title = section
            yield from (f"### {title}", "")
        yield from (f"#### kvist {name}", "")
        yield from _help(f"kvist {name}", command)


def _help(path: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=path, terminal_width=100, max_content_width=100)
    context.help_option_names = ["-h", "--help"]
    yield from ("```text", command.get_help(context), "```", "")


def generated_part(page: str) -> str:
    """What the page holds between the markers, markers included."""
    return page[page.index(START) : page.index(END) + len(END)]


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.replace(generated_part(text), generate()))
