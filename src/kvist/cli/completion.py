"""`kvist completion`: the script that makes a shell complete kvist's commands and options."""

from __future__ import annotations

from typing import cast

import click
from click.shell_completion import get_completion_class

from kvist.cli.invocation import Invocation, common

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
@common
def completion(run: Invocation, context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    For bash: kvist completion bash > ~/.local/share/bash-completion/completions/kvist
    """
    root = cast(click.Group, context.find_root().command)
    kind = get_completion_class(shell)
    assert kind is not None, "click completes for each of _SHELLS"
    script = kind(root, {}, "kvist", "_KVIST_COMPLETE").source().rstrip()
    run.out.result({"shell": shell, "script": script}, ids=[script], text=script.splitlines())
