"""Of every page: the command line knows its `kvist` commands, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import dropwhile, groupby
from pathlib import Path

import click
import pytest

from kvist.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
ENDS = "();<>|&\n"
"""What ends the words of a command."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(script: str) -> Iterator[list[str]]:
    """The words after `kvist` of each of its commands."""
    lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", script.replace("\\\n", " ")), posix=True, punctuation_chars=ENDS)
    lexer.whitespace, lexer.whitespace_split = " ", True
    for _, words in groupby(lexer, lambda word: set(word) <= set(ENDS)):
        name, *rest = [*dropwhile(lambda word: "=" in word, words), ""]
        if name == "kvist":
            yield rest[:-1]


def typed(text: str) -> Iterator[list[str]]:
    """Commands that stand as they are typed, in blocks."""
    for language, block in BLOCK.findall(text):
        if language in ("sh", "bash"):
            yield from commands(block)
        elif language == "console":
            lines = re.findall(r"^ *\$ ((?:\w+=\S* )*kvist .*)", block.replace("\\\n", " "), re.MULTILINE)
            yield from commands("\n".join(lines))


def told(text: str) -> Iterator[list[str]]:
    """Commands that are spoken of: what must come with them may be left out. (What ends in v1 is the tag of a hash.)"""
    for code in re.findall(r"`(kvist [^`]+)(?<! v1)`", BLOCK.sub("", text)):
        yield from commands(code)


def parse(words: list[str]) -> list[click.Parameter]:
    """Let click parse a command, converting and running nothing; what it lacks.

    Raises:
        click.UsageError: there is no such command or option, or it wants a value.
    """
    command: click.Command = main
    context = click.Context(command, **command.context_settings)
    while True:
        _, rest, given = command.make_parser(context).parse_args(words)
        if not isinstance(command, click.Group) or not rest:
            break
        _, found, words = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, click.Context(found, parent=context, **found.context_settings)
    assert not rest, f"too many words: {rest}"
    needed = [one for one in command.params if one.required and not one.envvar and "--help" not in words]
    return [one for one in needed if one not in given]


@pages
def test_the_command_line_knows_the_commands(page: Path) -> None:
    text = page.read_text()
    for words in typed(text):
        assert not parse(words), words
    for words in told(text):
        parse(words)


def test_what_is_no_command_is_seen() -> None:
    """The test above would see it: a misspelt command or option, a missing or surplus word."""
    assert [*typed("```sh\nA=1 kvist log -n 1 | head &&  # why\nkvist fsck --json > f\n```")] == [
        ["log", "-n", "1"],
        ["fsck", "--json"],
    ]
    for wrong in (["lgo"], ["log", "--lasst"], ["fork", "main", "-n"]):
        with pytest.raises(click.UsageError):
            parse(wrong)
    with pytest.raises(AssertionError):
        parse(["show", "main", "draft"])
    assert [one.name for one in parse(["fork", "main"])] == ["count"]


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub names it."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pages
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", there.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), link
