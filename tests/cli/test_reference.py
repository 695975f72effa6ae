"""docs/reference/cli.md tells of every command, option and exit code, and nothing else."""

from __future__ import annotations

import re

import click
import pytest

from kvist import errors
from kvist.cli.main import INTERRUPTED, main
from kvist.cli.upkeep import FINDINGS
from kvist.errors import KvistError

from .reference import PAGE, commands, generate, generated_part

TEXT = PAGE.read_text()
COMMANDS = {"kvist": main} | {f"kvist {name}": command for _, name, command in commands()}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_and_option_is_in_the_reference(path: str) -> None:
    usages = generated_part(TEXT).split("Usage: ")[1:]
    (usage,) = (usage for usage in usages if re.match(rf"{path} [\[A-Z]", usage))
    for param in COMMANDS[path].params:
        if isinstance(param, click.Option):
            for name in param.opts:
                assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", usage), f"{path} {name}"
        else:
            assert param.make_metavar(click.Context(COMMANDS[path])) in usage


def test_the_reference_is_fresh() -> None:
    # compared word by word: versions of click break lines differently
    assert generated_part(TEXT).split() == generate().split(), "run: python tests/cli/reference.py"


def test_every_command_says_how_it_looks_as_json() -> None:
    fields = TEXT[TEXT.index("### JSON") : TEXT.index("## Commands")]
    for _, name, command in commands():
        if any("--json" in param.opts for param in command.params):
            assert re.search(rf"^\| `{name}( |`)", fields, re.MULTILINE), name


def test_the_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \| ([^|]*) \|$", TEXT, re.MULTILINE)
    documented = {int(code): set(re.findall(r"`(\w+)`", kinds)) for code, kinds, _ in rows}
    expected: dict[int, set[str]] = {0: set(), FINDINGS: set(), INTERRUPTED: {"interrupted"}, 2: {"usage"}}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, KvistError):
            expected.setdefault(value.exit_code, set()).add(value.kind)
    assert documented == expected
