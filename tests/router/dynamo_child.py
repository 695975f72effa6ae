"""A child process with NVIDIA Dynamo's router, see `dynamo_peer`. ``KVIST_DYNAMO_PYTHON`` names its interpreter."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest

PYTHON = os.environ.get("KVIST_DYNAMO_PYTHON", "")
_PEER = Path(__file__).with_name("dynamo_peer.py")


@functools.cache
def missing() -> str | None:
    """Why there is no Dynamo; ``None`` if there is."""
    if not PYTHON:
        return "KVIST_DYNAMO_PYTHON is not set"
    try:
        subprocess.run([PYTHON, "-c", "import dynamo._core"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"dynamo cannot be imported by {PYTHON}: {getattr(error, 'stderr', error)}"
    return None


class Dynamo:
    """The child; its functions are called by name."""

    def __init__(self) -> None:
        if (reason := missing()) is not None:
            pytest.skip(reason)
        self._process = subprocess.Popen(
            [PYTHON, str(_PEER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "DYN_LOG": os.environ.get("DYN_LOG", "error")},
            text=True,
        )

    def __call__(self, function: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([function, *arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"dynamo ended with status {self._process.wait()}"
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("", timeout=60)
