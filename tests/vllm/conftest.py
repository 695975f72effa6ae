"""Models on disk, and real vLLM servers over them.

vLLM may live in another environment than pytest: ``KVIST_VLLM_PYTHON`` names its interpreter, which needs kvist too
(``pip install --no-deps -e .``). Without one, everything here is skipped.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from vllm_servers import PYTHON, hash_seed, notes, say, servers, vllm_version, watched

from kvist.testing.models import make_shape
from kvist.testing.vllm import VllmServer, run_in_process

_HERE = Path(__file__).parent
_LOG_TAIL = 200


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
    if report.failed and _HERE in item.path.parents and servers:
        lines = servers[-1].log.splitlines()[-_LOG_TAIL:]
        report.sections.append(("log of the newest vLLM", "\n".join(lines)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if notes:
        terminalreporter.section("what vLLM did")
        for line in notes:
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
    for server in servers:
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
