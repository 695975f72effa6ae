"""Options that several commands of `kvist cartridge` have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from kvist.errors import AlreadyExists, InvalidInput

_F = TypeVar("_F", bound=Callable[..., Any])


def with_model(command: _F) -> _F:
    """Options ``model``, ``device`` and ``dtype``, for `CausalModel.open`; ``text``, the document; and ``system``."""
    kind = click.Path(path_type=Path, exists=True, file_okay=False)
    file = click.Path(path_type=Path, exists=True, dir_okay=False)
    option = click.option
    command = option("--dtype", help="Of weights and KV cache.  [default: that of the weights' files]")(command)
    command = option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")(command)
    command = option(
        "--system", is_flag=True, help="The text is the system message of the chat template; else it is bare text."
    )(command)
    command = option("--text", type=file, required=True, metavar="FILE", help="The document, UTF-8.")(command)
    return option("--model", type=kind, required=True, metavar="DIR", help="The model, with safetensors.")(command)


def with_result(command: _F) -> _F:
    """Options ``output``, ``cartridge_id``, ``labels`` and ``license_``, for `Cartridge.create`."""
    option = click.option
    command = option("--license", "license_", default="", metavar="SPDX", help="Of the document.")(command)
    command = with_labels("By which routers find it.")(command)
    command = option("--id", "cartridge_id", metavar="ID", help="Its name.  [default: the output's]")(command)
    path = click.Path(path_type=Path, file_okay=False)
    return option("-o", "--output", type=path, required=True, metavar="DIR", help="The cartridge's directory.")(command)


def with_labels(what: str) -> Callable[[_F], _F]:
    """Option ``labels``, of which ``what`` says what they are for; a mapping."""
    return click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", callback=_split, help=what)


def read_text(path: Path) -> str:
    """The document.

    Raises:
        InvalidInput: it is not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{str(path)!r} must be UTF-8: {error}") from None
    if not text.strip():
        raise InvalidInput(f"{str(path)!r} has no text")
    return text


def require_free(output: Path) -> None:
    """Refuse an output that is taken, before anything is computed.

    Raises:
        AlreadyExists: there is a file, or a directory that is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise AlreadyExists(f"{str(output)!r} is there already, and is not written over")


def _split(context: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    labels = {}
    for one in value:
        key, equals, rest = one.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"expected KEY=VALUE, got {one!r}", context, param)
        labels[key] = rest
    return labels
