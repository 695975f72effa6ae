"""Servers of SGLang for the tests of this directory, and what is to be said of them at the end."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvist.testing.sglang import SglangServer

PYTHON = os.environ.get("KVIST_SGLANG_PYTHON", sys.executable)
SHIMS = Path(__file__).parent / "shims"
servers: list[SglangServer] = []
notes: list[str] = []


@functools.cache
def has_sglang() -> bool:
    """Whether the interpreter has it."""
    look = "import importlib.metadata as m; raise SystemExit(not any(m.distributions(name='sglang')))"
    return subprocess.run([PYTHON, "-c", look], check=False).returncode == 0


needs_server = pytest.mark.skipif(
    not has_sglang(), reason=f"sglang is not installed beside {PYTHON} (see KVIST_SGLANG_PYTHON)"
)


def serve(model: Path, store: str | None, *options: str, **settings: Any) -> SglangServer:
    """A server, once it answers; a test that fails shows what it printed last."""
    servers.append(SglangServer(model, store, *options, python=PYTHON, shims=SHIMS, **settings))
    return servers[-1].wait()


def say(line: str) -> None:
    """Say a line at the end of the session."""
    notes.append(line)
