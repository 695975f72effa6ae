"""A real SGLang on this CPU: its interpreter, its servers, and the shims that it needs here (shims/README.md).

``KVIST_SGLANG_PYTHON`` names an interpreter that has sglang and kvist; `make test-sglang` makes one, and runs these
tests in it. Without one, what needs SGLang is skipped.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist.testing.sglang import SglangServer

pytest.register_assert_rewrite("kvist.testing.scenario")

PYTHON = os.environ.get("KVIST_SGLANG_PYTHON", sys.executable)
SHIMS = Path(__file__).parent / "shims"
_LOG_TAIL = 200
_servers: list[SglangServer] = []
_notes: list[str] = []


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
    _servers.append(SglangServer(model, store, *options, python=PYTHON, shims=SHIMS, **settings))
    return _servers[-1].wait()


def say(line: str) -> None:
    """Say a line at the end of the session."""
    _notes.append(line)


@pytest.fixture(scope="session", autouse=True)
def _ended() -> Iterator[None]:
    """What is left of servers at the end is killed."""
    yield
    for server in _servers:
        server.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failed test shows what the running server printed last."""
    report = yield
    if report.failed and _servers and "server" in getattr(item.module, "__doc__", "").lower():
        lines = _servers[-1].log.splitlines()[-_LOG_TAIL:]
        report.sections.append(("log of the newest SGLang", "\n".join(lines)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _notes:
        terminalreporter.section("what SGLang did")
        for line in _notes:
            terminalreporter.line(line)
