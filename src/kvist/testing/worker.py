"""A `kvist serve` worker in its own process: started on a free port, and ended politely or with SIGKILL.

Knows how to start and end one. Must not know what is asked of it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Self

import httpx2

from kvist.errors import EngineError

_BOOT_TRIES = 2400
_BOOT_INTERVAL = 0.05


class Worker:
    """A running `kvist serve`.

    Attributes:
        url: where it answers, ``http://127.0.0.1:<port>``.
        http: a client for it, to be used from any thread.
        pid: its process.
    """

    def __init__(self, model: Path, store: str, *options: str) -> None:
        """Start it; it is ready once `wait` returns.

        Args:
            model: the model's directory.
            store: url of the repository.
            *options: further options of `kvist serve`.
        """
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(base_url=self.url, timeout=None, limits=httpx2.Limits(max_connections=None))
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by the worker's end
        command = [sys.executable, "-m", "kvist", "serve", "--model", str(model), "--store", store]
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options],
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self.pid = self._process.pid

    def wait(self) -> Self:
        """Return when it answers.

        Raises:
            EngineError: it ended instead; the message is what it printed.
        """
        for _ in range(_BOOT_TRIES):
            if self._process.poll() is not None:
                break
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx2.TransportError:
                time.sleep(_BOOT_INTERVAL)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        self.kill()
        raise EngineError(f"the worker did not come up:\n{said}")

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            EngineError: any status but 200; the message is the answer.
        """
        answer = self.http.post(path, json=body)
        if answer.status_code != 200:
            raise EngineError(f"POST {path}: status {answer.status_code}: {answer.text}")
        result: dict[str, Any] = answer.json()
        return result

    def _end(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait()
        self.http.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self.wait()

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_port() -> int:
    """A TCP port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
