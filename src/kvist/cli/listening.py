"""The options of servers about where they listen and who may call, in one place: ``--host``, ``--port``, ``--tokens``.

@click.command()
@listening_options(port=8000)
def serve(listening: Listening, ...) -> None:
    with listening.bind() as listener:
        ...
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from socket import socket

    from kvist.server.access import Access

_R = TypeVar("_R")


@dataclass(frozen=True)
class Listening:
    """What the options came to.

    Attributes:
        host, port: where.
        tokens: the file of those who may call; ``None``: whoever is on this machine.
    """

    host: str
    port: int
    tokens: Path | None

    @functools.cached_property
    def access(self) -> Access:
        """Who may call.

        Raises:
            KvistError: the tokens file cannot be used.
        """
        from kvist.server.access import Access
        from kvist.server.tokens import Tokens

        return Access(None if self.tokens is None else Tokens(self.tokens))

    def bind(self) -> socket:
        """The socket; raises as `kvist.server.bind`."""
        from kvist.server import bind

        return bind(self.host, self.port, guarded=self.access.tokens is not None)


def listening_options(
    *, port: int, port_help: str = "0 takes a free one.", who: str = "Who may call"
) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Give a command the options, the port's default and words of its own; it gets them as ``listening``."""

    def decorate(command: Callable[..., _R]) -> Callable[..., _R]:
        @click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
        @click.option("--port", default=port, show_default=True, type=click.IntRange(0, 65535), help=port_help)
        @click.option(
            "--tokens",
            default=None,
            envvar="KVIST_TOKENS",
            type=click.Path(path_type=Path),
            help=f"{who} (kvist token); else KVIST_TOKENS. Without, it listens at a loopback address only.",
        )
        @functools.wraps(command)
        def listening(*args: Any, host: str, port: int, tokens: Path | None, **settings: Any) -> _R:
            return command(*args, listening=Listening(host, port, tokens), **settings)

        return listening

    return decorate
