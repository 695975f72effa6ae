"""The sink: everything the command line prints goes through here. Data to stdout, everything else to stderr.

Knows the three modes (for people, one JSON document, ids only) and terminals. Must not know repositories.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import IO, Any, NamedTuple

import click

from kvist.cli.text import printable


class Mode(Enum):
    """Who reads stdout."""

    HUMAN = auto()
    JSON = auto()
    QUIET = auto()


class Styled(NamedTuple):
    """Text in one of click's colours."""

    text: str
    colour: str


Line = str | Sequence[str | Styled]
Cell = str | int | float


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under titles. A column that holds nothing but numbers is set flush right.

    Attributes:
        titles: one a column; all of them ``""``: no header is printed.
        rows: as many cells each.
    """

    titles: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


class Output:
    """Where a command's output goes.

    Attributes:
        mode: who reads stdout.
        shows_progress: whether progress may be drawn, where the rest allows it.
    """

    def __init__(self) -> None:
        self.mode = Mode.HUMAN
        self.shows_progress = True

    # -- data, on stdout -----------------------------------------------------------------------------------------

    def result(self, document: Mapping[str, Any], *, ids: Iterable[str], text: Iterable[Line | Table]) -> None:
        """Print what a command found or did, in the form that the mode wants; the other two forms are not consumed.

        Args:
            document: JSON-serialisable; one a run.
            ids: what `--quiet` prints, one a line.
            text: what people get.
        """
        match self.mode:
            case Mode.JSON:
                click.echo(json.dumps(document, indent=2))
            case Mode.QUIET:
                for one in ids:
                    click.echo(one)
            case Mode.HUMAN:
                self._print(text, sys.stdout)

    # -- everything else, on stderr ------------------------------------------------------------------------------

    def note(self, *text: Line | Table) -> None:
        """Tell people something that is not data."""
        if self.mode is Mode.HUMAN:
            self._print(text, sys.stderr)

    def error(self, kind: str, message: str, hint: str | None, exit_code: int) -> None:
        """Say why there is no result, in every mode."""
        if self.mode is Mode.JSON:
            error = {"kind": kind, "message": message, "hint": hint, "exit_code": exit_code}
            click.echo(json.dumps({"error": error}), err=True)
            return
        self._print([(Styled("error:", "red"), f" {message}")], sys.stderr)
        if hint is not None:
            self._print([(Styled("hint:", "cyan"), f" {hint}")], sys.stderr)

    @property
    def can_ask(self) -> bool:
        """Whether a person is there to answer."""
        return self.mode is not Mode.JSON and sys.stdin.isatty()

    def confirm(self, question: str) -> bool:
        """Ask for a yes. Only where `can_ask`."""
        return click.confirm(question, err=True)

    @contextmanager
    def progress(self, what: str, *, is_bytes: bool = False) -> Iterator[Callable[[int, int], None] | None]:
        """A callback that draws how much is done, of how much; ``None`` where nobody would see it."""
        if self.mode is not Mode.HUMAN or not self.shows_progress or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        amount = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(),)
        columns = (TextColumn(what), BarColumn(), *amount, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """What the library logs as a warning or worse meanwhile is a note to people, and nothing to programs.

        Unless a command, such as a server, sets up logging of its own.
        """
        handler = _Warnings(self)
        logger = logging.getLogger("kvist")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    # -- setting text --------------------------------------------------------------------------------------------

    def _print(self, text: Iterable[Line | Table], file: IO[str]) -> None:
        for one in text:
            click.echo(_set_table(one, file) if isinstance(one, Table) else _set_line(one), file=file)


class _Warnings(logging.Handler):
    def __init__(self, out: Output) -> None:
        super().__init__(logging.WARNING)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self._out.note((Styled("warning:", "yellow"), f" {record.getMessage()}"))


def _set_line(line: Line) -> str:
    if isinstance(line, str):
        return printable(line)
    return "".join(
        click.style(printable(part.text), fg=part.colour) if isinstance(part, Styled) else printable(part)
        for part in line
    )


def _set_table(table: Table, file: IO[str]) -> str:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # without a terminal there is no width to fit: one row is one line, for grep
    console = Console(file=file, width=None if file.isatty() else 100_000)
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(table.titles))
    for number, title in enumerate(table.titles):
        is_numeric = bool(table.rows) and all(not isinstance(row[number], str) for row in table.rows)
        grid.add_column(Text(title), justify="right" if is_numeric else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(_set_cell(cell)) for cell in row))
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _set_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return printable(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.2f}"
