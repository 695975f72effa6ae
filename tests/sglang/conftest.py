"""A real SGLang on this CPU: its interpreter, its servers, and the shims that it needs here (shims/README.md).

``KVIST_SGLANG_PYTHON`` names an interpreter that has sglang and kvist; `make test-sglang` makes one, and runs these
tests in it. Without one, what needs SGLang is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_servers import notes, servers

pytest.register_assert_rewrite("kvist.testing.scenario")

_HERE = Path(__file__).parent
_LOG_TAIL = 200


@pytest.fixture(scope="session", autouse=True)
def _ended() -> Iterator[None]:
    """What is left of servers at the end is killed."""
    yield
    for server in servers:
        server.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failed test shows what the running server printed last."""
    report = yield
    if report.failed and _HERE in item.path.parents and servers:
        lines = servers[-1].log.splitlines()[-_LOG_TAIL:]
        report.sections.append(("log of the newest SGLang", "\n".join(lines)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if notes:
        terminalreporter.section("what SGLang did")
        for line in notes:
            terminalreporter.line(line)
