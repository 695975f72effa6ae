"""Witnesses: how the processes of one machine tell for sure that one of them has ended.

Knows one file for each token, which its process keeps locked. The kernel lets go of it when the process ends, however
it ends, and not before; it outlives a reboot. A process number is given anew, and machines made of one image share host
name, machine id and process numbers: none of them has the file. Must not know what anybody does meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path
from typing import Final

from blake3 import blake3

_DIRECTORY: Final = Path("/var/tmp")
"""Kept over reboots, of this machine (or container) alone, and writable for all: gc may run as another user."""


class Witness:
    """Says that this process lives on, until it ends, or `close`.

    Where the file cannot be made nobody will ever know that the process ended.

    Attributes:
        token: its name, which no other has.
    """

    def __init__(self) -> None:
        self.token: Final = secrets.token_hex(8)
        self._fd: int | None = None
        try:
            self._fd = os.open(_path(self.token), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            remove(self.token)  # left there unlocked it would say that this process has ended

    def close(self) -> None:
        """Be as one whose process has ended. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def is_dead(token: str) -> bool:
    """Whether the process of a witness has surely ended: the file is here, and nobody holds it.

    One that another user made is believed only of root: anybody can make a file there.
    """
    try:
        fd = os.open(_path(token), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.fstat(fd).st_uid in (0, os.getuid())
    except OSError:
        return False
    finally:
        os.close(fd)


def remove(token: str) -> None:
    """Nobody will ask for it again."""
    with contextlib.suppress(OSError):
        _path(token).unlink()


def _path(token: str) -> Path:
    """Where the file lies. Tokens come out of a store, and are no paths."""
    return _DIRECTORY / f"kvist-{blake3(token.encode()).hexdigest(length=16)}"
