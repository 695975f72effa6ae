"""Trees of processes, their end by SIGKILL, and ports for them. Knows Linux's ``/proc``; must not know what runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvist.errors import EngineError

_END_S: Final = 60.0
_INTERVAL_S: Final = 0.01


def free_port() -> int:
    """A TCP port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill_tree(leader: int) -> None:
    """SIGKILL a session and all that descends from its leader; return when none of it is left."""
    deadline = time.monotonic() + _END_S
    known: set[int] = set()
    while found := tree(leader, known):
        known.update(found)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise EngineError(f"processes {found} outlive SIGKILL")
        time.sleep(_INTERVAL_S)


def tree(leader: int, known: set[int] | frozenset[int] = frozenset()) -> list[int]:
    """Living processes that are of the leader's session, descend from it, or from ``known`` ones."""
    table = dict(_processes())
    ours = {pid for pid, (_, session) in table.items() if pid == leader or session == leader or pid in known}
    grown = True
    while grown:
        children = {pid for pid, (parent, _) in table.items() if parent in ours}
        grown = not children <= ours
        ours |= children
    return sorted(ours)


def _processes() -> Iterator[tuple[int, tuple[int, int]]]:
    """(pid, (parent, session)) of every process that is not a zombie."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # The name, in parentheses, may hold anything.
                state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if state not in "ZX":
                yield int(entry.name), (int(parent), int(session))
