"""The options of servers about their log, in one place: ``--log-level`` and ``--log-format``.

@click.command()
@log_options
def serve(logs: Logs, ...) -> None:
    logs.start()
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from kvist.telemetry.logs import FORMATS, LEVELS, start_logging

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Logs:
    """What the options came to.

    Attributes:
        level: the least that is told.
        form: lines for people, or JSON.
    """

    level: str
    form: str

    def start(self) -> None:
        """Log to stderr from now on."""
        start_logging(self.level, self.form)


def log_options(command: Callable[..., _R]) -> Callable[..., _R]:
    """Give a command the options; it gets them as ``logs``."""

    @click.option(
        "--log-level", default="warning", show_default=True, type=click.Choice(LEVELS), help="The least that is logged."
    )
    @click.option(
        "--log-format", default="text", show_default=True, type=click.Choice(FORMATS), help="json: one object a line."
    )
    @functools.wraps(command)
    def with_logs(*args: Any, log_level: str, log_format: str, **settings: Any) -> _R:
        return command(*args, logs=Logs(log_level, log_format), **settings)

    return with_logs
