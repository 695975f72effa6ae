"""A `kvist serve` worker under test. Knows its command line; must not know what is asked of it."""

from __future__ import annotations

import sys
from pathlib import Path

from kvist.testing.live import LiveServer
from kvist.testing.processes import free_port


class Worker(LiveServer):
    """A running `kvist serve`, in one process."""

    called = "the worker"
    silence_s = None

    def __init__(self, model: Path, store: str, *options: str) -> None:
        """Start it; it is ready once `wait` returns.

        Args:
            model: the model's directory.
            store: url of the repository.
            *options: further options of `kvist serve`.
        """
        port = free_port()
        command = [sys.executable, "-m", "kvist", "serve", "--model", str(model), "--store", store]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        super().__init__([*command, *options], port=port, env={"HF_HUB_OFFLINE": "1"})

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed. Also where there is no ``/proc``: it has no other process."""
        self._process.kill()
        self._close()
